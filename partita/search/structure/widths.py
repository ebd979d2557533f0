"""What the dims of tensors are made of.

A network's widths are its free numbers: channels, hidden units, heads. Every dim of every tensor is an *extent*: a
width, a product of extents (outermost first, as reshaping merges dims) or a sum of them (as concatenation joins them).
The ops of a network say which extents are equal. Solving these equations by unification finds which dims of which
parameters change together, and how:

    q, k, v = self.qkv(x).chunk(3, -1)          # rows of qkv: a + b + c
    q = q.view(B, T, 4, 8)                      # a = h · e
    attention(q, k, v)                          # b = h · e,  c = h · e', where e' may differ
    self.out(y.flatten(-2))                     # inputs of out: h · e'

Two ways of dividing one width that have no common refinement fix it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import sympy
import torch
from torch import Tensor


@dataclass(eq=False)
class Width:
    """A number of units.

    Args:
        size: how many there are.
        fixed: why there can't be more or fewer; "" if there can.
        symbol: the size in terms of the inputs' sizes, where it depends on them.
        made_of: what it turned out to be.
    """

    size: int
    fixed: str = ""
    symbol: sympy.Expr | None = None
    made_of: Extent | None = None


@dataclass(frozen=True)
class Product:
    factors: tuple[Extent, ...]


@dataclass(frozen=True)
class Sum:
    parts: tuple[Extent, ...]


Extent = Width | Product | Sum
Chosen = Mapping[Width, Tensor]  # the units of a width that are there afterwards, by their indices before


class Uneven(Exception):
    """An extent can't be divided like this."""


def product(extents: Sequence[Extent]) -> Extent:
    factors: list[Extent] = []
    for extent in map(resolved, extents):
        factors += extent.factors if isinstance(extent, Product) else [extent]
    factors = [factor for factor in factors if size_of(factor) != 1 or _symbolic(factor)]
    if len(factors) == 1:
        return factors[0]
    return Product(tuple(factors)) if factors else Width(1, fixed="it is one")


def total(extents: Sequence[Extent]) -> Extent:
    parts: list[Extent] = []
    for extent in map(resolved, extents):
        parts += extent.parts if isinstance(extent, Sum) else [extent]
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def resolved(extent: Extent) -> Extent:
    """With every width replaced by what it is made of."""
    if isinstance(extent, Width):
        return extent if extent.made_of is None else resolved(extent.made_of)
    return product(extent.factors) if isinstance(extent, Product) else total(extent.parts)


def size_of(extent: Extent, new: Mapping[Width, int] = MappingProxyType({})) -> int:
    """Its size, if widths had the ``new`` ones."""
    extent = resolved(extent) if new else extent
    if isinstance(extent, Width):
        return new.get(extent, extent.size)
    if isinstance(extent, Product):
        return math.prod(size_of(factor, new) for factor in extent.factors)
    return sum(size_of(part, new) for part in extent.parts)


def symbolic_size(extent: Extent) -> sympy.Expr:
    """Its size, in terms of the inputs'."""
    extent = resolved(extent)
    if isinstance(extent, Width):
        return extent.symbol if extent.symbol is not None else sympy.Integer(extent.size)
    if isinstance(extent, Product):
        return sympy.Mul(*map(symbolic_size, extent.factors))
    return sympy.Add(*map(symbolic_size, extent.parts))


def widths_of(extent: Extent) -> Iterator[Width]:
    """All widths in it, as often as they occur."""
    extent = resolved(extent)
    if isinstance(extent, Width):
        yield extent
    else:
        for inner in extent.factors if isinstance(extent, Product) else extent.parts:
            yield from widths_of(inner)


def fix(extent: Extent, why: str) -> None:
    for width in widths_of(extent):
        width.fixed = width.fixed or why


def _symbolic(extent: Extent) -> bool:
    return isinstance(extent, Width) and extent.symbol is not None


# -- dividing ---------------------------------------------------------------------------------------------------------


