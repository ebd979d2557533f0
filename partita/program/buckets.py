"""Buckets: gradients that are reduced and applied while the backward phase goes on, so that not all live at once.

A bucket is *ready* once the loss is there, its gradients are made, and no op is left that reads its parameters or a
view of them: updates write the one copy of the weights in place. Buckets follow the order in which gradients become
ready, and close at a size at which cutting a segment costs nothing beside reducing and updating so many bytes.

All workers release a bucket at the same place among their exchanges (*level*, see `partita.program.segments`): the
latest level at which it is ready on any of them. Within a level every worker does so after the op that makes it ready
there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from partita.graph.graph import Graph, InputKind, OutputKind
from partita.graph.storages import Storages
from partita.program.segments import is_exchange, levels_of

BUCKET_BYTES = 16 * 2**20
MOST_BUCKETS = 16

Place = tuple[int, int]  # level, and position among the ops; an exchange of a level follows all of its ops


@dataclass(frozen=True)
class Bucket:
    """Gradients of `parameters`, released in level `level`. `after[i]`: with local graph i, how many of the nodes of
    its task come before that."""

    parameters: frozenset[str]
    level: int
    after: tuple[int, ...]


def buckets_of(
    graph: Graph,
    tasks: Sequence[Sequence[fx.Node]],
    results: Sequence[Sequence[fx.Node]],
    least: Mapping[str, int],
    *,
    bucket_bytes: int = 0,
) -> tuple[Bucket, ...]:
    """The buckets of a step whose local graphs each run as one task, in the order of release. Gradients that are in
    none of them are left to the end of the step.

    Args:
        tasks: by local graph, its ops in order.
        results: by local graph, the nodes of the step's outputs.
        least: the common levels of exchanges, by name.
        bucket_bytes: the size at which a bucket closes; 0: as said above.
    """
    found = [_ready(graph, nodes, outputs, least) for nodes, outputs in zip(tasks, results, strict=True)]
    num_bytes = {
        item.name: math.prod(item.shape) * item.dtype.itemsize for item in graph.inputs_of(InputKind.PARAMETER)
    }
    names = [name for name in found[0] if all(name in ready for ready in found)]
    limit = bucket_bytes or max(BUCKET_BYTES, sum(num_bytes[name] for name in names) // MOST_BUCKETS)
    latest: list[Place] = [(0, 0)] * len(tasks)
    buckets: list[Bucket] = []
    members: set[str] = set()
    for name in sorted(names, key=lambda name: found[0][name]):
        members.add(name)
        latest = [max(place, ready[name]) for place, ready in zip(latest, found, strict=True)]
        if sum(num_bytes[member] for member in members) >= limit:
            level = max(place[0] for place in latest)
            after = tuple(place[1] if place[0] == level else 0 for place in latest)
            buckets.append(Bucket(frozenset(members), level, after))
            latest, members = [(level, position) for position in after], set()
    return tuple(buckets)


def _ready(
    graph: Graph, nodes: Sequence[fx.Node], results: Sequence[fx.Node], least: Mapping[str, int]
) -> dict[str, Place]:
    """By parameter, where its gradient may be applied: after so many of the task's nodes, in that level."""
    level = levels_of(nodes, least)
    position = {node: index + 1 for index, node in enumerate(nodes)}

    def done(node: fx.Node) -> Place:
        if node not in position:
            return (0, 0)
        return (level[node] + 1, 0) if is_exchange(node) else (level[node], position[node])

    outputs = list(zip(graph.outputs, results, strict=True))
    loss = max(done(node) for output, node in outputs if output.kind is OutputKind.LOSS)
    last_read = _last_reads(graph, nodes, set(results), done)
    ready: dict[str, Place] = {}
    twice = {output.target for output, _ in outputs if output.kind is not OutputKind.GRADIENT}
    for output, node in outputs:
        if output.kind is OutputKind.GRADIENT and output.target not in twice and output.target in last_read:
            read = last_read[output.target]
            if read is not None:
                ready[output.target] = max(loss, done(node), read)
    return ready


def _last_reads(
    graph: Graph, nodes: Sequence[fx.Node], results: set[fx.Node], done: Callable[[fx.Node], Place]
) -> dict[str, Place | None]:
    """By parameter, where the last op is over that reads it or a view of it; None where a result of the step shows its
    storage."""
    owner = nodes[0].graph
    storages = Storages(owner)
    name_of = {item.node: item.name for item in graph.inputs_of(InputKind.PARAMETER)}
    shown: dict[int, str] = {}
    found: dict[str, Place | None] = {}
    for node in owner.nodes:
        if node.op == "placeholder" and node.name in name_of:
            found[name_of[node.name]] = (0, 0)
            for number in storages.of(node):
                shown[number] = name_of[node.name]
    for node in owner.nodes:
        if node.op == "output":
            continue
        for number in storages.of(node):
            name = shown.get(number)
            last = found.get(name) if name is not None else None
            if name is None or last is None:
                continue
            reads = [done(user) for user in node.users if user.op != "output"]
            found[name] = None if node in results else max([last, *reads])
    return found
