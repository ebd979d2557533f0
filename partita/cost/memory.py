"""Bytes of parameters, gradients and optimizer state."""

from __future__ import annotations

from partita.graph.graph import Graph, InputKind, OutputKind

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


def parameter_bytes(graph: Graph) -> int:
    """Bytes of all parameters and buffers of the captured model, tied ones once."""
    return sum(
        _bytes(item.shape, item.dtype.itemsize)
        for kind in (InputKind.PARAMETER, InputKind.BUFFER)
        for item in graph.inputs_of(kind)
    )


def gradient_bytes(graph: Graph) -> int:
    """Bytes of all gradients that the graph gives."""
    trained = {output.target for output in graph.outputs_of(OutputKind.GRADIENT)}
    return sum(
        _bytes(item.shape, item.dtype.itemsize) for item in graph.inputs_of(InputKind.PARAMETER) if item.name in trained
    )


def state_bytes(graph: Graph, bytes_per_element: float) -> int:
    """Bytes of the optimizer's state for all parameters with a gradient."""
    trained = {output.target for output in graph.outputs_of(OutputKind.GRADIENT)}
    return int(
        sum(
            _bytes(item.shape, 1) * bytes_per_element
            for item in graph.inputs_of(InputKind.PARAMETER)
            if item.name in trained
        )
    )


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    count = itemsize
    for extent in shape:
        count *= extent
    return count
