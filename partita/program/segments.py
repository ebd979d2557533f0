"""Segments: the nodes of one task, cut where a communication must come between.

Within a task, a node's *level* is the number of exchange rounds that must be over before it can run. The nodes of one
level form one segment; the exchanges of a level run together after it. Segments with equal code are one segment.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from partita.graph.graph import OpInfo
from partita.graph.randomness import is_random
from partita.graph.storages import graph_memory
from partita.graph.torch_adapter import module_of
from partita.program.instructions import Segment, TensorSpec
from partita.sharding.communication import COMMUNICATION_OPS
from partita.units import fingerprint


def is_exchange(node: fx.Node) -> bool:
    return node.target in COMMUNICATION_OPS


def spec_of(node: fx.Node) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(tuple(value.shape), value.dtype)


@dataclass(frozen=True)
class Level:
    """One segment (none if `segment` is empty) and what follows it: buckets of gradients that are released, by number,
    then exchanges.

    The segment's outputs are `outputs`, read by other segments, then `results` of the step; a node may be in both.
    """

    segment: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    results: tuple[str, ...]
    exchanges: tuple[fx.Node, ...]
    releases: tuple[int, ...] = ()


class SegmentStore:
    """All segments of a program set, by content."""

    def __init__(self) -> None:
        self.segments: dict[str, Segment] = {}

    def add(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[str, tuple[str, ...]]:
        """Makes the segment of `nodes` with `outputs`; returns its key and the names of its input nodes."""
        inside = set(nodes)
        inputs = list(dict.fromkeys(item for node in nodes for item in node.all_input_nodes if item not in inside))
        key = _content(inputs, nodes, outputs)
        if key not in self.segments:
            self.segments[key] = _segment(key, _graph(inputs, nodes, outputs), inputs, nodes, outputs)
        return key, tuple(node.name for node in inputs)


def _content(inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """Hash of ops, arguments, shapes, strides and dtypes with canonical names."""
    number = {node: f"%{index}" for index, node in enumerate((*inputs, *nodes))}
    parts: list[object] = []
    for node in inputs:
        value = node.meta["val"]
        parts.append(f"placeholder  ((), {{}}) {tuple(value.shape)}{value.stride()}{value.dtype}{value.device}")
    for node in nodes:
        arguments = fx.map_arg((node.args, dict(node.kwargs)), number.__getitem__)
        parts.append(f"{node.op} {node.target} {arguments} ")
    parts.append(f"output  {((tuple(number[node] for node in outputs),), {})} ")
    return fingerprint(parts)


def _graph(inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        mapping[node] = graph.placeholder(f"i{index}")
        mapping[node].meta = {"val": node.meta["val"]}
    for node in nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[node] for node in outputs))
    return graph


def _segment(
    key: str, graph: fx.Graph, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Segment:
    infos = [node.meta["op"] for node in nodes if isinstance(node.meta.get("op"), OpInfo)]
    return Segment(
        key=key,
        module=module_of(graph),
        input_specs=tuple(spec_of(node) for node in inputs),
        output_specs=tuple(spec_of(node) for node in outputs),
        flops=sum(info.flops for info in infos),
        num_bytes=sum(info.num_bytes for info in infos),
        memory=graph_memory(graph),
        random=any(is_random(node) for node in nodes),
    )


def levels_of(nodes: Sequence[fx.Node], least: Mapping[str, int]) -> dict[fx.Node, int]:
    """The level of every node of one task; `least` gives, by name, what exchanges wait for at least."""
    inside = set(nodes)
    level: dict[fx.Node, int] = {}
    for node in nodes:
        level[node] = max((level[i] + is_exchange(i) for i in node.all_input_nodes if i in inside), default=0)
        if is_exchange(node):
            level[node] = max(level[node], least.get(node.name, 0))
    return level


def common_levels(tasks: Sequence[Sequence[fx.Node]]) -> dict[str, int]:
    """Levels of the exchanges of one task of several workers, by name, such that all workers come to them in the same
    order, although some of them wait for less before (zeros in place of a summand need no waiting).

    The least fixed point: an exchange is at the highest level that any worker gives it.
    """
    found: dict[str, int] = {}
    while True:
        before = dict(found)
        for nodes in tasks:
            for node, level in levels_of(nodes, found).items():
                if is_exchange(node):
                    found[node.name] = max(found.get(node.name, 0), level)
        if found == before:
            return found


def cut_task(
    nodes: Sequence[fx.Node],
    is_needed_later: Mapping[str, bool],
    results: Iterable[fx.Node],
    store: SegmentStore,
    least: Mapping[str, int] | None = None,
    releases: Sequence[tuple[int, int]] = (),
) -> tuple[Level, ...]:
    """Cuts the nodes of one task (in order) into levels, and these after the nodes that release a bucket.

    `is_needed_later[name]` says that a node is read by another task or another stage; `results` are nodes of the task
    whose values are results of the step (gradients, loss, buffers): they come after the other outputs, in order.
    `least` are the levels that exchanges have on other workers (`common_levels`). `releases` tells of every bucket, in
    order, in which level and after how many of all nodes it is released.
    """
    inside = set(nodes)
    level = levels_of(nodes, least or {})
    results = [node for node in results if node in inside]
    made: list[Level] = []
    for here, released, exchanges in _pieces(nodes, level, releases, sort=bool(least)):
        own = set(here)
        outputs = [
            node
            for node in here
            if isinstance(node.meta.get("val"), torch.Tensor)
            and (is_needed_later.get(node.name) or any(user in inside and user not in own for user in node.users))
        ]
        final = [node for node in results if node in own]
        key, inputs = store.add(here, [*outputs, *final]) if here else ("", ())
        names = tuple(node.name for node in outputs), tuple(node.name for node in final)
        made.append(Level(key, inputs, *names, exchanges, released))
    return tuple(made)


def _pieces(
    nodes: Sequence[fx.Node], level: Mapping[fx.Node, int], releases: Sequence[tuple[int, int]], *, sort: bool
) -> Iterator[tuple[list[fx.Node], tuple[int, ...], tuple[fx.Node, ...]]]:
    """(Ops, buckets released after them, exchanges after these) of the levels, which releases cut further. Buckets of
    levels that the task has not come at its end."""
    position = {node: index + 1 for index, node in enumerate(nodes)}
    num_levels = max([*level.values(), *(bucket_level for bucket_level, _ in releases)], default=-1) + 1
    for index in range(num_levels):
        rest = [node for node in nodes if level[node] == index and not is_exchange(node)]
        waiting = [node for node in nodes if level[node] == index and is_exchange(node)]
        by_place: dict[int, list[int]] = {}
        for number, (bucket_level, after) in enumerate(releases):
            if bucket_level == index:
                by_place.setdefault(after, []).append(number)
        for after, numbers in by_place.items():
            piece = _with_items([node for node in rest if position[node] <= after], rest)
            yield piece, tuple(numbers), ()
            taken = set(piece)
            rest = [node for node in rest if node not in taken]
        if rest or waiting:
            yield rest, (), tuple(sorted(waiting, key=lambda node: node.name) if sort else waiting)


def _with_items(piece: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of `piece` and the items of their tuples: no segment gives a tuple to another."""
    found = dict.fromkeys(piece)
    for node in nodes:
        if node.target is operator.getitem and node.args[0] in found:
            found[node] = None
    return [node for node in nodes if node in found]
