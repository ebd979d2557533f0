"""The moving average of the weights, under every plan as torch's own."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parent))
import averages_job
from averages_job import DECAY, MEGATRON, batch_of, build, loss_fn
from clipping_job import branching
from test_training_processes import run_job

import partita
from partita import Constraints
from partita.errors import InputError

BASE: dict[str, Any] = {"compiled": False, "threads_per_worker": 1}
PLANS: dict[str, Constraints | None] = {
    "one worker": Constraints(**BASE, num_workers=1),
    "data": Constraints(**BASE, data=3, num_workers=3, num_microbatches=1),
    "tensor": Constraints(**BASE, data=1, tensor=2, inputs=MEGATRON),
    "pipeline": Constraints(**BASE, data=1, pipeline=2, num_microbatches=2),
    "block": None,
}


def plain(kind: str, num_steps: int) -> tuple[nn.Module, nn.Module]:
    """The model and its average, by torch's own classes."""
    model, optimizer = build(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for index in range(num_steps):
        loss_fn(model, batch_of(index)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return model, average.module


def assert_equal(model: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=tolerance)


@pytest.mark.filterwarnings("ignore::partita.FallbackWarning")
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor", "Coupled"])
@pytest.mark.parametrize("name", PLANS)
def test_it_is_that_of_torch(name: str, kind: str) -> None:
    model, optimizer = build(kind)
    plan: Any = PLANS[name] or "auto"
    function = loss_fn if PLANS[name] is not None else branching
    found = copy.deepcopy(model)
    with partita.parallelize(model, optimizer, function, batch_of(0), plan=plan, ema=DECAY) as step:
        for index in range(5):
            step(batch_of(index))
        step.ema_to(found)
        step(batch_of(5))
    reference, average = plain(kind, 5)
    assert_equal(found, average)
    assert any(not torch.equal(one, two) for one, two in zip(found.parameters(), reference.parameters(), strict=True))
    assert_equal(model, plain(kind, 6)[0])


def test_it_goes_on_from_a_checkpoint_under_another_plan(tmp_path: Path) -> None:
    model, optimizer = build("AdamW")
    first, second = PLANS["data"], PLANS["tensor"]
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=first, ema=DECAY) as step:  # type: ignore[arg-type]
        for index in range(3):
            step(batch_of(index))
        step.save(tmp_path)
    model, optimizer = build("AdamW")
    found = copy.deepcopy(model)
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=second, ema=DECAY) as step:  # type: ignore[arg-type]
        step.load(tmp_path)
        for index in range(3, 5):
            step(batch_of(index))
        step.ema_to(found)
    assert_equal(found, plain("AdamW", 5)[1])


def test_while_plans_are_tried() -> None:
    model, optimizer = build("AdamW")
    found = copy.deepcopy(model)
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), compile=False, ema=DECAY) as step:
        for index in range(15):
            step(batch_of(index))
        step.ema_to(found)
    assert_equal(found, plain("AdamW", 15)[1], 1e-3)


def test_what_cannot_be_is_refused() -> None:
    model, optimizer = build("AdamW")
    plan: Any = PLANS["data"]
    step = partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan)
    with step, pytest.raises(InputError, match="there is no average"):
        step.ema_to(copy.deepcopy(model))
    for wrong in (1.0, -0.1, True, "0.9"):
        with pytest.raises(InputError, match="ema must be"):
            partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=PLANS["data"], ema=wrong)  # type: ignore[arg-type]
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=PLANS["data"], ema=0.5) as step:  # type: ignore[arg-type]
        with pytest.raises(InputError, match="must not overwrite"):
            step.ema_to(model)
        with pytest.raises(InputError, match="same structure"):
            step.ema_to(nn.Linear(2, 2))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job("", tmp_path_factory.mktemp("averages"), Path(averages_job.__file__))


@pytest.mark.parametrize("name", averages_job.PLANS)
def test_in_a_job(found: list[dict[str, Any]], name: str) -> None:
    _, average = plain("AdamW", 4)
    for one in found:
        for value, wanted in zip(one[name], average.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted.detach(), rtol=1e-4, atol=1e-5)
