"""Bytes of weights, batch and optimizer state, and of plain PyTorch."""

from __future__ import annotations

import math

from partita.graph.graph import Graph, Input, InputKind, OutputKind
from partita.graph.storages import graph_memory

# State tensors of torch.optim's optimizers, in float32 elements per parameter element (default options).
STATE_ELEMENTS = {
    "SGD": 0,
    "Adam": 2,
    "AdamW": 2,
    "NAdam": 2,
    "RAdam": 2,
    "Adamax": 2,
    "Adadelta": 2,
    "Adagrad": 1,
    "RMSprop": 1,
    "Rprop": 2,
    "ASGD": 1,
    "Muon": 1,
}
# Elements that an update reads and writes per parameter element: gradient and parameter read, parameter written,
# state both ways.
_BASE_TRAFFIC = 3


def update_traffic_bytes(optimizer: str) -> int:
    """Bytes that one float32 element's update moves. An unknown optimizer counts as one with two states (like Adam)."""
    return 4 * (_BASE_TRAFFIC + 2 * STATE_ELEMENTS.get(optimizer, 2))


def weight_bytes(graph: Graph) -> int:
    """Bytes of all parameters, buffers and constants of the captured model, tied ones once."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)
    return sum(_bytes(item) for kind in kinds for item in graph.inputs_of(kind))


def batch_bytes(graph: Graph) -> int:
    """Bytes of a whole batch."""
    return sum(_bytes(item) for item in graph.inputs_of(InputKind.BATCH))


def state_bytes(num_bytes: int, per_element: float) -> int:
    """Bytes of the optimizer's state for parameters of `num_bytes`, given those of one float32 element: state has the
    type of its parameter."""
    return int(num_bytes * per_element / 4)


def block_bytes(graph: Graph, state_bytes_per_element: float) -> int:
    """Peak of plain PyTorch on the whole batch: what outlives a step, and what the step adds."""
    trained = {output.target for output in graph.outputs_of(OutputKind.GRADIENT)}
    num_bytes = sum(_bytes(item) for item in graph.inputs_of(InputKind.PARAMETER) if item.name in trained)
    outliving = weight_bytes(graph) + batch_bytes(graph) + state_bytes(num_bytes, state_bytes_per_element)
    return outliving + graph_memory(graph.module.graph).peak_bytes


def _bytes(item: Input) -> int:
    return math.prod(item.shape) * item.dtype.itemsize
