"""`plan="quick"`: plain PyTorch beside a worker a core, without a search."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import partita
from partita.training import planning
from partita.training.events import CandidateMeasured, subscribe

Batch = tuple[torch.Tensor, torch.Tensor]
MOST_STEPS = 20_000  # by far more than a race of candidates has: turns of up to 61 steps, more the shorter steps are


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))


@pytest.fixture
def num_lowered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each plan that is lowered to be predicted."""
    found: list[int] = []
    whole = planning.Evaluator.__call__

    def counted(self: planning.Evaluator, plan: partita.Plan) -> object:
        found.append(1)
        return whole(self, plan)

    monkeypatch.setattr(planning.Evaluator, "__call__", counted)
    return found


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch(rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def plain(num_steps: int, data: Batch) -> nn.Module:
    model = net()
    optimizer = sgd(model)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_fn(model, data).backward()
        optimizer.step()
    return model


def settled(model: nn.Module, data: Batch, **options: object) -> tuple[partita.Plan, set[tuple[str, int]], int]:
    """The adopted plan, which were tried (mode, workers), and how many steps that took."""
    tried: set[tuple[str, int]] = set()

    def note(event: object) -> None:
        if isinstance(event, CandidateMeasured):
            tried.add((event.plan.mode, event.plan.num_workers))

    unsubscribe = subscribe(note)
    try:
        with partita.parallelize(model, sgd(model), loss_fn, data, **options) as step:  # type: ignore[arg-type]
            while not step.is_settled and step.num_steps < MOST_STEPS:
                step(data)
            assert step.is_settled
            step(data)
            return step.plan, tried, step.num_steps
    finally:
        unsubscribe()


def test_it_compares_plain_pytorch_with_a_worker_a_core_and_trains_meanwhile(num_lowered: list[int]) -> None:
    model, data = net(), batch()
    plan, tried, num_steps = settled(model, data, plan="quick")
    num_cores = len(os.sched_getaffinity(0))
    assert {mode for mode, _ in tried} == {"block", "graph"} and ("graph", num_cores) in tried
    assert len(num_lowered) == 1, "it lowers one plan"
    assert not plan.compiled and plan.measured_step_time_s is not None
    torch.testing.assert_close(model.state_dict(), plain(num_steps, data).state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second core")
def test_with_fewer_rows_than_cores_it_is_plain_pytorch(num_lowered: list[int]) -> None:
    plan, tried, _ = settled(net(), batch(1), plan="quick")
    assert plan.mode == "block" and not num_lowered and {mode for mode, _ in tried} <= {"block"}


def test_it_uses_what_an_earlier_run_has_adopted_but_remembers_nothing_itself(num_lowered: list[int]) -> None:
    data = batch()
    settled(net(), data, plan="quick")
    num_lowered.clear()
    settled(net(), data, plan="auto", compile=False)
    assert len(num_lowered) > 1, "all plans are searched, though few were tried before"
    num_lowered.clear()
    settled(net(), data, plan="quick")
    assert not num_lowered


def test_a_model_that_cannot_be_captured_falls_back() -> None:
    def by_value(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = loss_fn(model, batch)
        return loss * 2 if loss.item() > 1e9 else loss

    model = net()
    with (
        pytest.warns(partita.FallbackWarning),
        partita.parallelize(model, sgd(model), by_value, batch(), plan="quick") as step,
    ):
        assert step(batch()).loss > 0 and step.plan.mode == "block"


def test_other_words_are_refused() -> None:
    with pytest.raises(partita.InputError, match=r'"auto", "quick", a Plan or Constraints'):
        partita.parallelize(net(), sgd(net()), loss_fn, batch(), plan="slow")  # type: ignore[arg-type]
