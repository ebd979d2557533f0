"""Halo exchanges by the four plain exchanges, for where no one can send slices to neighbours.

* ``halo_exchange`` = all-gather, then slice the window;
* ``halo_sum`` = pad the window with zeros to the whole extent, then reduce-scatter.

Right, and wasteful: the whole value travels where its halos would do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from partita.graph.torch_adapter import module_of
from partita.sharding import communication

aten = torch.ops.aten


def with_plain_exchanges(module: fx.GraphModule, coordinate: int) -> fx.GraphModule:
    """The local graph of worker ``coordinate`` without halo exchanges; ``module`` itself if it has none.

    All workers' graphs have to be treated alike.
    """
    halos = (communication.halo_exchange, communication.halo_sum)
    if not any(node.target in halos for node in module.graph.nodes):
        return module
    graph = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.target is communication.halo_exchange:
            moved[node] = _gather_and_slice(graph, node, moved[node.args[0]], coordinate)
        elif node.target is communication.halo_sum:
            moved[node] = _pad_and_reduce(graph, node, moved[node.args[0]], coordinate)
        else:
            moved[node] = graph.node_copy(node, moved.__getitem__)
    return module_of(graph)


def _gather_and_slice(graph: fx.Graph, node: fx.Node, source: fx.Node, coordinate: int) -> fx.Node:
    options: dict[str, Any] = dict(node.kwargs)
    starts, ends = options.pop("starts"), options.pop("ends")
    whole = _whole_shape(node)
    gathered = graph.create_node("call_function", communication.all_gather, (source,), options, f"{node.name}_whole")
    gathered.meta = _meta(node, whole)
    window = (gathered, options["dim"], starts[coordinate], ends[coordinate])
    sliced = graph.create_node("call_function", aten.slice.Tensor, window, {}, node.name)
    sliced.meta = dict(node.meta)
    return sliced


def _pad_and_reduce(graph: fx.Graph, node: fx.Node, source: fx.Node, coordinate: int) -> fx.Node:
    options: dict[str, Any] = dict(node.kwargs)
    starts, ends = options.pop("starts"), options.pop("ends")
    whole = _whole_shape(node)
    after = sum(options["sizes"]) - ends[coordinate]
    pads = [0, 0] * (len(whole) - 1 - options["dim"]) + [starts[coordinate], after]
    padded = graph.create_node("call_function", aten.constant_pad_nd.default, (source, pads, 0), {}, f"{node.name}_pad")
    padded.meta = _meta(node, whole)
    reduced = graph.create_node("call_function", communication.reduce_scatter, (padded,), options, node.name)
    reduced.meta = dict(node.meta)
    return reduced


def _whole_shape(node: fx.Node) -> tuple[int, ...]:
    options: dict[str, Any] = dict(node.kwargs)
    shape = list(node.meta["val"].shape)
    shape[options["dim"]] = sum(options["sizes"])
    return tuple(shape)


def _meta(node: fx.Node, shape: tuple[int, ...]) -> dict[str, Any]:
    value = node.meta["val"]
    mode = detect_fake_mode([value])
    assert mode is not None
    with mode:
        return {**node.meta, "val": torch.empty(shape, dtype=value.dtype, device=value.device)}
