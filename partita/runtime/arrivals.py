"""Patience before an exchange: nobody begins it before all processes have come.

The collectives of `torch.distributed` have one limit for everything, so a process that plans or compiles for longer
would end the job. Here the others wait as long as it shows that it lives, and the collective with its limit comes after
that. A limit counts while nobody reports to work alone: processes that make different calls wait for each other.
"""

from __future__ import annotations

import time
from typing import Any

from partita.runtime.liveness import BEAT_TIME_S, Liveness

_SHARE = 0.1  # of what was waited so far is the pause between two questions to the store
_SHORTEST_S, _LONGEST_S = 0.001, 0.25


class Arrivals:
    """Counts in the job's store who has come to an exchange; all processes come to the same ones in the same order.

    Args:
        store: a part of the job's key-value store with a connection of its own.
        liveness: knows who is lost, and who works alone.
        num_processes: that must come.
        timeout_s: how long they may wait for one that is not at work of its own.
    """

    def __init__(self, store: Any, liveness: Liveness, num_processes: int, timeout_s: float) -> None:
        self._store, self._liveness, self._num_processes = store, liveness, num_processes
        self._timeout_s = max(timeout_s, 3 * BEAT_TIME_S)  # what others were last in is known as late as that
        self._turn = 0

    def wait(self) -> None:
        """Come to the next exchange; return once all have.

        Raises:
            RuntimeError: as a collective would: a process or the store is lost, or the wait has timed out.
        """
        self._turn += 1
        if self._store.add(f"come/{self._turn}", 1) == self._num_processes:
            self._store.set(f"all/{self._turn}", "1")
            for name in ("come", "all"):  # all have left the turn before
                self._store.delete_key(f"{name}/{self._turn - 1}")
        self._liveness.works_alone = False  # after it is counted: whom nobody waits for has come
        start_s = since_s = time.monotonic()
        while not self._are_here():
            if self._liveness.lost is not None:
                raise RuntimeError("a process is lost")
            now_s = time.monotonic()
            if now_s - since_s > self._timeout_s:
                if not self._liveness.others_work_alone() and not self._are_here():
                    raise RuntimeError(f"timed out after {now_s - start_s:.0f} s")
                since_s = now_s
            time.sleep(min(_SHORTEST_S + _SHARE * (now_s - start_s), _LONGEST_S))

    def _are_here(self) -> bool:
        return bool(self._store.check([f"all/{self._turn}"]))
