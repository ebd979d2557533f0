"""The private parts of torch that capture needs, in one place (a test names each of them).

* `FakeTensorMode`: tensors without storage; shapes, dtypes and devices only.
* `make_fx`, `get_proxy_mode`: tracing of executed ATen ops into a `torch.fx` graph.
* `current_autograd_sequence`: the autograd node that runs now, to find the forward op it belongs to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "current_autograd_sequence",
    "make_fx",
    "next_autograd_sequence",
    "traced_graph",
]


def traced_graph() -> fx.Graph | None:
    """The graph that is being traced right now, or None."""
    mode: Any = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def next_autograd_sequence() -> int:
    """The sequence number that the next autograd node of this thread will get."""
    return int(torch._C._autograd._get_sequence_nr())


def current_autograd_sequence() -> int | None:
    """The sequence number of the autograd node that runs now, or None outside a backward pass."""
    node: Any = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())
