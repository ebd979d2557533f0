"""Gradients clipped by their norm, and gradients of several batches added up, under every plan as in plain PyTorch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import clipping_job
from clipping_job import MEGATRON, batch_of, build, loss_fn, plain
from test_training_processes import run_job

import partita
from partita import Constraints
from partita.errors import InputError, NonFiniteLossError
from partita.program import check, lower
from partita.program.instructions import AllReduce, Clip, SumSquares, Update

BASE: dict[str, Any] = {"compiled": False, "threads_per_worker": 1}
PLANS = {
    "one worker": Constraints(**BASE, num_workers=1),
    "data": Constraints(**BASE, data=2, num_workers=2, num_microbatches=1),
    "uneven data": Constraints(**BASE, data=3, num_workers=3, num_microbatches=1),
    "tensor": Constraints(**BASE, data=1, tensor=2, inputs=MEGATRON),
    "pipeline": Constraints(**BASE, data=1, pipeline=2, num_microbatches=4),
    "pipeline of data": Constraints(**BASE, data=2, pipeline=2, num_microbatches=2),
    "block": None,
}
LIMITS = {"never clipped": 100.0, "always clipped": 0.01, "sometimes clipped": 0.8}


def train(name: str, **options: Any) -> tuple[list[partita.StepResult], nn.Module]:
    model, optimizer = build(options.pop("optimizer", "AdamW"))
    plan, function = PLANS[name], loss_fn
    if plan is None:
        plan, function = "auto", clipping_job.branching  # type: ignore[assignment]
    updates = options.pop("updates", [True] * 6)
    with partita.parallelize(model, optimizer, function, batch_of(0), plan=plan, **options) as step:
        results = [step(batch_of(index), update=update) for index, update in enumerate(updates)]
    return results, model


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::partita.FallbackWarning")
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("name", PLANS)
def test_clipping_is_that_of_torch(name: str, limit: float) -> None:
    results, model = train(name, clip_grad_norm=limit)
    losses, norms, reference = plain(limit)
    assert [result.loss for result in results] == pytest.approx(losses, abs=1e-5)
    assert [result.grad_norm for result in results] == pytest.approx(norms, rel=1e-5)
    assert_equal(model, reference)
    if limit == 0.8:
        assert min(norms) < limit < max(norms)


@pytest.mark.parametrize("kind", ["SGD", "Coupled", "Muon", "Adafactor"])
def test_clipping_before_every_kind_of_optimizer(kind: str) -> None:
    _, model = train("data", clip_grad_norm=0.5, optimizer=kind)
    *_, reference = plain(0.5, optimizer=kind)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):  # Muon turns in bfloat16
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-2 if kind == "Muon" else 1e-5)


def test_the_norm_alone_may_be_told() -> None:
    results, model = train("data", clip_grad_norm=math.inf)
    _, norms, reference = plain(math.inf)
    assert [result.grad_norm for result in results] == pytest.approx(norms, rel=1e-5)
    assert_equal(model, reference)
    results, _ = train("data")
    assert results[0].grad_norm is None


@pytest.mark.parametrize("limit", [-1.0, 0, float("nan"), "1", True])
def test_limits_of_a_wrong_kind_are_refused(limit: Any) -> None:
    with pytest.raises(InputError, match="clip_grad_norm"):
        train("data", clip_grad_norm=limit)


@pytest.mark.filterwarnings("ignore::partita.FallbackWarning")
@pytest.mark.parametrize("name", ["one worker", "data", "pipeline", "block"])
def test_an_infinite_norm_updates_nothing(name: str) -> None:
    def explodes(model: nn.Module, batch: Any) -> torch.Tensor:
        shift = torch.where(batch[0][0, 0] > 50, 0.0, 1.0)  # the derivative of a root is infinite at 0
        return loss_fn(model, batch) + ((model[4].bias - model[4].bias.detach()).square().sum() + shift).sqrt()

    model, optimizer = build()
    plan: Any = PLANS[name] or "auto"
    if name == "pipeline":  # the loss couples samples, so they cannot be cut in time
        plan = Constraints(**BASE, data=1, pipeline=2, num_microbatches=1)
    bad = batch_of(0)
    bad[0][:, 0] = 100.0
    function = explodes if PLANS[name] is not None else clipping_job.branching_of(explodes)
    with partita.parallelize(model, optimizer, function, batch_of(0), plan=plan, clip_grad_norm=1.0) as step:
        step(batch_of(0))
        before = [value.detach().clone() for value in model.parameters()]
        with pytest.raises(NonFiniteLossError, match="norm of the gradients must be finite"):
            step(bad)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert step.num_steps == 1
        assert math.isfinite(step(batch_of(1)).loss)


# Programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [0, 64])
def test_all_gradients_are_there_before_any_is_applied(bucket_bytes: int) -> None:
    model, optimizer = build()
    plan = partita.plan(
        model, loss_fn, batch_of(0), optimizer=optimizer, constraints=Constraints(**BASE, data=2, num_microbatches=1)
    )
    plan = msgspec.structs.replace(plan, bucket_bytes=bucket_bytes)
    workers = tuple(msgspec.structs.replace(w, process=w.index) for w in plan.workers)
    graph = partita.graph.capture(model, loss_fn, batch_of(0))
    for placed in (plan, msgspec.structs.replace(plan, workers=workers)):
        programs = lower(graph, placed, clips=True)
        check(programs)
        num_processes = len({worker.process for worker in placed.workers})
        for program in programs.programs:
            kinds = [type(item) for item in program.instructions]
            assert kinds.index(SumSquares) < kinds.index(Clip) < kinds.index(Update)
            squares = next(item for item in program.instructions if isinstance(item, SumSquares))
            assert set(squares.weights) == {1 / num_processes}
            assert any(isinstance(item, AllReduce) and item.key == "norm" for item in program.instructions)


# Accumulation ------------------------------------------------------------------------------------------------------

PATTERN = [False, False, True, True, False, True]


@pytest.mark.filterwarnings("ignore::partita.FallbackWarning")
@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("name", PLANS)
def test_gradients_of_several_batches_add_up(name: str, limit: float | None) -> None:
    results, model = train(name, clip_grad_norm=limit, updates=PATTERN)
    losses, norms, reference = plain(limit, updates=PATTERN)
    assert [result.loss for result in results] == pytest.approx(losses, abs=1e-5)
    assert [result.step for result in results] == [0, 0, 1, 2, 2, 3]
    assert_equal(model, reference)
    if limit:
        found = [result.grad_norm for result in results]
        assert [norm is None for norm in found] == [not update for update in PATTERN]
        assert [norm for norm in found if norm is not None] == pytest.approx(norms, rel=1e-5)


def test_accumulation_while_plans_are_tried() -> None:
    model, optimizer = build()
    pattern = [False, True] * 15
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), compile=False) as step:
        losses = [step(batch_of(index), update=update).loss for index, update in enumerate(pattern)]
    wanted, _, reference = plain(None, updates=pattern)
    assert losses == pytest.approx(wanted, rel=1e-3)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_batches_that_cannot_be_added_up_are_refused_and_forgotten() -> None:
    model, optimizer = build()
    short = tuple(value[:5] for value in batch_of(1))
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=PLANS["data"]) as step:
        step(batch_of(0), update=False)
        with pytest.raises(InputError, match="must have one shape"):
            step(short)
        found = step(batch_of(2)).loss  # the gradients of batch 0 are gone
        after = [value.detach().clone() for value in model.parameters()]
    reference, plain_optimizer = build()
    loss = loss_fn(reference, batch_of(2))
    loss.backward()  # type: ignore[no-untyped-call]
    plain_optimizer.step()
    assert found == pytest.approx(loss.item(), abs=1e-5)
    for one, two in zip(after, reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::partita.FallbackWarning")
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("name", ["data", "block"])
def test_a_batch_that_is_not_finite_does_not_spoil_what_was_added_up(name: str, limit: float | None) -> None:
    model, optimizer = build()
    plan: Any = PLANS[name] or "auto"
    function: Callable[..., Any] = loss_fn if PLANS[name] is not None else clipping_job.branching
    bad = (torch.full_like(batch_of(0)[0], float("nan")), batch_of(0)[1])
    with partita.parallelize(model, optimizer, function, batch_of(0), plan=plan, clip_grad_norm=limit) as step:
        step(batch_of(0), update=False)
        with pytest.raises(NonFiniteLossError):
            step(bad, update=False)
        step(batch_of(1))
    *_, reference = plain(limit, updates=[False, True])
    assert_equal(model, reference)


# Processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job("", tmp_path_factory.mktemp("clipping"), Path(clipping_job.__file__))


@pytest.mark.parametrize("name", clipping_job.CASES)
def test_clipping_in_a_job(found: list[dict[str, Any]], name: str) -> None:
    _, limit, updates, _ = clipping_job.CASES[name]
    losses, norms, reference = plain(limit, updates=updates)
    for one in found:
        assert one[name]["losses"] == pytest.approx(losses, abs=1e-5)
        assert [norm for norm in one[name]["norms"] if norm is not None] == pytest.approx(norms, rel=1e-5)
        for value, wanted in zip(one[name]["weights"], reference.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted.detach(), rtol=1e-4, atol=1e-5)
