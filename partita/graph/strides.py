"""Ops that address memory are replaced by ops that address entries.

`as_strided` tells what it reads by strides of the storage, so its result depends on how its input lies in memory. That
is a property of one run: what another worker sends, or a compiler writes, may lie otherwise. Every entry that such an
op reads has an index in the input, counted in the order in which the input lies in memory when it is captured:

    as_strided(x, size, stride, offset) = take(x', i),   i = as_strided(arange(x.numel()), size, stride, offset')

with x' the input with its dims in the order of falling strides and offset' counted from the first entry of x. The
indices are the same for all workers and depend on no data. `as_strided_scatter` puts entries there instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from partita.errors import CaptureError
from partita.graph.labels import Label

aten = torch.ops.aten

_READS = frozenset({aten.as_strided.default, aten.as_strided_copy.default})


def address_entries(graph: fx.Graph, labels: dict[fx.Node, Label]) -> None:
    """Replaces `as_strided`, `as_strided_copy` and `as_strided_scatter`, in place. Call it under the nodes' fake mode.

    Raises:
        CaptureError: an op reads memory between or outside of the entries of its input.
    """
    moved: set[fx.Node] = set()  # results that may lie otherwise in memory than they did
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if moved.intersection(node.all_input_nodes):
            _run_again(graph, node, labels)
            moved.add(node)
        if node.target in _READS or node.target is aten.as_strided_scatter.default:
            with graph.inserting_before(node):
                new = _addressed(graph, node, labels)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            moved.discard(node)
            moved.add(new)


def _run_again(graph: fx.Graph, node: fx.Node, labels: dict[fx.Node, Label]) -> None:
    """The node's result as it lies in memory now. A `view` that no longer is one becomes a copy."""
    try:
        node.meta["val"] = _result(node)
    except (RuntimeError, ValueError):
        if node.target is not aten.view.default:
            raise
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with graph.inserting_before(node):
            copied = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        copied.meta["val"] = _result(copied)
        if node in labels:
            labels[copied] = labels[node]
        node.args = (copied, *node.args[1:])
        node.meta["val"] = _result(node)


def _result(node: fx.Node) -> Any:
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda item: item.meta["val"])
    return node.target(*args, **kwargs)


def _addressed(graph: fx.Graph, node: fx.Node, labels: dict[fx.Node, Label]) -> fx.Node:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    size, stride, offset = arguments["size"], arguments["stride"], arguments.get("storage_offset")

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta["val"] = _result(made)
        if node in labels:
            labels[made] = labels[node]
        return made

    source: fx.Node = arguments["self"]
    value: torch.Tensor = source.meta["val"]
    start = 0 if offset is None else int(offset) - int(value.storage_offset())
    for dim, extent in enumerate(value.shape):
        if value.stride(dim) == 0 and extent > 1:  # expanded: one entry in memory
            source = add(aten.slice.Tensor, source, dim, 0, 1)
    entries: torch.Tensor = source.meta["val"]
    order = _memory_order(entries.stride())
    if 0 not in size:
        last = start + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        if not entries.permute(order).is_contiguous() or start < 0 or last >= entries.numel():
            raise _refusal(node, value, start, last, labels)
    source = add(aten.permute.default, source, order)
    places = add(aten.arange.default, entries.numel(), device=entries.device)
    indices = add(aten.as_strided.default, places, size, stride, start)
    if node.target in _READS:  # the result has its dims in memory as it had them
        told = _memory_order(stride)
        taken = add(aten.take.default, source, add(aten.permute.default, indices, told))
        return add(aten.permute.default, taken, _inverse(told))
    written = add(aten.put.default, source, indices, arguments["src"])
    return add(aten.permute.default, written, _inverse(order))


def _memory_order(stride: Sequence[int]) -> list[int]:
    """Dims from that with the largest stride to that with the least."""
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def _inverse(order: list[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


def _refusal(node: fx.Node, value: torch.Tensor, first: int, last: int, labels: dict[fx.Node, Label]) -> CaptureError:
    label = labels.get(node)
    return CaptureError(
        f"{node.target} must read nothing but entries of its input, but of an input of shape {tuple(value.shape)} and "
        f"strides {tuple(value.stride())} it reads the memory from place {first} to {last}. Use slices, `unfold` or "
        "indices.",
        op=str(node.target),
        source=(label.source if label is not None else "") or "unknown",
    )
