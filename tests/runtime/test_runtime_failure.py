"""Waiting always ends: by the condition, by a failure elsewhere, or by the limit."""

from __future__ import annotations

import threading

import pytest

from partita.errors import WaitTimeoutError
from partita.runtime.failure import Failure, Stopped, Waiter


def test_the_first_error_is_the_root_cause() -> None:
    failure = Failure()
    first = ValueError("first")
    assert failure.record(first)
    assert not failure.record(ValueError("second"))
    assert failure.error is first


def test_a_failure_wakes_everybody_who_waits_and_everybody_who_comes_later() -> None:
    failure = Failure()
    stopped: list[int] = []

    def wait(index: int) -> None:
        try:
            Waiter(failure).until(lambda: False, 30.0, lambda: "never")
        except Stopped:
            stopped.append(index)

    threads = [threading.Thread(target=wait, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    failure.record(ValueError("enough"))
    for thread in threads:
        thread.join(10)
    wait(3)
    assert sorted(stopped) == [0, 1, 2, 3]
    assert isinstance(failure.error, ValueError)


def test_the_limit_becomes_the_root_cause_with_its_description() -> None:
    failure = Failure()
    with pytest.raises(Stopped):
        Waiter(failure).until(lambda: False, 0.02, lambda: "a waits for b")
    assert isinstance(failure.error, WaitTimeoutError) and str(failure.error) == "a waits for b"


def test_a_condition_that_holds_returns_even_after_the_limit() -> None:
    Waiter(Failure()).until(lambda: True, 0.0, lambda: "never")


def test_a_wake_up_before_the_wait_is_not_lost() -> None:
    failure = Failure()
    waiter = Waiter(failure)
    state = {"polls": 0}

    def ready() -> bool:
        state["polls"] += 1
        return state["polls"] > 40

    def keep_waking() -> None:
        while state["polls"] <= 40:
            waiter.wake()

    thread = threading.Thread(target=keep_waking)
    thread.start()
    waiter.until(ready, 20.0, lambda: "never")
    thread.join(10)
    assert failure.error is None
