"""The work of a training step along the order of its forward ops: times, bytes that cross cuts, weights, activations.

Every backward op is put at the position of a forward op, as lowering does by stage: the latest forward value that it
reads, or the parameter whose gradient it leads to where that is later, but not after any backward value that it reads
(gradients flow from later positions to earlier ones only). Ops of parameters, constants and factories alone are free:
every stage that reads one computes it itself. They count where the forward phase first reads them, and cross no cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from partita.graph.graph import Graph, InputKind, OpInfo, OutputKind, Phase
from partita.graph.homes import free_nodes, homes, least_places

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
    shared_bytes: Array  # [n]: of parameters that live before the cut and are read behind it as well
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
    parameters = {item.name: item.node for item in graph.inputs_of(InputKind.PARAMETER)}
    gradients = {o.node: parameters[o.target] for o in graph.outputs_of(OutputKind.GRADIENT) if o.target in parameters}
    free = free_nodes(graph.module.graph.nodes, {item.node: item for item in graph.inputs})
    position = _positions(graph, forward, free, names, gradients)
    count = len(names)
    there, back, saved = np.zeros(count + 1), np.zeros(count + 1), np.zeros(count)
    rows: set[str] = set()
    for node in nodes:
        if any(source.name in batch or source.name in rows for source in node.all_input_nodes):
            rows.add(node.name)
        here, num_bytes = position[node.name], tensor_bytes(node)
        if node.name in free or isinstance(node.meta.get("val"), tuple | list):
            continue  # of a tuple its `getitem`s are counted
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
    elements, num_bytes_of, shared = _parameters(graph, position, free, count)
    return Work(
        names=names,
        position=position,
        nodes=tuple(n for n in nodes if isinstance(n.meta.get("op"), OpInfo)),
        rows=frozenset(rows),
        forward=frozenset(forward),
        there_bytes=np.maximum(np.cumsum(there)[:count], 0.0),
        back_bytes=np.maximum(np.cumsum(back)[:count], 0.0),
        shared_bytes=shared,
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


def _positions(
    graph: Graph, forward: set[str], free: frozenset[str], names: tuple[str, ...], gradients: Mapping[str, str]
) -> dict[str, int]:
    """`gradients`: node of a parameter's gradient -> the parameter's node."""
    nodes = graph.nodes
    index = {name: place for place, name in enumerate(names)}
    position: dict[str, int] = {}
    last = 0
    for node in nodes:
        if node.name in forward:
            last = index.get(node.name, last)
            before = [position[s.name] for s in node.all_input_nodes if s.name in position]
            position[node.name] = index.get(node.name, max(before, default=last))
    home = homes(graph.module.graph.nodes, position, free)
    position.update({name: place for name, place in home.items() if name in position})
    least = least_places((node for node in nodes if node.name not in forward), gradients, home)
    for node in nodes:
        if node.name in forward:
            continue
        sources = [source.name for source in node.all_input_nodes]
        read = [position[name] for name in sources if name in forward and name not in free]
        read += [home[name] for name in sources if name in home]
        if read and node.name in least:
            read.append(least[node.name])
        later = [position[name] for name in sources if name in position and name not in forward | free]
        end = max(len(names) - 1, 0)
        here = min(max(read, default=end), min(later, default=end))
        position[node.name] = min(here, home.get(gradients.get(node.name, ""), here))
    return position


def _parameters(
    graph: Graph, position: Mapping[str, int], free: frozenset[str], count: int
) -> tuple[Array, Array, Array]:
    """(elements, bytes, bytes that are read behind each cut too) of the parameters."""
    elements, num_bytes, shared = np.zeros(count), np.zeros(count), np.zeros(count + 1)
    placeholders = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
    furthest: dict[str, int] = {}
    for node in reversed(graph.module.graph.nodes):
        if node.name in free:
            read = [furthest[user.name] for user in node.users if user.name in furthest]
            read += [position[user.name] for user in node.users if user.name in position and user.name not in free]
            if read:
                furthest[node.name] = max(read)
    for item in graph.inputs_of(InputKind.PARAMETER):
        places = [position[user.name] for user in placeholders[item.node].users if user.name in position]
        if places:
            size, home = int(np.prod(item.shape, dtype=np.int64)), min(places)
            elements[home] += size
            num_bytes[home] += size * item.dtype.itemsize
            last = max(furthest.get(item.node, home), home)
            shared[home + 1] += size * item.dtype.itemsize
            shared[last + 1] -= size * item.dtype.itemsize
    return elements, num_bytes, np.maximum(np.cumsum(shared)[:count], 0.0)
