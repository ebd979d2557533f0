"""Outlines of steps, against captured graphs and what torch itself makes in a real step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from graph_models import CASES, Case, checked_values, lstm, rows, square
from live_storages import LiveStorages

from partita.errors import CaptureError, InputError
from partita.graph import capture
from partita.graph.outline import outline

NEEDS_VALUES = (checked_values,)  # capture leaves such checks out
UNKNOWN = (lstm,)  # nothing tells the size of the buffer that oneDNN's LSTM hands to its backward pass
OUTLINED = tuple(case for case in CASES if case not in NEEDS_VALUES + UNKNOWN)


def real_peak_bytes(model: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor], batch: Any) -> int:
    """Of a step of plain PyTorch, as torch makes and frees storages."""
    live = LiveStorages()
    with torch.autograd.set_multithreading_enabled(False), live.watch():
        loss_fn(model, batch).backward()
    return live.peak_bytes


@pytest.mark.parametrize("case", OUTLINED)
def test_memory_is_that_of_a_real_step(case: Callable[[], Case]) -> None:
    model, loss_fn, batch = case()
    found = outline(model, loss_fn, batch)
    assert found.peak_bytes == pytest.approx(real_peak_bytes(model, loss_fn, batch), rel=0.1, abs=256)


def wide_mlp() -> Case:
    return nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 100)), square, torch.randn(50, 200)


def wide_convolution() -> Case:
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()), square, torch.randn(4, 16, 12, 12)


def wide_lstm() -> Case:
    return nn.LSTM(60, 80), square, torch.randn(10, 20, 60)


@pytest.mark.parametrize("case", (wide_mlp, wide_convolution, wide_lstm))
def test_work_and_sizes_are_those_of_the_graph(case: Callable[[], Case]) -> None:
    model, loss_fn, batch = case()
    found, graph = outline(model, loss_fn, batch), capture(model, loss_fn, batch)
    assert sum(flops for flops, _ in found.works) == pytest.approx(graph.flops, rel=0.05)
    assert found.batch_size == graph.batch_size
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sorted(found.trained) == sorted(sizes.values())
    assert found.trained_bytes == 4 * sum(found.trained)
    kept = [*model.parameters(), *model.buffers(), batch]
    assert found.kept_bytes == sum(one.numel() * one.element_size() for one in kept)


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_left_as_it_was(case: Callable[[], Case]) -> None:
    model, loss_fn, batch = case()
    state, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if case in NEEDS_VALUES:
        with pytest.raises(CaptureError, match="must run on tensors without values"):
            outline(model, loss_fn, batch)
    else:
        outline(model, loss_fn, batch)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def test_recomputed_activations_are_not_kept() -> None:
    class Deep(nn.Module):
        def __init__(self, recomputes: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.GELU()) for _ in range(8))
            self.recomputes = recomputes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
            return x

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    x = torch.randn(4096, 64)
    whole, recomputed = (outline(Deep(recomputes), loss_fn, x) for recomputes in (False, True))
    assert recomputed.peak_bytes < 0.7 * whole.peak_bytes
    assert sum(flops for flops, _ in recomputed.works) > sum(flops for flops, _ in whole.works)


def test_what_cannot_be_used_is_refused() -> None:
    model = nn.Linear(8, 4)
    with pytest.raises(InputError, match="must return a scalar tensor"):
        outline(model, lambda model, batch: model(batch[0]), rows())
    with pytest.raises(CaptureError, match="must run on tensors without values"):
        outline(model, lambda model, batch: model(batch[0]).sum() * float(batch[1].sum()), rows())
