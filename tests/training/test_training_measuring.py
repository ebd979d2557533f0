"""The parts of a plan are measured in the order of a step, by as many workers at a time as it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import partita
from partita.cost.measure_ops import measure_together
from partita.plan import Prediction
from partita.training import measuring

ROWS = 8


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def prediction_of(**extents: int) -> Prediction | None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    batch = (torch.randn(ROWS, 6), torch.randn(ROWS, 2))
    plan = partita.Constraints(num_workers=2, threads_per_worker=1, num_microbatches=1, compiled=False, **extents)
    with partita.parallelize(model, torch.optim.Adam(model.parameters()), loss_fn, batch, plan=plan) as step:
        return step.plan.prediction


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(number of workers, number of parts) of what was measured together."""
    seen: list[tuple[int, int]] = []

    def record(calls: Sequence[Sequence[Callable[[], object]]], cores: Any, *, budget_s: float) -> list[float]:
        seen.append((len(calls), len(calls[0])))
        return measure_together(calls, cores, budget_s=0.0)

    monkeypatch.setattr(measuring, "measure_together", record)
    return seen


def test_workers_with_the_same_segments_run_them_and_the_update_in_turns(groups: list[tuple[int, int]]) -> None:
    assert prediction_of(data=2, pipeline=1) is not None
    (pair,) = groups
    assert pair[0] == 2 and pair[1] >= 2  # forward and backward of a worker, and its update


def test_stages_are_measured_alone_as_well(groups: list[tuple[int, int]]) -> None:
    assert prediction_of(data=1, pipeline=2) is not None
    (first, alone), (second, together), *last = groups
    assert (first, second) == (1, 2)
    # Besides the segments there is the update: with the others, or where only one stage has parameters, by itself.
    assert together == alone + 1 if not last else (together, last) == (alone, [(1, 1)])


def test_what_does_not_fit_together_is_measured_in_groups(
    groups: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TOGETHER_BYTES", 1)
    assert prediction_of(data=2, pipeline=1) is not None
    assert len(groups) >= 2 and all(pair == (2, 1) for pair in groups)


def test_a_part_that_fails_on_made_up_values_leaves_the_others_measured(
    groups: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measuring.on_pinned_threads
    tried: list[int] = []

    def trial(cores: Any, bodies: Sequence[Callable[[], object]]) -> None:
        tried.append(len(bodies))
        if len(tried) == 1:
            raise RuntimeError("an index is out of range")
        real(cores, bodies)

    monkeypatch.setattr(measuring, "on_pinned_threads", trial)
    assert prediction_of(data=2, pipeline=1) is not None
    assert len(tried) >= 2 and sum(num_parts for _, num_parts in groups) == len(tried) - 1
