"""Rules of views and of ops that move whole dims about: sizes in their arguments become local."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from partita.sharding.calls import OpCall, Slot
from partita.sharding.rules import PARTIAL, REPLICATE, Cut, Rule, Shape, register

aten = torch.ops.aten
Dims = Iterable[tuple[int, int]]  # (dim of the input, dim of the output) that correspond one to one


def _output(call: OpCall) -> tuple[int, ...]:
    output = call.outputs[0]
    assert output is not None
    return output.shape


def _linear(call: OpCall) -> Rule:
    """Moving entries about keeps sums."""
    outputs = tuple(None if spec is None else PARTIAL for spec in call.outputs)
    return Rule(tuple(PARTIAL for _ in call.inputs), outputs)


def _wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def matching_groups(left: tuple[int, ...], right: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of consecutive dims of ``left`` and ``right`` with equal products, in order.

    Example:
        >>> matching_groups((6, 5), (2, 3, 5))
        [([0], [0, 1]), ([1], [2])]
    """
    groups = []
    i = j = 0
    while i < len(left) and j < len(right):
        dims_left, dims_right = [i], [j]
        product_left, product_right = left[i], right[j]
        i, j = i + 1, j + 1
        while product_left != product_right:
            if product_left < product_right:
                product_left *= left[i]
                dims_left.append(i)
                i += 1
            else:
                product_right *= right[j]
                dims_right.append(j)
                j += 1
        groups.append((dims_left, dims_right))
    return groups


