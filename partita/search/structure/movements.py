"""Equations of the ops that move entries: views, joins, cuts, repetitions, reads by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from partita.search.structure.tracing import Call, Dims, equal, equation, hint_of, sizes_of, symbol_of, width_of
from partita.search.structure.widths import Extent, Width, equate, factored, fix, parted, product, size_of, total


@equation("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def reshaped(call: Call) -> Dims:
    result = call.result()
    found = factored(product(call.dims("self")), sizes_of(result))
    for extent, size in zip(found, result.shape, strict=True):
        if isinstance(extent, Width) and extent.symbol is None:
            extent.symbol = symbol_of(size)
    return [extent if size_of(extent) != 1 else width_of(size)
            for extent, size in zip(found, result.shape, strict=True)]  # fmt: skip


def _moved(call: Call, order: list[int]) -> Dims:
    dims = call.dims("self")
    return [dims[place] for place in order]


@equation("permute")
def permuted(call: Call) -> Dims:
    return _moved(call, list(call.values["dims"]))


@equation("transpose", "swapaxes", "swapdims")
def transposed(call: Call) -> Dims:
    names = [name for name in call.values if name.startswith(("dim", "axis"))]
    order = list(range(len(call.dims("self"))))
    a, b = (call.values[name] for name in names)
    order[a], order[b] = order[b], order[a]
    return _moved(call, order)


@equation("t", "mT", "adjoint", "numpy_T", "mH")
def turned(call: Call) -> Dims:
    order = list(range(len(call.dims("self"))))
    return _moved(call, [*order[:-2], *order[-2:][::-1]])


@equation("movedim", "moveaxis")
def dims_moved(call: Call) -> Dims:
    num = len(call.dims("self"))
    sources, targets = ([place % num for place in _ints(call.values[name])] for name in ("source", "destination"))
    rest = iter(place for place in range(num) if place not in sources)
    return _moved(call, [sources[targets.index(place)] if place in targets else next(rest) for place in range(num)])


def _ints(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


@equation("unsqueeze")
def unsqueezed(call: Call) -> Dims:
    dims = call.dims("self")
    dims.insert(call.values["dim"] % (len(dims) + 1), width_of(1))
    return dims


@equation("squeeze")
def squeezed(call: Call) -> Dims:
    dims = call.dims("self")
    wanted = {place % len(dims) for place in _ints(call.values["dim"])} if call.has("dim") else set(range(len(dims)))
    return [extent for place, extent in enumerate(dims) if place not in wanted or size_of(extent) != 1]


@equation("expand", "expand_as", "broadcast_to")
def expanded(call: Call) -> Dims:
    found = call.fresh()
    dims = call.dims("self")
    for place, extent in enumerate(dims, start=len(found) - len(dims)):
        if size_of(extent) == size_of(found[place]):
            found[place] = extent
    if call.name == "expand_as":
        equal_where_same(found, call.dims("other"))
    return found


def equal_where_same(a: Dims, b: Dims) -> None:
    for x, y in zip(a[::-1], b[::-1], strict=False):
        if size_of(x) == size_of(y):
            equate(x, y)


@equation("repeat", "tile")
def repeated(call: Call) -> Dims | None:
    result = sizes_of(call.result())
    dims = [*(width_of(1) for _ in range(len(result) - len(call.dims("self")))), *call.dims("self")]
    times = [size // size_of(extent) for size, extent in zip(result, dims, strict=True)]
    return [extent if count == 1 else product([_count(count), extent])
            for count, extent in zip(times, dims, strict=True)]  # fmt: skip


def _count(size: int) -> Width:
    return Width(size, fixed="it counts repetitions")


@equation("repeat_interleave")
def interleaved(call: Call) -> Dims | None:
    if not isinstance(call.values.get("repeats"), int) or not call.has("dim"):
        return None
    dims = call.dims("self")
    place = call.values["dim"]
    dims[place] = product([dims[place], _count(call.values["repeats"])])
    return dims


# -- joining and cutting ----------------------------------------------------------------------------------------------


@equation("cat", "concat", "concatenate", "hstack", "vstack")
def joined(call: Call) -> Dims:
    tensors = [call.dims_of(node) for node in call.values["tensors"] if sizes_of(node.meta["val"]) != [0]]
    found = tensors[0]
    place = {"hstack": min(1, len(found) - 1), "vstack": 0}.get(call.name, call.values.get("dim", 0)) % len(found)
    for other in tensors[1:]:
        for at, (x, y) in enumerate(zip(found, other, strict=True)):
            if at != place:
                equate(x, y)
    found[place] = total([dims[place] for dims in tensors])
    return found


@equation("stack")
def stacked(call: Call) -> Dims:
    tensors = [call.dims_of(node) for node in call.values["tensors"]]
    for other in tensors[1:]:
        equal(tensors[0], other)
    found = tensors[0]
    found.insert(call.values.get("dim", 0) % (len(found) + 1), width_of(len(tensors), "it counts stacked tensors"))
    return found


@equation("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy")
def cut(call: Call) -> list[Dims]:
    dims, place = call.dims("self"), call.values.get("dim", 0)
    sizes = [sizes_of(value)[place] for value in call.node.meta["val"]]
    found = []
    for part in parted(dims[place], sizes):
        dims[place] = part
        found.append(list(dims))
    return found


@equation("unbind")
def unbound(call: Call) -> list[Dims]:
    dims = call.dims("self")
    removed = dims.pop(call.values.get("dim", 0))
    fix(removed, "unbind counts its units")
    return [list(dims) for _ in call.node.meta["val"]]


@equation("select")
def selected(call: Call) -> Dims:
    dims = call.dims("self")
    fix(dims.pop(call.values["dim"]), "select reads one of its units")
    return dims


@equation("slice", "narrow")
def sliced(call: Call) -> Dims:
    dims, place = call.dims("self"), call.values.get("dim", 0)
    size, new = size_of(dims[place]), sizes_of(call.result())[place]
    if size == new and call.values.get("step", 1) == 1:
        return dims
    start = call.values.get("start") or 0
    is_open = isinstance(start, fx.Node) or symbol_of(call.result().shape[place]) is not None
    if is_open or call.values.get("step", 1) != 1:
        fix(dims[place], f"{call.name} reads some of its units")
        dims[place] = width_of(call.result().shape[place], f"{call.name} makes it")
        return dims
    start = start + size if start < 0 else min(start, size)
    sizes = [part for part in (start, new, size - start - new) if part]
    dims[place] = parted(dims[place], sizes)[1 if start else 0]
    return dims


@equation("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def padded(call: Call) -> Dims:
    return kept_where_same(call, "self", "pad adds to it")


def kept_where_same(call: Call, argument: str, why: str) -> Dims:
    """The same dims but for those whose sizes differ, which are fixed."""
    found = []
    for extent, size in zip(call.dims(argument), call.result().shape, strict=True):
        same = hint_of(size) == size_of(extent)
        if not same:
            fix(extent, why)
        found.append(extent if same else width_of(size, why))
    return found


# -- reading by index -------------------------------------------------------------------------------------------------


@equation("flip", "roll", "sort", "argsort")
def reordered(call: Call) -> Any:
    dims = call.dims("self")
    places = call.values.get("dims", call.values.get("dim", -1))
    for place in _ints(places) or range(len(dims)):
        fix(dims[place], f"{call.name} moves its units")
    return [list(dims), list(dims)] if call.name == "sort" else dims


@equation("topk", "kthvalue")
def ranked(call: Call) -> list[Dims]:
    dims, place = call.dims("self"), call.values.get("dim", -1)
    fix(dims[place], f"{call.name} numbers its units")
    dims[place] = width_of(call.result(0).shape[place], f"{call.name} makes it")
    return [dims, list(dims)]


@equation("embedding")
def embedded(call: Call) -> Dims:
    vocabulary, features = call.dims("weight")
    fix(vocabulary, "embedding reads it by index")
    if call.values["weight"] in call.trace.names:
        call.trace.made.append((call.trace.names[call.values["weight"]], 1))
    return [*call.dims("indices"), features]


@equation("index_select")
def rows_read(call: Call) -> Dims:
    dims, place = call.dims("self"), call.values["dim"]
    fix(dims[place], "index_select reads it by index")
    dims[place] = call.dims("index")[0]
    return dims


@equation("gather")
def gathered(call: Call) -> Dims:
    dims, index, place = call.dims("self"), call.dims("index"), call.values["dim"]
    fix(dims[place], "gather reads it by index")
    for at, (x, y) in enumerate(zip(dims, index, strict=True)):
        if at == place % len(dims):
            continue
        if size_of(x) == size_of(y):
            equate(x, y)
        else:
            fix(x, "gather reads some of its units")
    return index


@equation("index")
def indexed(call: Call) -> Dims | None:
    """By tensors, which stand side by side (else the dims of the result lie elsewhere, and all are fixed)."""
    dims, given = call.dims("self"), list(call.values["indices"])
    given += [None] * (len(dims) - len(given))
    places = [place for place, index in enumerate(given) if index is not None]
    masks = any(given[place].meta["val"].dtype == torch.bool for place in places)
    if masks or places != list(range(places[0], places[-1] + 1)):
        return None
    for place in places:
        fix(dims[place], "it is read by index")
    num = len(call.result().shape) - len(dims) + len(places)
    read: list[Extent] = list(call.fresh(fixed="it is read by index"))[places[0] : places[0] + num]
    return [*dims[: places[0]], *read, *dims[places[-1] + 1 :]]
