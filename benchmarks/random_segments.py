"""The segments of random programs: small functions of whole numbers, exact in every dtype of `EXACT`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from partita.graph.storages import GraphMemory
from partita.program.instructions import Segment, TensorSpec

MODULUS = 61
EXACT = {  # the largest whole number up to which every whole number is one of the dtype
    torch.float64: 2**53,
    torch.float32: 2**24,
    torch.bfloat16: 2**8,
    torch.int32: 2**31 - 1,
    torch.int64: 2**63 - 1,
}


def wrap(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.remainder(x, MODULUS),)


def mix(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (torch.remainder(torch.remainder(2 * torch.remainder(x, MODULUS), MODULUS) + y, MODULUS),)


def same(x: Tensor) -> tuple[Tensor, ...]:
    """A view of the whole input: nobody may change it in place."""
    return (x.view(x.shape),)


def turn(x: Tensor) -> tuple[Tensor, ...]:
    """A view with other strides."""
    return (x.transpose(0, 1),)


def both(x: Tensor) -> tuple[Tensor, ...]:
    return (x + 1, torch.remainder(x * x % MODULUS, 7))


def slope(x: Tensor, parameter: Tensor) -> tuple[Tensor, ...]:
    """What serves as a gradient: depends on every entry of `x` and of the parameter."""
    total = torch.remainder(torch.remainder(x.double(), MODULUS).sum(), MODULUS)
    return (torch.remainder(3 * parameter + total.to(parameter.dtype), MODULUS),)


def digest(*values: Tensor) -> tuple[Tensor, ...]:
    """One number of many values."""
    total = torch.zeros((), dtype=torch.float64)
    for index, value in enumerate(values):
        total = torch.remainder(total + (index + 1) * torch.remainder(value.double(), MODULUS).sum(), 1009)
    return (total,)


def make_segment(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Segment:
    """A segment that calls one Python function."""
    graph = fx.Graph()
    arguments = tuple(graph.placeholder(f"v{index}") for index in range(len(inputs)))
    called = graph.call_function(function, arguments)
    graph.output(tuple(graph.call_function(operator.getitem, (called, index)) for index in range(len(outputs))))
    shapes = "".join(f" {list(spec.shape)}{str(spec.dtype)[6:]}" for spec in inputs)
    key = f"{function.__name__}{shapes}"
    return Segment(key, fx.GraphModule(torch.nn.Module(), graph), tuple(inputs), tuple(outputs), 0, 0, GraphMemory())