def _without_ones(shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
    dims = [dim for dim, extent in enumerate(shape) if extent != 1]
    return tuple(shape[dim] for dim in dims), dims


Extents = list[tuple[int, int]]  # (dim, extent)


def group_cuts(left: Extents, right: Extents) -> list[tuple[Cut, Cut, int]]:
    """All ways of cutting dims that are merged or split into one another: ``(cut left, cut right, number of blocks)``.

    Cutting a dim cuts each of the ``outer`` runs of entries that the dims before it in the group make. On the other
    side these runs must be whole parts of one dim; a block is what is whole on both sides.

    Example:
        >>> group_cuts([(0, 6), (1, 7)], [(0, 42)])
        [(Cut(dim=0, factor=1, outer=1), Cut(dim=0, factor=7, outer=1), 6),
         (Cut(dim=1, factor=1, outer=1), Cut(dim=0, factor=1, outer=6), 7)]
    """
    product = math.prod(extent for _, extent in left)
    found: dict[tuple[Cut, Cut, int], None] = {}
    for dim_left, extent_left, before_left in _with_prefix(left):
        for dim_right, extent_right, before_right in _with_prefix(right):
            runs = max(before_left, before_right)
            outer_left, outer_right = runs // before_left, runs // before_right
            if runs % before_left or runs % before_right or extent_left % outer_left or extent_right % outer_right:
                continue
            after_left = product // (before_left * extent_left)
            after_right = product // (before_right * extent_right)
            unit = math.lcm(after_left, after_right)
            blocks, rest = divmod(product // runs, unit)
            if rest or blocks < 2:
                continue
            cut_left = Cut(dim_left, unit // after_left, outer_left)
            cut_right = Cut(dim_right, unit // after_right, outer_right)
            found[(cut_left, cut_right, blocks)] = None
    return list(found)


def _with_prefix(dims: Extents) -> list[tuple[int, int, int]]:
    """``(dim, extent, product of the extents before it)``."""
    before, items = 1, []
    for dim, extent in dims:
        items.append((dim, extent, before))
        before *= extent
    return items


@register("view", "_unsafe_view", "reshape", "view_copy", "_reshape_alias", "_reshape_copy")
def view_rules(call: OpCall) -> list[Rule]:
    """Dims that are merged or split may be cut, in blocks that are whole on both sides."""
    left, right = call.inputs[0].shape, _output(call)
    source = call.outputs[0]
    if source is None or source.dtype is not call.inputs[0].dtype or 0 in left:
        return []  # `view.dtype` reinterprets bytes
    rules = [_linear(call)]
    left_extents, left_dims = _without_ones(left)
    right_extents, right_dims = _without_ones(right)
    for group_left, group_right in matching_groups(left_extents, right_extents):
        dims_left = [(left_dims[dim], left_extents[dim]) for dim in group_left]
        dims_right = [(right_dims[dim], right_extents[dim]) for dim in group_right]
        cuts = group_cuts(dims_left, dims_right)
        rules += [Rule((cut,), (other,), blocks, _with_shape) for cut, other, blocks in cuts]
    return rules


def _with_shape(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """The second argument is the shape of the output."""
    return call.target, (call.args[0], list(shapes[0] or ()), *call.args[2:]), call.kwargs


@register("expand", "expand_copy")
def expand_rules(call: OpCall) -> list[Rule]:
    """Dims that keep their extent may be cut, and new ones as well (the input is then whole)."""
    source, output = call.inputs[0].shape, _output(call)
    rules = []
    for dim, extent in enumerate(output):
        own = dim - (len(output) - len(source))
        kept = own >= 0 and source[own] == extent
        if extent > 1:
            rules.append(Rule((Cut(own) if kept else REPLICATE,), (Cut(dim),), extent, _with_shape))
    return [*rules, _linear(call)]


def _dim_rules(call: OpCall, dims: Dims, rewrite: Any = None) -> list[Rule]:
    """One rule per pair of corresponding dims; every tensor input and output has the same dims."""
    rules = [_linear(call)]
    for left, right in dims:
        extent = call.inputs[0].shape[left]
        if extent > 1:
            inputs = tuple(Cut(left) for _ in call.inputs)
            outputs = tuple(None if spec is None else Cut(right) for spec in call.outputs)
            rules.append(Rule(inputs, outputs, extent, rewrite))
    return rules


@register("permute", "permute_copy", "transpose", "t", "numpy_T", "movedim", "transpose_copy", "t_copy")
def permute_rules(call: OpCall) -> list[Rule]:
    rank = len(call.inputs[0].shape)
    if rank == 0:
        return []
    if call.base_name.startswith("permute"):
        order = [_wrap(dim, rank) for dim in call.args[1]]
    elif call.base_name.startswith("transpose"):
        order = list(range(rank))
        first, second = (_wrap(dim, rank) for dim in call.args[1:3])
        order[first], order[second] = second, first
    elif call.base_name in ("t", "t_copy"):
        order = list(reversed(range(rank)))
    else:
        return []
    return _dim_rules(call, ((source, dim) for dim, source in enumerate(order)))


@register(
    "view_as_real", "view_as_complex", "view_as_real_copy", "view_as_complex_copy", "_conj", "_conj_physical",
    "_conj_copy", "_neg_view",
)  # fmt: skip
def complex_rules(call: OpCall) -> list[Rule]:
    """Complex numbers as pairs of real ones in a new last dim, and back: the other dims stay where they are."""
    return _dim_rules(call, ((dim, dim) for dim in range(min(len(call.inputs[0].shape), len(_output(call))))))


@register("squeeze", "unsqueeze", "squeeze_copy", "unsqueeze_copy")
def squeeze_rules(call: OpCall) -> list[Rule]:
    """Dims of extent 1 come and go; the others keep their order."""
    if call.base_name.startswith("unsqueeze"):
        rank = len(call.inputs[0].shape)
        new = _wrap(call.args[1], rank + 1)
        return _dim_rules(call, ((dim, dim + (dim >= new)) for dim in range(rank)))
    _, left = _without_ones(call.inputs[0].shape)
    _, right = _without_ones(_output(call))
    # `squeeze()` without dims would also drop a cut dim of local extent 1: name the dims of extent 1 instead.
    return _dim_rules(call, zip(left, right, strict=True), _squeeze_named)


def _squeeze_named(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    shape = call.inputs[0].shape
    if len(call.args) > 1:
        given = call.args[1] if isinstance(call.args[1], (list, tuple)) else [call.args[1]]
        dims = [_wrap(dim, len(shape)) for dim in given]
    else:
        dims = list(range(len(shape)))
    return aten.squeeze.dims, (call.args[0], [dim for dim in dims if shape[dim] == 1]), {}


@register("select", "select_copy", "unbind", "unbind_copy")
def select_rules(call: OpCall) -> list[Rule]:
    """All dims but the one that is taken apart."""
    rank = len(call.inputs[0].shape)
    taken = _wrap(call.argument(1, "dim", 0), rank)
    return _dim_rules(call, ((dim, dim - (dim > taken)) for dim in range(rank) if dim != taken))


@register(
    "slice", "slice_copy", "split", "split_with_sizes", "narrow", "chunk", "unsafe_split", "unsafe_split_with_sizes",
    "unsafe_chunk", "split_copy", "split_with_sizes_copy",
)  # fmt: skip
def slice_rules(call: OpCall) -> list[Rule]:
    """All dims but the one that is sliced; that one too if nothing of it is left out."""
    rank = len(call.inputs[0].shape)
    is_slice = call.base_name.startswith("slice")
    taken = _wrap(call.argument(1 if is_slice else 2, "dim", 0), rank)
    rules = _dim_rules(call, ((dim, dim) for dim in range(rank) if dim != taken))
    extent = call.inputs[0].shape[taken]
    if is_slice and _output(call)[taken] == extent and extent > 1:
        rules.append(Rule((Cut(taken),), (Cut(taken),), extent, _keep_all))
    return rules


def _keep_all(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    return aten.alias.default, (call.args[0],), {}


@register("slice_backward", "select_backward")
def slice_backward_rules(call: OpCall) -> list[Rule]:
    """The dims that were not sliced; the second argument is the whole shape."""
    rank = len(_output(call))
    taken = _wrap(call.args[2], rank)
    drops = call.base_name == "select_backward"
    pairs = ((dim - (drops and dim > taken), dim) for dim in range(rank) if dim != taken)
    return _dim_rules(call, pairs, _with_shape)


@register("slice_scatter", "select_scatter")
def slice_scatter_rules(call: OpCall) -> list[Rule]:
    """``slice_scatter(whole, part, dim, ...)``: all other dims."""
    rank = len(_output(call))
    taken = _wrap(call.argument(2, "dim", 0), rank)
    drops = call.base_name == "select_scatter"
    rules = [_linear(call)]
    for dim in range(rank):
        if dim != taken and _output(call)[dim] > 1:
            part = Cut(dim - (drops and dim > taken))
            rules.append(Rule((Cut(dim), part), (Cut(dim),), _output(call)[dim]))
    return rules


@register("cat", "stack")
def cat_rules(call: OpCall) -> list[Rule]:
    """All dims but the one along which the inputs are joined."""
    rank = len(_output(call))
    joined = _wrap(call.argument(1, "dim", 0), rank)
    if call.base_name == "stack":
        return _dim_rules(call, ((dim - (dim > joined), dim) for dim in range(rank) if dim != joined))
    if any(len(spec.shape) != rank for spec in call.inputs):
        return [_linear(call)]  # `cat` ignores empty one-dimensional tensors
    return _dim_rules(call, ((dim, dim) for dim in range(rank) if dim != joined))


@register("unfold", "unfold_copy")
def unfold_rules(call: OpCall) -> list[Rule]:
    """``unfold(input, dim, size, step)`` appends a dim with the windows' entries: all dims but the unfolded one."""
    rank = len(call.inputs[0].shape)
    taken = _wrap(call.argument(1, "dimension", 0), rank)
    return _dim_rules(call, ((dim, dim) for dim in range(rank) if dim != taken))


@register("diagonal", "as_strided", "diagonal_copy", "as_strided_copy", "as_strided_scatter")
def strided_rules(call: OpCall) -> list[Rule]:
    """Strides refer to the whole storage, so only the whole tensor will do (`diagonal` keeps its other dims)."""
    if not call.base_name.startswith("diagonal"):
        return []
    rank = len(call.inputs[0].shape)
    first, second = (
        _wrap(call.argument(2, "dim1", 0), rank),
        _wrap(call.argument(3, "dim2", 1), rank),
    )
    kept = [dim for dim in range(rank) if dim not in (first, second)]
    return _dim_rules(call, ((dim, place) for place, dim in enumerate(kept)))


@register("constant_pad_nd")
def pad_rules(call: OpCall) -> list[Rule]:
    """The dims that are not padded; padding with 0 is linear."""
    rank = len(call.inputs[0].shape)
    padded = {rank - 1 - place // 2 for place, amount in enumerate(call.args[1]) if amount != 0}
    rules = _dim_rules(call, ((dim, dim) for dim in range(rank) if dim not in padded))
    return rules if call.argument(2, "value", 0) == 0 else rules[1:]


@register("flip", "roll", "repeat", "tril", "triu", "cumsum")
def moving_rules(call: OpCall) -> list[Rule]:
    """Entries move (or add up) within some dims; the others may be cut."""
    rank = len(call.inputs[0].shape)
    fixed: set[int]
    offset = 0
    if call.base_name == "flip":
        fixed = {_wrap(dim, rank) for dim in call.args[1]}
    elif call.base_name == "roll":
        dims = call.argument(2, "dims", [])
        given = dims if isinstance(dims, (list, tuple)) else [dims]
        fixed = {_wrap(dim, rank) for dim in given} if given else set(range(rank))
    elif call.base_name == "repeat":
        repeats = call.args[1]
        offset = len(repeats) - rank
        fixed = {dim for dim in range(rank) if repeats[dim + offset] != 1}
    elif call.base_name == "cumsum":
        fixed = {_wrap(call.args[1], rank)}
    else:
        fixed = {rank - 2, rank - 1}
    return _dim_rules(call, ((dim, dim + offset) for dim in range(rank) if dim not in fixed))


def tensor_positions(items: Iterable[Any]) -> list[int | None]:
    """Slot number of every item of an argument list, None where an item is no tensor."""
    return [item.index if isinstance(item, Slot) else None for item in items]
