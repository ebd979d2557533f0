"""Processes that take longer than the others for the same work are named, each once."""

from __future__ import annotations

import warnings

from partita.cluster import Cluster
from partita.training.events import WarningRaised, emit

SLOW = 1.5  # times the fastest process' time: whoever takes longer is named


class SlowProcessWarning(UserWarning):
    """A process takes longer than the others for the same work; the message says which, and what was done."""


class SlowProcesses:
    """Names those that take at least so many times as long as the fastest."""

    def __init__(self, least: float = SLOW) -> None:
        self._least = least
        self._named: set[int] = set()

    def name(self, process: int, slowness: float, who: str, done: str, stacklevel: int) -> None:
        """Warns the user, and tells whoever has subscribed to events, if this process takes that long and was not named
        yet; `done` says what is done about it, and `stacklevel` is that of the user's call, counted from the caller."""
        if slowness < self._least or process in self._named:
            return
        self._named.add(process)
        message = (
            f"{who} takes {slowness:.1f} times as long as the fastest for a row of the batch, {done}. "
            "Look at what else runs there"
        )
        warnings.warn(message, SlowProcessWarning, stacklevel=stacklevel + 1)
        emit(WarningRaised(subject="slow process", message=message))


def host_of(cluster: Cluster, rank: int) -> str:
    """The name of the machine that a process is on."""
    return next(cluster.machines[process.machine].name for process in cluster.processes if process.rank == rank)
