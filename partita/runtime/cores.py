"""Cores that somebody else takes part of: the workers of a process share what is lost.

Workers are pinned, a core each. Where another process keeps a core half busy, its worker is late in every step and all
others wait for it: a quarter of two cores taken makes a step twice as long. So, once a worker that is waited for is
seen to wait for its core (the kernel counts that: `schedstat`, field 2), for a while

* workers may run on all cores of the crew, so that whoever is woken finds an idle one;
* a worker that waits gives its core to the one that is late;
* the workers exchange their cores every few milliseconds, so that each has the busy one for a part of the step.

Nothing of this happens on a machine that is left alone, where moved workers would lose their caches. It needs Linux,
and workers of one core each.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from partita.runtime.failure import Meanwhile

HELP_AFTER_S = 100e-6  # a worker that has waited so long looks why
EXCHANGE_EVERY_S = 7e-3  # caches are filled anew after each; shorter steps go without
LEAST_DELAY_S = 100e-6  # that a late worker has waited for its core, to be given another one
WINDOW_S, LEAST_SHARE = 10e-3, 0.15  # a core is busy whose worker has waited for it that share of the time or more
CONTENDED_S = 2.0  # for which that is believed; then workers are pinned again, and it must show itself anew


@dataclass
class _Member:
    thread: int  # the kernel's number of it
    core: int  # of its plan
    delay_s: float
    looked_s: float


class Crew:
    """The workers of a process and their cores.

    Args:
        cores: of each worker by the plan.
        delay_of: how long a thread has waited for a core so far, seconds; None if that is not known.

    Use: every worker's thread calls `join`; who waits for others calls `help`, the engine's thread does
    what `meanwhile` says.
    """

    def __init__(
        self, cores: Sequence[tuple[int, ...]], *, delay_of: Callable[[int], float | None] | None = None
    ) -> None:
        singles = {own[0] for own in cores if len(own) == 1}
        self._all = singles if len(cores) > 1 and len(singles) == len(cores) and _current_core() is not None else set()
        self._delay_of = delay_of or _delay_of
        self._members: dict[int, _Member] = {}
        self._lock = threading.Lock()
        self._until_s = 0.0  # when the contention that was seen is forgotten
        self._turn = 0
        self._exchanging = Meanwhile(EXCHANGE_EVERY_S, self.exchange)
        self.is_contended = False  # whether workers may run anywhere at present

    @property
    def can_help(self) -> bool:
        return bool(self._all)

    def join(self, worker: int, cores: tuple[int, ...]) -> None:
        """The calling thread, pinned, is that of a worker."""
        thread = threading.get_native_id()
        delay_s = self._delay_of(thread) if self._all else None
        if delay_s is None:
            self._all = set()
            return
        self._members[worker] = _Member(thread, cores[0], delay_s, time.perf_counter())

    def help(self, late: Sequence[int]) -> None:
        """The calling worker has waited for others: gives its core to one of them that waits for a core itself."""
        if not self._all or not self._lock.acquire(blocking=False):
            return
        try:
            for worker in late:
                member = self._members.get(worker)
                if member is None or not self._is_delayed(member):
                    continue
                if not self.is_contended:
                    self._loosen()
                core = _current_core()
                if core in self._all:
                    self._move(member, core)
                return
        finally:
            self._lock.release()

    def meanwhile(self) -> Meanwhile | None:
        """What the engine's thread does while it waits for a step."""
        if self.is_contended and time.perf_counter() > self._until_s:
            self._fasten()
        return self._exchanging if self.is_contended else None

    def exchange(self) -> float:
        """Moves every worker to another core; seconds until it is to be done again."""
        with self._lock:
            members = list(self._members.values())
            self._turn += 1
            for place, member in enumerate(members):
                self._move(member, members[(place + self._turn) % len(members)].core)
        return EXCHANGE_EVERY_S

    def _is_delayed(self, member: _Member) -> bool:
        """Whether the worker has waited for a core since the last look: much of a window of time while it is pinned,
        and at all while workers are moved, which makes them wait as well."""
        now_s, delay_s = time.perf_counter(), self._delay_of(member.thread)
        passed_s = now_s - member.looked_s
        if delay_s is None or (not self.is_contended and passed_s < WINDOW_S):
            return False
        grown_s = delay_s - member.delay_s
        member.delay_s, member.looked_s = delay_s, now_s
        return grown_s > (LEAST_DELAY_S if self.is_contended else LEAST_SHARE * passed_s)

    def _loosen(self) -> None:
        self._until_s = time.perf_counter() + CONTENDED_S
        self.is_contended = True
        for member in self._members.values():
            _allow(member.thread, self._all)

    def _fasten(self) -> None:
        with self._lock:
            self.is_contended = False
            for member in self._members.values():
                _allow(member.thread, {member.core})
                member.delay_s, member.looked_s = self._delay_of(member.thread) or 0.0, time.perf_counter()

    def _move(self, member: _Member, core: int) -> None:
        _allow(member.thread, {core})
        _allow(member.thread, self._all)


def _allow(thread: int, cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # the thread has ended, or the system keeps its cores to itself
        os.sched_setaffinity(thread, cores)


def _delay_of(thread: int) -> float | None:
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _getcpu() -> Callable[[], int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    found: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None)
    return found


def _current_core() -> int | None:
    """The core that the calling thread runs on."""
    call = _getcpu()
    return call() if call is not None else None
