"""Adoption: the best few plans and plain PyTorch run the first training steps in turns; the fastest is taken.

Every step trains: a candidate's first step can be undone, if it fails, and is then made again by another plan. Compiled
candidates come in when their segments have been compiled in the background. Plain PyTorch compiled as a whole comes
last: `torch.compile` works in this process alone, so its first step takes as long as that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from partita.errors import PartitaError
from partita.graph.graph import Graph
from partita.plan import Alternative, Plan
from partita.program import ProgramSet
from partita.program.timeline import Timeline
from partita.runtime.allocator import give_back_freed_memory
from partita.runtime.compiling import Background
from partita.training.ahead import compile_segments
from partita.training.block_runner import BlockRunner
from partita.training.events import CandidateMeasured, PlanChosen, emit
from partita.training.graph_runner import GraphRunner
from partita.training.job import Team
from partita.training.optimizers import OptimizerFacts
from partita.training.turns import Course, Turns

AnyRunner = GraphRunner | BlockRunner
MakeRunner = Callable[[Plan], AnyRunner]
Reprice = Callable[[Plan, ProgramSet, Sequence[Timeline]], Plan]
NUM_OBSERVED = 5  # steps of the winner that are recorded


def describe(plan: Plan) -> str:
    """A plan in a few words.

    Example:
        "2 data x 1 pipeline, 1 thread each, compiled"
    """
    kind = ", compiled" if plan.compiled else ""
    if plan.mode == "block":
        return f"plain PyTorch, {plan.threads_per_worker} thread(s){kind}"
    data, pipeline = plan.axes.get("data", 1), plan.axes.get("pipeline", 1)
    micro = f", {plan.num_microbatches} microbatches ({plan.schedule})" if plan.num_microbatches > 1 else ""
    return f"{data} data x {pipeline} pipeline, {plan.threads_per_worker} thread(s) each{micro}{kind}"


@dataclass
class _Candidate:
    plan: Plan
    runner: AnyRunner | None = None
    compiling: list[Future[Any]] = field(default_factory=list)
    was_tried: bool = False  # has run a step to its end

    @property
    def is_compiled_block(self) -> bool:
        return self.plan.mode == "block" and self.plan.compiled

    @property
    def is_compiled_graph(self) -> bool:
        return self.plan.mode == "graph" and self.plan.compiled

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Plain PyTorch first, then fewer workers, then without a compiler."""
        return (int(self.plan.mode != "block"), self.plan.num_workers, int(self.plan.compiled))


@dataclass(frozen=True)
class _News:
    """What the processes tell each other before a step of the adoption."""

    compiled: tuple[bool, ...]  # by candidate: nothing of it is being compiled any more
    time_s: float | None  # of the last step
    can_undo: bool