def factored(extent: Extent, sizes: Sequence[int]) -> list[Extent]:
    """``extent`` as a product of extents of ``sizes``.

    Raises:
        Uneven: it is already divided in another way.
    """
    extent = resolved(extent)
    rest: list[Extent] = list(extent.factors) if isinstance(extent, Product) else [extent]
    found: list[Extent] = []
    for size in sizes:
        taken: list[Extent] = []
        have = 1
        while have < size:
            head = resolved(rest.pop(0))  # dividing others may have told more of it
            if isinstance(head, Product):
                rest[:0] = head.factors
                continue
            if size % (have * size_of(head)):
                if size % have or size_of(head) % (size // have):
                    raise Uneven
                head, inner = _halves(head, size // have)
                rest.insert(0, inner)
            taken.append(head)
            have *= size_of(head)
        found.append(product(taken))
    return found


def _halves(extent: Extent, outer: int) -> tuple[Extent, Extent]:
    """An extent that is no product, as ``outer`` times something."""
    inner = size_of(extent) // outer
    if isinstance(extent, Width):
        pair = Width(outer, extent.fixed), Width(inner, extent.fixed)
        extent.made_of = Product(pair)
        return pair
    assert isinstance(extent, Sum)
    first, *others = parted(extent, [inner] * outer)
    for other in others:
        equate(first, other)
    return Width(outer, fixed="it counts equal parts"), resolved(first)


def parted(extent: Extent, sizes: Sequence[int]) -> list[Extent]:
    """``extent`` as a sum of extents of ``sizes``.

    Raises:
        Uneven: it is already divided in another way.
    """
    extent = resolved(extent)
    if len(sizes) == 1:
        return [extent]
    if isinstance(extent, Width):
        parts = tuple(Width(size, extent.fixed) for size in sizes)
        extent.made_of = Sum(parts)
        return list(parts)
    if isinstance(extent, Product):
        outer, inner = extent.factors[0], product(extent.factors[1:])
        if any(size % size_of(inner) for size in sizes):
            raise Uneven
        return [product([part, inner]) for part in parted(outer, [size // size_of(inner) for size in sizes])]
    return _regrouped(list(extent.parts), sizes)


def _regrouped(rest: list[Extent], sizes: Sequence[int]) -> list[Extent]:
    found: list[Extent] = []
    for size in sizes:
        taken: list[Extent] = []
        while (missing := size - sum(map(size_of, taken))) > 0:
            head = resolved(rest.pop(0))
            if isinstance(head, Sum):
                rest[:0] = head.parts
                continue
            if size_of(head) > missing:
                head, tail = parted(head, [missing, size_of(head) - missing])
                rest.insert(0, tail)
            taken.append(head)
        found.append(total(taken) if taken else Width(0, fixed="it is empty"))
    return found


# -- equations --------------------------------------------------------------------------------------------------------


def equate(a: Extent, b: Extent) -> None:
    """Both are the same units in the same order."""
    a, b = resolved(a), resolved(b)
    if a is b:
        return
    assert size_of(a) == size_of(b), (a, b)
    if isinstance(b, Width) and not (isinstance(a, Width) and a.symbol is None):
        a, b = b, a
    if isinstance(a, Width):
        _bind(a, b)
        return
    try:
        if isinstance(a, Product) and isinstance(b, Product):
            sizes = _common_factors(a, b)
            pairs = zip(factored(a, sizes), factored(b, sizes), strict=True)
        else:
            sizes = _common_parts(a, b)
            pairs = zip(parted(a, sizes), parted(b, sizes), strict=True)
    except Uneven:
        for extent in (a, b):
            fix(extent, "it is divided in two ways")
        return
    for x, y in pairs:
        equate(x, y)


def _bind(width: Width, extent: Extent) -> None:
    if width.fixed:
        fix(extent, width.fixed)
    if any(inner is width for inner in widths_of(extent)):
        fix(width, "it is a part of itself")
        return
    width.made_of = extent


def _common_factors(a: Product, b: Product) -> list[int]:
    ends = sorted({end for each in (a, b) for end in itertools.accumulate(map(size_of, each.factors), int.__mul__)})
    if any(end % before for before, end in itertools.pairwise(ends)):
        raise Uneven
    return [end // before for before, end in itertools.pairwise([1, *ends])]


def _common_parts(a: Extent, b: Extent) -> list[int]:
    parts = [each.parts for each in (a, b) if isinstance(each, Sum)]
    ends = sorted({end for each in parts for end in itertools.accumulate(map(size_of, each))})
    return [end - before for before, end in itertools.pairwise([0, *ends])]


# -- choosing units ---------------------------------------------------------------------------------------------------


def indices(extent: Extent, chosen: Chosen) -> Tensor:
    """The entries of a dim that are there afterwards, by their indices before."""
    extent = resolved(extent)
    if isinstance(extent, Width):
        return chosen.get(extent, torch.arange(extent.size))
    if isinstance(extent, Product):
        found = torch.zeros(1, dtype=torch.long)
        for factor in extent.factors:
            found = (found[:, None] * size_of(factor) + indices(factor, chosen)).flatten()
        return found
    starts = itertools.accumulate(map(size_of, extent.parts), initial=0)
    return torch.cat([start + indices(part, chosen) for start, part in zip(starts, extent.parts, strict=False)])


def positions(extent: Extent, width: Width) -> Tensor:
    """Which unit of ``width`` each entry of a dim belongs to; -1 where none."""
    extent = resolved(extent)
    if isinstance(extent, Width):
        return torch.arange(extent.size) if extent is width else torch.full((extent.size,), -1)
    if isinstance(extent, Sum):
        return torch.cat([positions(part, width) for part in extent.parts])
    found = torch.full((1,), -1)
    for factor in extent.factors:
        inner = positions(factor, width)
        found = torch.where(inner[None] >= 0, inner[None], found[:, None]).flatten()
    return found


def free_widths(extents: Sequence[Extent]) -> list[Width]:
    """Those that can change, in order, once each."""
    return [width for width in dict.fromkeys(w for e in extents for w in widths_of(e)) if not width.fixed]
