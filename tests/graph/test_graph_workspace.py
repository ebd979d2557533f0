"""Workspaces of ops against what torch's allocator reports."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from partita.graph.workspace import workspace_bytes

aten = torch.ops.aten
HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
ON_X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def allocated(function: Callable[[], Any], folder: Path) -> tuple[int, int]:
    """Peak of the bytes that torch's allocator gave out in a call, and what is left after it."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = function()
    watched.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    assert result is not None
    return peak, now


def node_of(target: Any, *args: Any) -> fx.Node:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]

    def function(*values: Tensor) -> Any:
        left = iter(values)
        return target(*(next(left) if isinstance(arg, Tensor) else arg for arg in args))

    module = make_fx(function, tracing_mode="fake")(*tensors)
    return next(node for node in module.graph.nodes if node.target is target)


def convolution(x: Tensor, weight: Tensor, groups: int, *, backward: bool, upwards: int = 0) -> tuple[Any, ...]:
    """`upwards`: the stride of a transposed convolution; 0: a plain one."""
    dims = x.dim() - 2
    steps = [upwards or 1] * dims
    places = (steps, [weight.shape[-1] // 2] * dims, [1] * dims, upwards > 0, [0] * dims, groups)
    if not backward:
        return aten.convolution.default, x, weight, None, *places
    y = torch.randn_like(aten.convolution.default(x, weight, None, *places))
    needed = [x.shape[1] > 3, True, False]  # nobody needs the gradient of an image
    return aten.convolution_backward.default, y, x, weight, None, *places, needed


def images(*shape: int, channels_last: bool = False) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not ON_X86, reason="the layouts are those of oneDNN on x86")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("x", "weight", "groups", "upwards"),
    [
        (images(4, 32, 32, 32), images(64, 32, 3, 3), 1, 0),
        (images(8, 64, 16, 16), images(16, 64, 5, 5), 1, 0),
        (images(8, 3, 32, 32), images(16, 3, 7, 7), 1, 0),
        (images(8, 32, 32, 32)[:, :16], images(32, 16, 3, 3), 1, 0),
        (images(16, 48, 200), images(48, 48, 3), 1, 0),
        (images(4, 16, 8, 12, 12), images(32, 16, 3, 3, 3), 1, 0),
        (images(8, 128, 8, 8, channels_last=True), images(128, 1, 7, 7), 128, 0),
        (images(4, 64, 16, 16, channels_last=True), images(64, 64, 3, 3), 1, 0),
        (images(4, 16, 24, 24).double(), images(16, 16, 3, 3).double(), 1, 0),
        (images(1, 16, 24, 24), images(32, 16, 3, 3), 1, 0),
        (images(8, 32, 16, 16), images(32, 16, 3, 3), 1, 1),
        (images(8, 32, 16, 16), images(32, 16, 4, 4), 1, 2),
        (images(1, 16, 8, 8, 8), images(16, 8, 3, 3, 3), 1, 1),
    ],
    ids=[
        "3x3",
        "fewer channels",
        "first layer",
        "sliced",
        "sequence",
        "volume",
        "depthwise",
        "last",
        "double",
        "one small",
        "transposed",
        "upwards",
        "one small transposed",
    ],
)
def test_convolutions(x: Tensor, weight: Tensor, groups: int, upwards: int, backward: bool, tmp_path: Path) -> None:
    if x.dim() == 5 and backward and not upwards and not HAS_AVX512:
        pytest.skip("without AVX-512 the gradient of a volume's weight takes a scratchpad that depends on threads")
    target, *args = convolution(x, weight, groups, backward=backward, upwards=upwards)
    target(*args)  # what oneDNN keeps for later calls is no workspace
    peak, left = allocated(lambda: target(*args), tmp_path)
    predicted = left + workspace_bytes(node_of(target, *args))
    assert predicted == pytest.approx(peak, rel=0.15), (peak - left, workspace_bytes(node_of(target, *args)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize(
    ("target", "others"),
    [
        (aten._log_softmax.default, (1, False)),
        (aten._softmax.default, (2, False)),
        (aten.native_layer_norm.default, ([64], torch.ones(64), torch.ones(64), 1e-5)),
    ],
)
def test_inputs_that_are_not_dense_are_copied(target: Any, others: Any, is_dense: bool, tmp_path: Path) -> None:
    x = torch.randn(16, 64, 64)
    x = x if is_dense else x.transpose(1, 2)
    peak, left = allocated(lambda: target(x, *others), tmp_path)
    assert workspace_bytes(node_of(target, x, *others)) == peak - left == (0 if is_dense else x.numel() * 4)


def test_other_ops_have_none() -> None:
    assert workspace_bytes(node_of(aten.add.Tensor, torch.ones(3), torch.ones(3))) == 0
