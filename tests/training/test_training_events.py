from __future__ import annotations

import logging

import pytest
import torch

import partita
from partita.errors import InputError
from partita.training.events import StepFinished, WarningRaised, emit, subscribe
from partita.training.setup import RECORDED_EVERY


def test_what_is_no_function_cannot_subscribe() -> None:
    with pytest.raises(InputError, match="callback must be a function of one event, but got int 3"):
        subscribe(3)  # type: ignore[arg-type]


def test_subscribers_hear_events_until_they_unsubscribe() -> None:
    first: list[object] = []
    second: list[object] = []
    leave_first, leave_second = subscribe(first.append), subscribe(second.append)
    emit(WarningRaised(subject="a", message="b"))
    leave_first()
    emit(WarningRaised(subject="c", message="d"))
    leave_second()
    leave_second()
    emit(WarningRaised(subject="e", message="f"))
    assert [event.subject for event in first] == ["a"]  # type: ignore[attr-defined]
    assert [event.subject for event in second] == ["a", "c"]  # type: ignore[attr-defined]


def test_a_failing_subscriber_is_logged_and_others_still_hear(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: object) -> None:
        raise ValueError("broken subscriber")

    heard: list[object] = []
    leave = [subscribe(fail), subscribe(heard.append)]
    with caplog.at_level(logging.ERROR, logger="partita"):
        emit(WarningRaised(subject="a", message="b"))
    for unsubscribe in leave:
        unsubscribe()
    assert len(heard) == 1
    assert "broken subscriber" in caplog.text


def test_an_interrupt_in_a_subscriber_ends_the_step() -> None:
    def stop(event: object) -> None:
        raise SystemExit(0)

    leave = subscribe(stop)
    with pytest.raises(SystemExit):
        emit(WarningRaised(subject="a", message="b"))
    leave()


def test_samples_per_s() -> None:
    event = StepFinished(step=1, loss=0.5, step_time_s=0.5, num_samples=8, bytes_sent=0)
    assert event.samples_per_s == 16
    assert StepFinished(step=1, loss=0.5, step_time_s=0.0, num_samples=8, bytes_sent=0).samples_per_s == 0


def test_some_steps_tell_what_workers_wait_for_each_other() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(8, 8), torch.randint(0, 2, (8,))
    plan = partita.Constraints(data=2, pipeline=1, threads_per_worker=1, num_microbatches=1, compiled=False)
    heard: list[object] = []

    def loss_fn(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    with partita.parallelize(model, optimizer, loss_fn, batch, plan=plan) as step:
        assert step(batch).exposed_time_s is None  # nobody listens
        leave = subscribe(heard.append)
        for _ in range(2 * RECORDED_EVERY):
            step(batch)
        leave()
    told = [event for event in heard if isinstance(event, StepFinished)]
    recorded = [event for event in told if event.exposed_time_s is not None]
    assert [event.step for event in recorded] == [RECORDED_EVERY + 1, 2 * RECORDED_EVERY + 1]
    for event in recorded:
        assert event.exposed_time_s is not None and 0 < event.exposed_time_s < event.step_time_s
        assert event.skew is not None and 0 <= event.skew < 1
