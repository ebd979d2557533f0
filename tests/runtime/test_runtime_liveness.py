"""Signs of life: who is gone, and who has only said goodbye."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from partita.runtime import liveness
from partita.runtime.liveness import Liveness, process_exists


@pytest.fixture
def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 0 of two, whose background thread never looks by itself."""
    monkeypatch.setattr(liveness, "BEAT_TIME_S", 3600.0)
    store = torch.distributed.HashStore()
    made = Liveness(store, 0, 2, store_rank=None)
    yield made, store
    store.set("closed/1", "1")
    made.close()


def show(store: Any, pid: int, beat: int = 1, *, works_alone: bool = False) -> None:
    store.set("alive/1", json.dumps([beat, socket.gethostname(), pid, "step 3", works_alone]))


def test_a_process_that_exists_is_not_lost(watching: Any) -> None:
    made, store = watching
    assert made._read_signs() == ""  # it has not started
    show(store, os.getpid())
    assert made._read_signs() == ""


def test_a_process_that_is_gone_is_named(watching: Any, ended_pid: int) -> None:
    made, store = watching
    show(store, ended_pid)
    assert not process_exists(ended_pid)
    assert made._read_signs().startswith("process rank 1 ") and "was killed or has crashed" in made._read_signs()


def test_a_process_that_says_goodbye_while_it_is_looked_for_is_not_lost(
    watching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes and ends between two questions about it."""
    made, store = watching
    show(store, os.getpid())

    def ends_now(pid: int) -> bool:
        store.set("closed/1", "1")
        return False

    monkeypatch.setattr(liveness, "process_exists", ends_now)
    assert made._read_signs() == ""


def test_a_process_that_ended_while_others_train_is_told_apart_from_a_crash(watching: Any, ended_pid: int) -> None:
    made, store = watching
    show(store, ended_pid)
    store.set("closed/1", "1")
    assert made._read_signs() == ""
    made.listen(5, lambda error: None)
    assert "has ended while other processes still train" in made._read_signs()


def test_a_sign_of_life_that_stands_still_is_a_loss(watching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = watching
    now_s = [0.0]
    monkeypatch.setattr("partita.runtime.liveness.time.monotonic", lambda: now_s[0])
    show(store, os.getpid())
    assert made._read_signs() == ""
    now_s[0] = liveness.STALE_TIME_S + 1
    assert "no sign of life for 11 s" in made._read_signs()
    show(store, os.getpid(), beat=2)
    assert made._read_signs() == ""
    monkeypatch.undo()


def test_who_has_reported_the_failure_itself_waits_for_no_explanation(watching: Any) -> None:
    made, store = watching
    store.set("failure/4", '{"rank": 1, "host": "h", "pid": 1, "message": "the other was first"}')
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(made.explain(4)))
    waiting.start()
    made.report(4, ValueError("a time-out here"))
    waiting.join(10.0)
    assert found == [True]
    assert made.explain(4)


@pytest.mark.parametrize("works_alone", [True, False])
def test_others_are_asked_whether_they_work_alone(watching: Any, works_alone: bool) -> None:
    made, store = watching
    assert not made.others_work_alone()  # it has not started, and this process does not count
    show(store, os.getpid(), works_alone=works_alone)
    assert made.others_work_alone() == works_alone