class Adoption:
    """Decides which runner makes the next step, until a plan is adopted.

    Args:
        plans: the candidates.
        start: index of the one that makes the first steps; it must need no compiling.
        provisional: it does so only until another can, whatever their times.
        graph: the captured step.
        make: makes a plan's runner on the user's own model and optimizer.
        team: the processes of the job; all make the same calls.
        facts: of the optimizer.
        started_s: `time.perf_counter` when the user called.
        can_undo: whether this process has the memory to undo a step.
        reprice: the plan, its programs and timelines of its steps in; the plan with the step time predicted from these
            out. All processes make the call.

    Use: before every step `next_runner`, after it `finished` or `failed`.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        start: int,
        provisional: bool = False,
        graph: Graph,
        make: MakeRunner,
        team: Team,
        facts: OptimizerFacts,
        started_s: float,
        can_undo: Callable[[], bool],
        reprice: Reprice,
    ) -> None:
        self.graph = graph
        self._make, self._team, self._facts = make, team, facts
        self._started_s, self._can_undo_here, self._reprice = started_s, can_undo, reprice
        self._observed: list[Timeline] = []
        self.records = False  # whether the next step is to be recorded
        self._candidates = [_Candidate(plan) for plan in plans]
        self._turns = Turns(
            [candidate.simplicity for candidate in self._candidates], start=start, provisional=provisional
        )
        self._index = start
        self._background: Background | None = None
        self._num_steps = 0
        self._has_asked_compiler = False
        self.is_complete = False  # whether all candidates were tried
        self._time_s: float | None = None
        self.can_undo = True  # whether all processes have the memory for it
        self.adopted: Plan | None = None

    @property
    def plan(self) -> Plan:
        """The best one so far."""
        return self.adopted or self._candidates[self._turns.best].plan

    @property
    def is_first_try(self) -> bool:
        """Whether the runner that `next_runner` gave has not made a step yet, and is not the one that began."""
        return self._num_steps > 0 and not self._candidates[self._index].was_tried

    def next_runner(self) -> AnyRunner:
        """The runner of the next step. Sets `adopted` when there is nothing left to find out.

        Raises:
            PartitaError: no candidate can run; says why for each.
        """
        if self._num_steps == 1 and not self._has_asked_compiler:  # not before the first step: it lowers plans
            self._has_asked_compiler = True
            self._compile_ahead()
        compiled = self._exchange()
        while True:
            coming, ready = self._prospects(compiled)
            self._index = self._turns.next(ready, calm=all(compiled))
            is_over = self._num_steps > 0 and self._turns.is_over(coming)
            runner = self._prepared(self._index)
            self.records = is_over and isinstance(runner, GraphRunner) and len(self._observed) < NUM_OBSERVED
            if is_over and runner is not None and not self.records:
                self.is_complete = True
                self._adopt()
            if runner is not None:
                return runner

    def finished(self, time_s: float, timeline: Timeline | None = None) -> None:
        """The step was made, by the runner that `next_runner` gave."""
        self._candidates[self._index].was_tried = True
        self._num_steps += 1
        self._time_s = time_s
        if self.records and timeline is not None:
            self._observed.append(timeline)

    def failed(self, error: BaseException | str) -> None:
        """That runner could not make its step; everything is as before it."""
        self._out(self._index, error if isinstance(error, str) else f"{type(error).__name__}: {error}")

    def conclude(self) -> None:
        """Adopt what is best so far."""
        if self.adopted is None:
            self._turns.stop()
            self._adopt()

    def _adopt(self) -> None:
        self._index = self._turns.best
        self.adopted = self._report()
        runner = self.runner
        if self._observed and self.is_complete and isinstance(runner, GraphRunner):
            self.adopted = self._reprice(self.adopted, runner.programs, self._observed)
        emit(PlanChosen(plan=self.adopted, time_s=time.perf_counter() - self._started_s))

    @property
    def runner(self) -> AnyRunner | None:
        """That of the best plan, if it has been made."""
        return self._candidates[self._turns.best].runner

    def measured(self) -> list[tuple[Plan, float]]:
        """What was measured, fastest first."""
        found = [(c.plan, course.median_s) for c, course in self._pairs() if course.times_s and not course.failed]
        return sorted(found, key=lambda pair: pair[1])

    def close(self, *, keep: AnyRunner | None = None) -> None:
        """End the compiling, and all runners but one."""
        if self._background is not None:
            self._background.close()
            self._background = None
        for candidate in self._candidates:
            if candidate.runner is not None and candidate.runner is not keep:
                candidate.runner.close()
                candidate.runner = None

    # Inside ----------------------------------------------------------------------------------------------------------

    def _pairs(self) -> list[tuple[_Candidate, Course]]:
        return list(zip(self._candidates, self._turns.courses, strict=True))

    def _compile_ahead(self) -> None:
        """Has the segments of compiled candidates compiled, those of the best first."""
        wanted = [candidate for candidate in self._candidates if candidate.is_compiled_graph]
        if not wanted:
            return
        self._background = Background()
        for candidate in wanted:
            candidate.compiling += compile_segments(
                self._facts, self.graph, candidate.plan, self._team.rank, self._background
            )

    def _exchange(self) -> list[bool]:
        """Tells the others, and records what rank 0 has measured; for every candidate whether all have compiled it."""
        compiled = tuple(all(future.done() for future in candidate.compiling) for candidate in self._candidates)
        told = self._team.gather((compiled, self._time_s, self._can_undo_here()), "the adoption of a plan")
        news = [_News(*one) for one in told]
        times_s = [one.time_s for one in news if one.time_s is not None]
        if times_s:  # all began together; of a pipeline, who has the last stage is through long before the others
            self._turns.record(max(times_s))
        self._time_s = None
        self.can_undo = all(one.can_undo for one in news)
        self._close_losers()
        return [all(one.compiled[index] for one in news) for index in range(len(self._candidates))]

    def _prospects(self, compiled: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """Which candidates may still come, and which are ready."""
        begun = self._num_steps > 0
        coming = [not course.failed for course in self._turns.courses]
        ready = [begun and here and done for here, done in zip(coming, compiled, strict=True)]
        last = [candidate.is_compiled_block for candidate in self._candidates]
        others = [
            here and not late and (not course.has_raced or self._turns.may_race_again(index))
            for index, (here, course, late) in enumerate(zip(coming, self._turns.courses, last, strict=True))
        ]
        if any(others):  # what takes this process' own time to compile waits until all others have had their turns
            ready = [here and not late for here, late in zip(ready, last, strict=True)]
        return coming, ready

    def _prepared(self, index: int) -> AnyRunner | None:
        """The candidate's runner; None, and the candidate is out, if some process cannot make it."""
        candidate = self._candidates[index]
        if candidate.runner is not None:
            return candidate.runner
        error = ""
        try:
            candidate.runner = self._make(candidate.plan)
        except Exception as found:  # a candidate that cannot be set up is no candidate; the others go on
            error = f"{type(found).__name__}: {found}"
        give_back_freed_memory()  # this one's places may not be those that others have left
        errors = [text for text in self._team.gather(error, "the setting up of a candidate plan") if text]
        if not errors:
            return candidate.runner
        self._out(index, errors[0])
        return None

    def _out(self, index: int, reason: str) -> None:
        candidate = self._candidates[index]
        self._observed.clear()
        self._turns.fail(index, f"could not run: {reason}"[:400])
        if candidate.runner is not None:
            with contextlib.suppress(Exception):
                candidate.runner.close()
            candidate.runner = None
        if all(course.failed for course in self._turns.courses):
            listed = "; ".join(f"{describe(c.plan)}: {course.failed}" for c, course in self._pairs())
            raise PartitaError(f"no candidate plan could run: {listed}")

    def _close_losers(self) -> None:
        """Those that have raced and lost hold threads and copies of weights that nobody needs."""
        for index, (candidate, course) in enumerate(self._pairs()):
            racing = self._turns.is_racing(index)
            over = course.has_raced and not racing and not self._turns.may_race_again(index)
            lost = over and index != self._turns.best
            if candidate.runner is not None and lost and index != self._index:  # the current one hands over first
                candidate.runner.close()
                candidate.runner = None

    def _report(self) -> Plan:
        """The adopted plan, with what was tried."""
        best, course = self._pairs()[self._turns.best]
        best_s = course.median_s if course.times_s else None
        others: list[tuple[float, Alternative]] = []
        for candidate, other in self._pairs():
            time_s = other.median_s if other.times_s else None
            predicted_s = candidate.plan.prediction.step_time_s if candidate.plan.prediction else 0.0
            emit(
                CandidateMeasured(
                    description=describe(candidate.plan),
                    plan=candidate.plan,
                    predicted_step_time_s=predicted_s,
                    step_time_s=None if other.failed else time_s,
                    failed=other.failed,
                )
            )
            if candidate is best:
                continue
            alternative = Alternative(
                description=describe(candidate.plan),
                predicted_step_time_s=predicted_s,
                measured_step_time_s=time_s,
                reason=_reason(other, best_s),
            )
            others.append((time_s if time_s is not None else float("inf"), alternative))
        tried = [candidate for candidate, other in self._pairs() if other.times_s and not other.failed]
        plain = ", plain PyTorch among them" if any(c.plan.mode == "block" for c in tried) else ""
        reason = f"measured fastest of {len(tried)} candidates in the first training steps{plain}"
        return msgspec.structs.replace(
            best.plan,
            measured_step_time_s=best_s,
            alternatives=tuple(one for _, one in sorted(others, key=lambda pair: pair[0])),
            reasons=(*best.plan.reasons, *((reason,) if best_s is not None else ())),
        )


def _reason(course: Course, best_s: float | None) -> str:
    """Why the candidate was not adopted."""
    if course.failed:
        return course.failed
    if not course.times_s or best_s is None:
        return "not tried before a plan had to be adopted"
    ratio = course.median_s / best_s
    tie = " (a tie; the simpler plan is taken)" if ratio < 1 else ""
    return f"measured {ratio:.2f} times the step time of the adopted plan{tie}"
