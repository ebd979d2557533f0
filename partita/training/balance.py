"""The rows of every batch follow the measured speed of the processes, while an exact plan trains.

Along the data axis every worker has its share of the rows (`Plan.shares`), and all wait for the last one. What a row
takes on a process is measured in a few steps now and then, without the waiting: the time in segments. All processes
tell each other, and so decide alike. If one is slow for so long that other shares pay, the same plan with these is made
ready beside the steps, its segments compiled where the plan's are, and takes over once everybody's batch has the rows
that it needs: a reader of parts of batches may have read some for the plan before. The mathematics stays as it is,
whatever the shares are.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from partita.cluster import Cluster
from partita.plan import Plan
from partita.program.timeline import Timeline
from partita.training.ahead import Preparation
from partita.training.block_runner import BlockRunner
from partita.training.dealing import Dealer, Patience
from partita.training.events import WarningRaised, emit
from partita.training.graph_runner import GraphRunner
from partita.training.inputs import BatchLeaves
from partita.training.job import Team
from partita.training.optimizers import OptimizerFacts
from partita.training.shares import can_move, columns_of, shares_of, unit_of, with_shares
from partita.training.slow import SlowProcesses, host_of

LOOK_TIME_S = 0.5  # from one look at the speeds to the next, about
MIN_STEPS = 10  # between looks
NUM_MEASURED = 3  # steps before a look that are recorded
NUM_OTHERS = 20  # steps of another kind of batch in a row, after which that one is looked at
# What a change is expected to take before there was one; then it is what the last one took.
MAKING_TIME_S, COMPILING_TIME_S = 1.0, 20.0

AnyRunner = GraphRunner | BlockRunner


class Balance:
    """Measures, decides, and makes the runner with other shares ready.

    Args:
        team: the processes of the job; all make the same calls.
        cluster: names their machines.
        facts: of the optimizer.
        make: makes the runner of a plan; all processes call it.
        moves: whether shares may change; else who is slow is only named.

    Use: before a step `records`, after it `after_step`; while there is a runner `coming`, `agree` before a step, and
    `take` once it says so.
    """

    def __init__(
        self,
        team: Team,
        cluster: Cluster,
        facts: Callable[[], OptimizerFacts],
        make: Callable[[GraphRunner, Plan], AnyRunner],
        *,
        moves: bool,
    ) -> None:
        self._team, self._cluster, self._facts, self._make, self._moves = team, cluster, facts, make, moves
        self.runner: AnyRunner | None = None  # whose steps are measured
        self.coming: GraphRunner | None = None
        self._patience: Patience | None = None  # of the rows of its batches; None: they cannot be moved
        self._preparation: Preparation | None = None
        self._error = ""
        self._started_s = 0.0
        self._cost_s: float | None = None
        self._num_others = 0
        self._slow = SlowProcesses()
        self._restart()

    @property
    def records(self) -> bool:
        """Whether the next step is to be recorded."""
        return self._patience is not None and self.coming is None and self._num_steps >= self._num_until - NUM_MEASURED

    def after_step(self, runner: AnyRunner, timeline: Timeline | None, time_s: float) -> None:
        """A step was made, by this runner."""
        if not self._is_followed(runner) or self._patience is None or not isinstance(runner, GraphRunner):
            return
        self._num_steps += 1
        self._steps_s.append(time_s)
        if timeline is not None:
            self._rows_s.append(row_time_s(timeline, runner.plan, runner.graph.batch_size, self._team.rank))
        if self._num_steps >= self._num_until and self.coming is None:
            self._look(self._patience)

    def rows_needed(self, runner: GraphRunner) -> tuple[int, int]:
        """First and last (excluded) row that this process needs for the next steps: either runner may make them."""
        first, last = runner.rows_needed()
        if self.coming is None or runner is not self.runner:
            return first, last
        start, end = self.coming.rows_needed()
        return min(first, start), max(last, end)

    def agree(self, leaves: BatchLeaves) -> bool:
        """Whether the batches of all processes have the rows that the coming runner needs."""
        assert self.coming is not None
        here = covers(leaves, self.coming.rows_needed())
        return all(self._team.gather(here, "the change to other shares of the rows"))

    def take(self) -> GraphRunner:
        """The coming runner, which makes the steps from now on."""
        assert self.coming is not None and self._preparation is not None
        self.runner, taken, self.coming = self.coming, self.coming, None
        self._preparation.close()
        self._preparation = None
        self._restart()
        return taken

    def close(self) -> None:
        """Ends what is being made ready."""
        if self._preparation is not None:
            self._preparation.close()
        if self.coming is not None:
            self.coming.close()
        self._preparation = self.coming = None

    # Inside ----------------------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        """Counts and measures from here on."""
        self._num_steps, self._num_until = 0, MIN_STEPS
        self._steps_s: deque[float] = deque(maxlen=NUM_MEASURED)
        self._rows_s: deque[float] = deque(maxlen=NUM_MEASURED)

    def _is_followed(self, runner: AnyRunner) -> bool:
        """Whether the steps of this runner are those that are measured: of the usual kind of batch."""
        if runner is self.runner:
            self._num_others = 0
            return True
        self._num_others += 1
        if self.runner is None or self._num_others > NUM_OTHERS:
            self.close()
            self._restart()
            self.runner, self._patience, self._num_others = runner, self._patience_for(runner), 0
        return False

    def _patience_for(self, runner: AnyRunner) -> Patience | None:
        if not isinstance(runner, GraphRunner) or not can_move(runner.plan):
            return None
        unit = unit_of(runner.plan, runner.graph.batch_size)
        dealer = Dealer(runner.graph.batch_size // unit, least=1)
        counts = [rows // unit for rows in shares_of(runner.plan, runner.graph.batch_size)]
        dealer.start(len(counts))
        dealer.take(counts)
        return Patience(dealer, expected_s(runner.plan) if self._cost_s is None else self._cost_s)

    def _look(self, patience: Patience) -> None:
        """All tell what a row took, and how far they are with a change; and decide."""
        assert isinstance(self.runner, GraphRunner)
        own = (
            statistics.median(self._rows_s) if self._rows_s else 0.0,
            statistics.median(self._steps_s),
            self._preparation is None or self._preparation.is_ready,
            self._error,
        )
        told = self._team.gather(own, "what a row of the batch takes")
        num_steps = self._num_steps
        self._restart()
        self._num_until = max(MIN_STEPS, int(LOOK_TIME_S / max(told[0][1], 1e-6)))
        rows_s = [one[0] for one in told]
        errors = [one[3] for one in told if one[3]]
        if errors:
            self._give_up(errors[0])
        elif self._preparation is not None:
            if all(one[2] for one in told):
                self._make_coming(patience)
        else:
            columns = columns_of(self.runner.plan)
            counts = patience.look(num_steps, [max(rows_s[rank] for rank in ranks) for ranks in columns])
            if counts is not None:
                self._name_slow(rows_s, columns, patience.dealer.times_s, counts)
                self._begin(self.runner, counts, patience)

    def _begin(self, runner: GraphRunner, counts: Sequence[int], patience: Patience) -> None:
        if not self._moves:
            patience.take(patience.dealer.counts, patience.cost_s)
            return
        unit = unit_of(runner.plan, runner.graph.batch_size)
        plan = with_shares(runner.plan, [unit * count for count in counts])
        self._started_s = time.perf_counter()
        try:
            self._preparation = Preparation(self._facts(), runner.graph, plan, self._team.rank)
        except Exception as error:  # whatever makes the plan impossible here is told, and all stay with what they have
            self._error = f"{type(error).__name__}: {error}"
            return
        if not plan.compiled:
            self._make_coming(patience)

    def _make_coming(self, patience: Patience) -> None:
        assert isinstance(self.runner, GraphRunner) and self._preparation is not None
        error, made, plan = "", None, self._preparation.plan
        try:
            made = self._make(self.runner, plan)
        except Exception as found:  # as above
            error = f"{type(found).__name__}: {found}"
        told = self._team.gather((error, time.perf_counter() - self._started_s), "the change to other shares")
        errors = [text for text, _ in told if text]
        if errors or not isinstance(made, GraphRunner):
            if made is not None:
                made.close()
            self._give_up(errors[0])
            return
        self.coming, self._cost_s = made, max(time_s for _, time_s in told)
        unit = unit_of(plan, made.graph.batch_size)
        patience.take([rows // unit for rows in plan.shares], self._cost_s)

    def _give_up(self, reason: str) -> None:
        self.close()
        self._error, self._patience = "", None
        message = f"the rows of the batch stay dealt as they are: other shares cannot be had: {reason}"
        emit(WarningRaised(subject="shares", message=message))

    def _name_slow(
        self,
        rows_s: Sequence[float],
        columns: Sequence[Sequence[int]],
        times_s: Sequence[float],
        counts: Sequence[int],
    ) -> None:
        """Names every process that makes its column slow, once."""
        assert isinstance(self.runner, GraphRunner)
        before = shares_of(self.runner.plan, self.runner.graph.batch_size)
        unit = unit_of(self.runner.plan, self.runner.graph.batch_size)
        for place, ranks in enumerate(columns):
            rank = max(ranks, key=lambda one: rows_s[one])
            done = (
                f"so it gets {unit * counts[place]} rows of every batch instead of {before[place]}"
                if self._moves
                else 'and all wait for it, as the plan was given: pass plan="auto" or Constraints to have it relieved'
            )
            who = f"process {rank} (host {host_of(self._cluster, rank)})"
            self._slow.name(rank, times_s[place] / min(times_s), who, done, stacklevel=5)


def expected_s(plan: Plan) -> float:
    """What it is expected to take to make the runner of a plan like this one."""
    return COMPILING_TIME_S if plan.compiled else MAKING_TIME_S


def row_time_s(timeline: Timeline, plan: Plan, num_rows: int, process: int) -> float:
    """What a row takes a process in its segments: the mean over its workers."""
    own = [worker for worker in plan.workers if worker.process == process]
    shares = shares_of(plan, num_rows)
    spent: Mapping[int, float] = {
        worker.index: sum(event.time_s for event in timeline.of_worker(worker.index) if event.kind == "Run")
        for worker in own
    }
    return statistics.fmean(spent[worker.index] / shares[worker.data] for worker in own)


def covers(leaves: BatchLeaves, needed: tuple[int, int]) -> bool:
    """Whether a batch has these rows; one that was read whole has all."""
    return all(
        first <= needed[0] and needed[1] <= first + leaves.tensors[index].shape[0]
        for index, first in leaves.offsets.items()
    )
