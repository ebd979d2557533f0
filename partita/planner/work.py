"""The work of a training step along the order of its forward ops: times, bytes that cross cuts, weights, activations.

Every backward op is put at the position of a forward op, as lowering does by stage: the latest forward value that it
reads, but not after any backward value that it reads (gradients flow from later positions to earlier ones only).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from partita.graph.graph import Graph, InputKind, OpInfo, Phase

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class PhaseTimes:
    """Seconds of each position in the forward and in the backward phase: `fixed` whatever the rows, `row` for the rows
    of the whole batch."""

    forward_fixed_s: Array
    forward_row_s: Array
    backward_fixed_s: Array
    backward_row_s: Array


@dataclass(frozen=True, kw_only=True)
class Work:
    """The step as positions 0 .. n-1. `rows` marks ops whose work grows with the rows of the batch (they depend on
    it)."""

    names: tuple[str, ...]  # of the forward op at each position
    position: dict[str, int]  # of every op node
    nodes: tuple[fx.Node, ...]  # all ops, in order
    rows: frozenset[str]
    forward: frozenset[str]  # op nodes of the forward phase
    there_bytes: Array  # [n]: whole batch, of values that cross the cut before op i to later positions
    back_bytes: Array  # [n]: the same to earlier positions
    saved_bytes: Array  # [n]: whole batch, forward values kept for the backward phase
    parameter_elements: Array  # [n]: of the parameters first read at op i
    parameter_bytes: Array

    def times(self, op_time_s: Callable[[fx.Node], float]) -> PhaseTimes:
        """The times of all positions. Of an op that works on rows, all but the smallest time of any op grows with
        them."""
        wholes = [op_time_s(node) for node in self.nodes]
        floor_s = min((time_s for time_s in wholes if time_s > 0), default=0.0)
        count = len(self.names)
        fixed, row = np.zeros((2, count)), np.zeros((2, count))
        for node, whole in zip(self.nodes, wholes, strict=True):
            place = int(node.name not in self.forward), self.position[node.name]
            own = min(whole, floor_s) if node.name in self.rows else whole
            fixed[place] += own
            row[place] += whole - own
        return PhaseTimes(
            forward_fixed_s=fixed[0], forward_row_s=row[0], backward_fixed_s=fixed[1], backward_row_s=row[1]
        )


def tensor_bytes(node: fx.Node) -> int:
    """Bytes of a node's tensor (of all, for a tuple); 0 for numbers."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, tuple | list) else (value,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def measure_work(graph: Graph) -> Work:
    """Positions, crossings, saved values and parameters of `graph`."""
    nodes = graph.nodes
    forward = {node.name for node in nodes if _phase(node) is Phase.FORWARD}
    names = tuple(node.name for node in nodes if node.name in forward and isinstance(node.meta.get("op"), OpInfo))
    batch = {item.node for item in graph.inputs_of(InputKind.BATCH)}
    position = _positions(nodes, forward, names, batch)
    count = len(names)
    there, back, saved = np.zeros(count + 1), np.zeros(count + 1), np.zeros(count)
    rows: set[str] = set()
    for node in nodes:
        if any(source.name in batch or source.name in rows for source in node.all_input_nodes):
            rows.add(node.name)
        here, num_bytes = position[node.name], tensor_bytes(node)
        if isinstance(node.meta.get("val"), tuple | list):
            continue  # its `getitem`s are counted
        users = [user for user in node.users if user.name in position]
        places = [position[user.name] for user in users]
        if places and max(places) > here:
            there[here + 1] += num_bytes
            there[min(max(places) + 1, count)] -= num_bytes
        if places and min(places) < here:
            back[min(places) + 1] += num_bytes
            back[here + 1] -= num_bytes
        if node.name in forward and not _is_view(node) and any(user.name not in forward for user in users):
            saved[here] += num_bytes
    elements, num_bytes_of = _parameters(graph, position, count)
    return Work(
        names=names,
        position=position,
        nodes=tuple(n for n in nodes if isinstance(n.meta.get("op"), OpInfo)),
        rows=frozenset(rows),
        forward=frozenset(forward),
        there_bytes=np.maximum(np.cumsum(there)[:count], 0.0),
        back_bytes=np.maximum(np.cumsum(back)[:count], 0.0),
        saved_bytes=saved,
        parameter_elements=elements,
        parameter_bytes=num_bytes_of,
    )


def _phase(node: fx.Node) -> Phase:
    info = node.meta.get("op")
    if isinstance(info, OpInfo):
        return info.phase
    for source in node.all_input_nodes:  # a `getitem` belongs to the op it takes from
        if source.op == "call_function":
            return _phase(source)
    return Phase.FORWARD


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _positions(nodes: list[fx.Node], forward: set[str], names: tuple[str, ...], batch: set[str]) -> dict[str, int]:
    index = {name: place for place, name in enumerate(names)}
    position: dict[str, int] = {}
    weights: dict[str, int] = {}  # a weight lives where the forward phase first reads it
    last = 0
    for node in nodes:
        if node.name in forward:
            last = index.get(node.name, last)
            for source in node.all_input_nodes:
                if source.op == "placeholder" and source.name not in batch:
                    weights.setdefault(source.name, last)
            sources = [position[s.name] for s in node.all_input_nodes if s.name in position]
            position[node.name] = index.get(node.name, max(sources, default=last))
            continue
        read = [position[s.name] for s in node.all_input_nodes if s.name in forward]
        read += [weights[s.name] for s in node.all_input_nodes if s.name in weights]
        gradients = [position[s.name] for s in node.all_input_nodes if s.name in position and s.name not in forward]
        end = max(len(names) - 1, 0)
        position[node.name] = min(max(read, default=end), min(gradients, default=end))
    return position


def _parameters(graph: Graph, position: dict[str, int], count: int) -> tuple[Array, Array]:
    elements, num_bytes = np.zeros(count), np.zeros(count)
    placeholders = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
    for item in graph.inputs_of(InputKind.PARAMETER):
        places = [position[user.name] for user in placeholders[item.node].users if user.name in position]
        if places:
            size = int(np.prod(item.shape, dtype=np.int64))
            elements[min(places)] += size
            num_bytes[min(places)] += size * item.dtype.itemsize
    return elements, num_bytes
