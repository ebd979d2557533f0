"""The rows of every batch follow the measured speed of replicas, which train apart by plans of their own.

A replica's time for a row is that of its own steps, without the waiting for others. In one step of many all begin to
tell each other, in the background; in the next such step all know, and decide alike. New numbers of rows are first made
ready by every replica beside its steps, and hold from the step after all have told that they are. So nobody waits for
anybody that he would not wait for otherwise. Meanwhile readers read the rows of both.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from partita.cluster import Cluster
from partita.errors import PartitaError
from partita.runtime.background import Errand
from partita.runtime.transport import Line
from partita.training.dealing import Dealer, Patience
from partita.training.events import SharesChanged, WarningRaised, emit
from partita.training.slow import SlowProcesses, host_of
from partita.units import proportional, split_evenly

MIN_STEPS = 20  # from one meeting at which speeds are told to the next
NUM_MEASURED = 9  # steps before it whose median counts
NUM_TOLD = 3  # numbers of each replica, of 8 bytes
_NOT_YET, _READY, _IMPOSSIBLE = 0.0, 1.0, -1.0


def told_bytes(num_replicas: int) -> int:
    """What a replica sends when speeds are told: the numbers of all to all others (`Line.all_reduce` of so few)."""
    return 8 * NUM_TOLD * num_replicas * (num_replicas - 1)


def told_every(meets_every: int) -> int:
    """Steps from one telling to the next, of replicas that meet so often."""
    return meets_every * -(-MIN_STEPS // meets_every)


class ReplicaBalance:
    """How many rows of a batch each replica trains on, and when that changes.

    Args:
        num_rows: of the usual batch.
        rank: of this replica.
        num_replicas: all of them make the same calls.
        meets_every: steps from one meeting of the replicas to the next.
        cluster: names their machines.
        errand: begins an exchange in the background.
        prepare: begins to make this replica ready for another number of rows.
        is_prepared: whether it is.
        expected_s: what making ready is expected to take before it was done once.
        moves: whether rows may move; else who is slow is only named.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        rank: int,
        num_replicas: int,
        meets_every: int,
        cluster: Cluster,
        errand: Callable[[str, Callable[[Line], list[torch.Tensor]]], Errand],
        prepare: Callable[[int], None],
        is_prepared: Callable[[], bool],
        expected_s: Callable[[], float],
        moves: bool,
    ) -> None:
        self._rank, self._num, self._cluster, self._errand = rank, num_replicas, cluster, errand
        self._prepare, self._is_prepared, self._expected_s = prepare, is_prepared, expected_s
        self._every = told_every(meets_every)
        self._moves = moves
        dealer = Dealer(num_rows, least=1)
        dealer.start(num_replicas)
        self._patience = Patience(dealer, 0.0)
        self.counts = dealer.counts
        self.coming: tuple[int, ...] = ()  # counts that are made ready
        self._told: Errand | None = None
        self._readiness, self._cost_s, self._begun_s = _NOT_YET, 0.0, 0.0
        self._is_first = True  # whether the next step is the first one with its number of rows
        self._rows_s: deque[float] = deque(maxlen=NUM_MEASURED)
        self._slow = SlowProcesses()

    def rows(self, num_rows: int, rank: int, counts: Sequence[int] = ()) -> tuple[int, int]:
        """First and last (excluded) row of a replica, of a batch of so many rows."""
        dealt = _in_proportion(num_rows, counts or self.counts)
        start = sum(dealt[:rank])
        return start, start + dealt[rank]

    def rows_needed(self, num_rows: int) -> tuple[int, int]:
        """The rows of this replica; while others are made ready, those as well."""
        first, last = self.rows(num_rows, self._rank)
        start, end = self.rows(num_rows, self._rank, self.coming)
        return min(first, start), max(last, end)

    def made_step(self, time_s: float) -> None:
        """A step of this replica took `time_s` without waiting for others."""
        row_s = time_s / self.counts[self._rank]
        if self._is_first:  # it has made a runner
            usual_s = statistics.median(self._rows_s) if self._rows_s else 0.0
            self._cost_s += max(row_s - usual_s, 0.0) * self.counts[self._rank] if usual_s else 0.0
            self._rows_s.clear()
            self._is_first = False
            return
        self._rows_s.append(row_s)

    def after_step(self, step: int, is_settled: bool) -> bool:
        """All replicas have made step number `step`; whether the rows are dealt anew from the next one on.
        `is_settled`: whether this replica has adopted a plan."""
        if step % self._every:
            return False
        changed = self._hear(step) if self._told is not None else False
        self._tell(step, is_settled)
        return changed

    # Inside ----------------------------------------------------------------------------------------------------------

    def _tell(self, step: int, is_settled: bool) -> None:
        """Begins to tell the time for a row (0: not known yet), the state of preparation, and what a change takes."""
        self._look_whether_prepared()
        known = is_settled and bool(self._rows_s)
        cost_s = self._cost_s or self._expected_s()
        own = [statistics.median(self._rows_s) if known else 0.0, self._readiness, cost_s]
        told = torch.zeros(self._num, NUM_TOLD, dtype=torch.float64)
        told[self._rank] = torch.tensor(own, dtype=torch.float64)

        def add(line: Line) -> list[torch.Tensor]:
            line.all_reduce(told)
            return [told]

        self._told = self._errand(f"speeds of replicas after step {step}", add)

    def _hear(self, step: int) -> bool:
        assert self._told is not None
        rows_s, readiness, costs_s = self._told.wait()[0].T.tolist()
        self._patience.cost_s = max(costs_s)
        if self.coming:
            return self._settle(readiness, step)
        if min(rows_s) <= 0:  # some are still adopting a plan
            return False
        counts = self._patience.look(self._every, rows_s)
        if counts is not None:
            self._name_slow(counts)
            self._begin(counts)
        return False

    def _begin(self, counts: tuple[int, ...]) -> None:
        if not self._moves:
            self._patience.take(self.counts, self._patience.cost_s)
            return
        self.coming, self._readiness, self._begun_s = counts, _NOT_YET, time.perf_counter()
        try:
            self._prepare(counts[self._rank])
        except PartitaError as error:
            self._readiness = _IMPOSSIBLE
            message = f"the rows stay dealt as they are: {counts[self._rank]} rows cannot be had here: {error}"
            emit(WarningRaised(subject="shares", message=message))
        self._look_whether_prepared()

    def _look_whether_prepared(self) -> None:
        if self.coming and self._readiness == _NOT_YET and self._is_prepared():
            self._readiness, self._cost_s = _READY, time.perf_counter() - self._begun_s

    def _settle(self, readiness: Sequence[float], step: int) -> bool:
        """Takes the new counts if all are ready for them; drops them for good if one cannot be."""
        if min(readiness) == _IMPOSSIBLE:
            self.coming, self._moves = (), False
            self._patience.take(self.counts, self._patience.cost_s)
            return False
        if min(readiness) == _NOT_YET:
            return False
        self.counts, self.coming, self._readiness = self.coming, (), _NOT_YET
        self._patience.take(self.counts, self._patience.cost_s)
        self._is_first = True
        emit(SharesChanged(shares=self.counts, step=step + 1))
        return True

    def _name_slow(self, counts: Sequence[int]) -> None:
        times_s = self._patience.dealer.times_s
        for rank, time_s in enumerate(times_s):
            done = (
                f"so it gets {counts[rank]} rows of every batch instead of {self.counts[rank]}"
                if self._moves
                else "and the others wait for it when they meet, as rows are not dealt anew with this method or plan"
            )
            who = f"replica {rank} (host {host_of(self._cluster, rank)})"
            self._slow.name(rank, time_s / min(times_s), who, done, stacklevel=6)


def _in_proportion(num_rows: int, counts: Sequence[int]) -> tuple[int, ...]:
    """As many rows dealt like `counts`; evenly where that would leave one without."""
    if sum(counts) == num_rows:
        return tuple(counts)
    dealt = proportional(num_rows, tuple(counts))
    return dealt if min(dealt) >= 1 else split_evenly(num_rows, len(counts))
