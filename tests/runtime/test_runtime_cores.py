"""Workers whose cores somebody else takes part of."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from partita.runtime import cores
from partita.runtime.cores import Crew
from partita.runtime.failure import Failure, Meanwhile, Waiter

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="workers exchange cores where there are two")


class Delays:
    """What each thread is said to have waited for its core."""

    def __init__(self) -> None:
        self.by_thread: dict[int, float] = {}

    def __call__(self, thread: int) -> float:
        return self.by_thread.get(thread, 0.0)


@contextmanager
def crew_of_two(delays: Delays) -> Iterator[tuple[Crew, list[int]]]:
    """A crew with a parked thread for each of two workers, pinned as the engine does it."""
    crew = Crew([(CORES[0],), (CORES[1],)], delay_of=delays)
    threads, joined, over = [0, 0], threading.Barrier(3), threading.Event()

    def live(worker: int) -> None:
        os.sched_setaffinity(0, {CORES[worker]})
        crew.join(worker, (CORES[worker],))
        threads[worker] = threading.get_native_id()
        joined.wait(10)
        over.wait(30)

    started = [threading.Thread(target=live, args=(worker,)) for worker in range(2)]
    for thread in started:
        thread.start()
    joined.wait(10)
    try:
        yield crew, threads
    finally:
        over.set()
        for thread in started:
            thread.join()


@needs_two_cores
def test_pinned_workers_stay_where_they_are_while_nobody_takes_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "WINDOW_S", 0.0)
    with crew_of_two(Delays()) as (crew, threads):
        crew.help([0, 1])
        assert not crew.is_contended and crew.meanwhile() is None
        assert [os.sched_getaffinity(thread) for thread in threads] == [{CORES[0]}, {CORES[1]}]


@needs_two_cores
def test_a_worker_that_waits_for_its_core_gets_those_of_all_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "WINDOW_S", 0.0)
    delays = Delays()
    with crew_of_two(delays) as (crew, threads):
        delays.by_thread[threads[1]] = 100.0
        crew.help([1])
        assert crew.is_contended
        assert [os.sched_getaffinity(thread) for thread in threads] == [set(CORES[:2])] * 2
        meanwhile = crew.meanwhile()
        assert meanwhile is not None and meanwhile.call() == cores.EXCHANGE_EVERY_S
        assert [os.sched_getaffinity(thread) for thread in threads] == [set(CORES[:2])] * 2
        monkeypatch.setattr(crew, "_until_s", 0.0)  # the time of it is over
        assert crew.meanwhile() is None
        assert [os.sched_getaffinity(thread) for thread in threads] == [{CORES[0]}, {CORES[1]}]


@needs_two_cores
def test_a_short_wait_in_passing_changes_nothing() -> None:
    delays = Delays()
    with crew_of_two(delays) as (crew, threads):
        delays.by_thread[threads[0]] = 100.0
        crew.help([0])  # less than a window after the last look
        assert not crew.is_contended


@pytest.mark.parametrize("given", [[(0,)], [(0, 1), (2, 3)], [(0,), (0,)], [(), ()]])
def test_workers_without_a_core_each_are_left_alone(given: list[tuple[int, ...]]) -> None:
    assert not Crew(given).can_help


def test_a_system_that_does_not_say_who_waits_has_no_help(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew([(0,), (1,)], delay_of=lambda thread: None)
    crew.join(0, (0,))
    assert not crew.can_help
    crew.help([0])
    assert not crew.is_contended


def test_a_thread_that_has_ended_disturbs_nobody() -> None:
    cores._allow(2**22 + 1, {0})
    assert cores._delay_of(2**22 + 1) is None


def test_something_is_done_while_a_thread_waits() -> None:
    calls: list[int] = []

    def call() -> float | None:
        calls.append(1)
        return 1e-4 if len(calls) < 3 else None

    waiter = Waiter(Failure())
    waiter.until(lambda: len(calls) == 3, 5.0, lambda: "", Meanwhile(1e-4, call))
    assert len(calls) == 3
