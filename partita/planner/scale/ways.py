"""Ways of running an op along the tensor axis: the rules whose blocks divide evenly over the workers.

A placement here needs no sizes, because all shares are equal: ``R`` whole, ``P`` summand, or a cut ``(dim, parts)``.
``parts`` tells how the dim is composed: ``(1,)`` plainly, ``(1, 1, 1)`` of three equal parts each of which is cut for
itself (a fused projection of query, key and value), ``(4, 1, 1)`` of parts in that ratio (fewer key than query heads).
What head counts do not permit never appears: a view of ``[.., heads * width]`` as ``[.., heads, width]`` has ``heads``
blocks, and ``blocks % workers == 0`` must hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from partita.sharding.calls import Op, OpCall, TensorSpec
from partita.sharding.rules import PARTIAL, REPLICATE, Cut, InputSpec, OutputSpec, Rule, replicate_rule
from partita.sharding.ruleset import plain_rules_of

R, P = "R", "P"
Parts = tuple[int, ...]
Lay = str | tuple[int, Parts]  # "R", "P", or (dim, parts)
PLAIN: Parts = (1,)


@dataclass(frozen=True)
class Way:
    """Placements of an op's tensors; None where the op reads or makes nothing."""

    inputs: tuple[Lay | None, ...]
    outputs: tuple[Lay | None, ...]

    @property
    def spreads(self) -> bool:
        """Whether each worker does its share of the work only."""
        return any(isinstance(lay, tuple) for lay in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Sized:
    """A rule without its call: the way it is followed, and how many indivisible blocks it cuts (0: nothing is cut)."""

    way: Way
    extent: int

    @property
    def parts(self) -> set[Parts]:
        return {lay[1] for lay in (*self.way.inputs, *self.way.outputs) if isinstance(lay, tuple)}


def sized_rules(call: OpCall, *, context: bool) -> tuple[Sized, ...]:
    """All rules of ``call``, running it whole included. ``context`` adds the cut of attention along its queries."""
    rules: list[Rule] = [] if call.is_random else list(plain_rules_of(call))
    rules.append(replicate_rule(call))
    found = [_sized(rule) for rule in rules if not rule.averaged]
    found += _part_rules(call)
    if is_attention(call) and call.schema_argument("dropout_p", 0.0) == 0.0:
        found += _group_rules(call) + (_query_rules(call) if context else [])
    return tuple(dict.fromkeys(found))


def has_cuts(call: OpCall) -> bool:
    """Whether any rule of ``call`` cuts something."""
    return call.is_random or any(rule.extent for rule in plain_rules_of(call)) or bool(_part_rules(call))


def _sized(rule: Rule) -> Sized:
    inputs = tuple(_lay(spec) for spec in rule.inputs)
    return Sized(Way(inputs, tuple(_lay(spec) for spec in rule.outputs)), rule.extent)


def _lay(spec: InputSpec | OutputSpec) -> Lay | None:
    if isinstance(spec, Cut):
        return spec.dim, (1,) * spec.outer
    return R if spec == REPLICATE else P if spec == PARTIAL else None


def is_attention(call: OpCall) -> bool:
    return "scaled_dot_product" in call.base_name


# -- rules that only a planner needs: the parts of a dim need not lie one behind the other on a worker ---------------


def _part_rules(call: OpCall) -> list[Sized]:
    """Splitting a dim into parts, or joining parts to one: the whole dim is cut part by part."""
    name = call.base_name
    if name in ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"):
        dim = call.schema_argument("dim", 0) % max(len(call.inputs[0].shape), 1)
        sizes = [spec.shape[dim] for spec in call.outputs if spec is not None]
        return _parts_rule(dim, sizes, is_join=False)
    if name == "cat":
        dim = call.schema_argument("dim", 0) % max(len(call.inputs[0].shape), 1)
        if any(len(spec.shape) != len(call.inputs[0].shape) for spec in call.inputs):
            return []
        return _parts_rule(dim, [spec.shape[dim] for spec in call.inputs], is_join=True)
    if name in ("slice", "slice_backward"):
        return _slice_rules(call)
    return []


def _parts_rule(dim: int, sizes: Sequence[int], *, is_join: bool) -> list[Sized]:
    unit = math.gcd(*sizes)
    if len(sizes) < 2 or min(sizes) < 1:
        return []
    single: tuple[Lay, ...] = ((dim, PLAIN),) * len(sizes)
    whole: tuple[Lay, ...] = ((dim, tuple(size // unit for size in sizes)),)
    return [Sized(Way(single, whole) if is_join else Way(whole, single), unit)]


def _slice_rules(call: OpCall) -> list[Sized]:
    """``x[a:b]`` where the dim consists of equal parts as long as the slice, of which it is one."""
    small, large = call.outputs[0], call.inputs[0]
    if small is None or len(call.inputs) != 1:
        return []
    is_backward = call.base_name == "slice_backward"
    small, large = (large, small) if is_backward else (small, large)
    dim = call.schema_argument("dim", 0) % max(len(large.shape), 1)
    start, step = call.schema_argument("start", 0) or 0, call.schema_argument("step", 1)
    length, total = small.shape[dim], large.shape[dim]
    if step != 1 or length < 1 or total % length or start % length or length == total:
        return []
    part: tuple[Lay, ...] = ((dim, PLAIN),)
    whole: tuple[Lay, ...] = ((dim, (1,) * (total // length)),)
    return [Sized(Way(part, whole) if is_backward else Way(whole, part), length)]


def _group_rules(call: OpCall) -> list[Sized]:
    """Grouped queries: a key head and all query heads that read it are one block."""
    tensors = [spec for spec in (*call.inputs, *call.outputs) if spec is not None and len(spec.shape) == 4]
    heads = sorted({spec.shape[1] for spec in tensors} - {1})
    if len(heads) != 2 or heads[1] % heads[0]:
        return []

    def lay(spec: TensorSpec | None) -> Lay | None:
        if spec is None:
            return None
        return (1, PLAIN) if len(spec.shape) >= 3 and spec.shape[1] in heads else R

    return [Sized(Way(tuple(map(lay, call.inputs)), tuple(map(lay, call.outputs))), heads[0])]


def _query_rules(call: OpCall) -> list[Sized]:
    """Attention's queries (dim 2) are independent of each other; each reads all keys and values.

    Causal attention is included: workers take an early and a late share each ("zigzag"), so that work stays even. That
    order is a permutation of the rows outside the op, the same for every tensor cut along them.
    """
    # Forward: query, key, value[, mask]; backward: gradient, query, key, value, output, row sums[, ...].
    backward = call.base_name.endswith("_backward")
    queries = call.inputs[0].shape
    if len(queries) != 4 or len(call.inputs) < (6 if backward else 3) or queries[2] < 2:
        return []
    keys = (2, 3) if backward else (1, 2)
    cut: Lay = (2, PLAIN)

    def lay(spec: TensorSpec, is_key: bool) -> Lay:
        return cut if len(spec.shape) >= 3 and spec.shape[2] == queries[2] and not is_key else R

    inputs = tuple(lay(spec, place in keys) for place, spec in enumerate(call.inputs))
    outputs = tuple(
        None if spec is None else P if backward and place in (1, 2) else lay(spec, False)
        for place, spec in enumerate(call.outputs)
    )
    return [Sized(Way(inputs, outputs), queries[2])]


# -- ways for a number of workers ------------------------------------------------------------------------------------


def divides(extent: int, parts: Parts, size: int) -> bool:
    """Whether every part of ``extent`` blocks can be dealt out to ``size`` workers in equal shares."""
    unit, rest = divmod(extent, sum(parts))
    return rest == 0 and all(unit * part % size == 0 for part in parts)


def ways_of(rules: Iterable[tuple[Sized, Sequence[Parts]]], size: int) -> list[Way]:
    """The rules that ``size`` workers can follow in equal shares, each with the parts of which its dims may consist."""
    found: dict[Way, None] = {}
    for rule, parts in rules:
        own = rule.parts - {PLAIN}
        for composed in (PLAIN,) if rule.extent == 0 or own else parts:
            if rule.extent and not divides(rule.extent, composed, size):
                continue
            inputs = tuple(_composed(lay, composed) for lay in rule.way.inputs)
            found[Way(inputs, tuple(_composed(lay, composed) for lay in rule.way.outputs))] = None
    return list(found)


def _composed(lay: Lay | None, parts: Parts) -> Lay | None:
    return (lay[0], parts) if isinstance(lay, tuple) and lay[1] == PLAIN else lay


def local_shape(shape: Sequence[float], lay: Lay | None, size: int) -> tuple[float, ...]:
    """The share of one of ``size`` workers."""
    if not isinstance(lay, tuple):
        return tuple(shape)
    return tuple(extent / size if dim == lay[0] else extent for dim, extent in enumerate(shape))


def lay_text(lay: Lay) -> str:
    """``R``, ``P``, ``S(0)``, ``S(0 in 3 parts)`` or ``S(0 in parts 4:1:1)``."""
    if isinstance(lay, str):
        return lay
    dim, parts = lay
    if parts == PLAIN:
        return f"S({dim})"
    equal = len(set(parts)) == 1
    return f"S({dim} in {len(parts)} parts)" if equal else f"S({dim} in parts {':'.join(map(str, parts))})"


def conversion(source: Lay, target: Lay) -> str | None:
    """The exchange that turns ``source`` into ``target``: "" if it is local, None if there is none worth having."""
    if source in (target, R):
        return ""  # from whole: a slice, or one worker's copy and zeros elsewhere
    if source == P:
        return "all_reduce" if target == R else "reduce_scatter"
    if target == P:
        return None
    if target == R or (isinstance(target, tuple) and target[0] == source[0]):
        return "all_gather"
    return "all_to_all"


def whole_bytes(spec: TensorSpec) -> float:
    return float(math.prod(spec.shape) * spec.dtype.itemsize)


def is_view(op: Op) -> bool:
    target: Any = op.call.target
    return bool(getattr(target, "is_view", False)) or op.call.base_name in ("_unsafe_view", "detach", "alias")


def is_float(spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point
