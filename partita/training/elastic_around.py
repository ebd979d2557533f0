"""What elastic steps share: who is there, who gets which pieces of a batch, and who is slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from partita.errors import InputError
from partita.training.around import StepAround
from partita.training.dealing import Dealer
from partita.training.events import MembersChanged, emit
from partita.training.inputs import cut_rows, take_apart
from partita.training.loading import ShardedBatch
from partita.training.membership import Elastic, Members, Round, State
from partita.training.setup import StepSetup
from partita.training.slow import SlowProcesses

MOST_TRIES = 100  # of one step; each ends with the loss of a process
# Times the fastest process' time, from which on a process is named. More than where `Patience` has seen first that it
# goes on for long: here pieces follow the times of single steps, and one that is slow for a moment is no news.
VERY_SLOW = 3.0


class ElasticAround(StepAround):
    """A step of processes that come and go, each of which holds the whole model.

    Args:
        setup: of this process alone.
        settings: of the job.
        batch: a global batch.
        method: how processes are synchronised (None: exactly), for checkpoints.
    """

    _members: Members

    def __init__(self, setup: StepSetup, settings: Elastic, batch: Any, method: object) -> None:
        self._setup, self._settings = setup, settings
        self._keeper = setup.keeper(method)
        self._num_rows = take_apart(batch).rows
        self._num_pieces = settings.num_pieces(self._num_rows)
        self._dealer = Dealer(self._num_pieces)
        self._round: Round | None = None
        self._slow = SlowProcesses(VERY_SLOW)

    @property
    def num_replicas(self) -> int:
        """Processes that were together last."""
        return self._round.num if self._round is not None else 1

    def rows_needed(self, num_rows: int) -> tuple[int, int]:
        """Any rows may be needed: who computes which is decided in the step."""
        return 0, num_rows

    def close(self) -> None:
        """Leaves the job, and completes a checkpoint that is being written."""
        self._members.close()
        self._keeper.close()
        self._inner.close()

    def _join(self, state: Callable[[], State], load: Callable[[State], None]) -> None:
        """Becomes one of the job's processes; see `Members`."""
        self._members = Members(self._settings, state, load)

    def _gather(self) -> Round:
        """Who is there. All are dealt to evenly where they are others than before."""
        current = self._members.gather()
        if self._round is None or current.number != self._round.number or current.num != self._round.num:
            self._dealer.start(current.num)
            self._slow = SlowProcesses(VERY_SLOW)  # places are other processes' now
            emit(MembersChanged(num_replicas=current.num, place=current.place, step=self.num_steps + 1))
        self._round = current
        return current

    def _learn(self, times_s: Sequence[float]) -> None:
        """Deals by the speeds that were measured, and names who is slow."""
        self._dealer.learn(times_s)
        slowness = self._dealer.slowness
        for place, times in enumerate(slowness):
            done = f"so it gets {self._dealer.counts[place]} of {self._num_pieces} pieces of every batch"
            self._slow.name(place, times, f"process {place} of {len(slowness)}", done, stacklevel=4)

    def _check(self, batch: Any, update: bool) -> None:
        if not update:
            raise InputError("an elastic step must update, since processes may go at any time; use larger batches")
        if isinstance(batch, ShardedBatch):
            raise InputError("an elastic step needs whole batches; pass the loader's as they are")
        rows = take_apart(batch).rows
        if rows != self._num_rows:
            raise InputError(
                f"every batch must have {self._num_rows} rows, as the first one, so that pieces are equal, but got "
                f"{rows}; drop the last one (drop_last=True)"
            )

    def _pieces(self, batch: Any, first: int, num: int = 1) -> Any:
        """The rows of `num` pieces from `first` on; pieces beyond the last one are the first ones again."""
        rows = self._num_rows // self._num_pieces
        start = first % self._num_pieces
        start = min(start, self._num_pieces - num)
        return cut_rows(batch, self._num_rows, start * rows, (start + num) * rows)
