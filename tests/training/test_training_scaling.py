"""The scale of the loss, against `torch.amp.GradScaler` step by step."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.training import scaling
from partita.training.scaling import LossScale


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=25))
def test_it_is_that_of_grad_scaler(pattern: list[bool]) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    scale = LossScale("dynamic", interval=3)
    for is_finite in pattern:
        assert scale.value == scaler.scale(torch.ones(())).item()
        weight.grad = torch.full((2,), 1.0 if is_finite else math.inf)
        scaler.step(optimizer)
        scaler.update()
        scale.stepped(is_finite=is_finite)
    assert scale.value == scaler.scale(torch.ones(())).item()


def test_its_defaults_are_those_of_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_scale() == scaling.FIRST == LossScale("dynamic").value
    assert scaler.get_growth_factor() == scaling.GROWTH and scaler.get_backoff_factor() == scaling.BACKOFF
    assert scaler.get_growth_interval() == scaling.INTERVAL


def test_it_goes_on_from_its_state() -> None:
    scale, other, fixed = LossScale("dynamic", interval=3), LossScale("dynamic", interval=3), LossScale(8.0)
    for is_finite in (False, False, True, True):
        scale.stepped(is_finite=is_finite)
    other.load_state_dict(scale.state_dict())
    fixed.load_state_dict(scale.state_dict())
    for one in (scale, other, fixed):
        one.stepped(is_finite=True)
    assert (scale.value, other.value, fixed.value) == (2.0**15, 2.0**15, 8.0)


def test_it_stays_a_number_of_float32() -> None:
    scale = LossScale("dynamic", interval=1)
    for _ in range(200):
        scale.stepped(is_finite=True)
    assert scale.value == scaling.LARGEST


def test_the_scaled_loss_is_in_float32() -> None:
    loss = LossScale("dynamic").of(lambda _, batch: batch)(torch.nn.Linear(1, 1), torch.tensor(3.0).half())
    assert loss.dtype == torch.float32 and loss.item() == 3.0 * 2**16
