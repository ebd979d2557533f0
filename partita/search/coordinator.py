"""Runs a search: starts trials, listens to them, decides who trains on, and sees to it that the end is met.

Everything that decides is pure and elsewhere (`allocation`, `curves`, `deadline`); here are processes and their order.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median

from partita.cluster import Cluster
from partita.errors import SearchError
from partita.search.allocation import Standing, goes_on, next_promoted, ordered
from partita.search.candidates import Aims, Candidate, best_of, standings
from partita.search.deadline import Budget, rung_s
from partita.search.messages import (
    Ended,
    Failed,
    FromTrial,
    Go,
    Judged,
    Order,
    Ready,
    Rejected,
    RungEnd,
    Stop,
    Suggest,
)
from partita.search.pricing import Limits
from partita.search.processes import TrialProcess
from partita.search.report import values_of
from partita.search.study import GRACE_S, HEARTBEAT_S, Study
from partita.units import split_evenly

PLANNED_FROM_S = 30.0  # finding a plan and compiling it takes seconds, of which no more than a tenth should be lost
MOST_KEPT = 32  # checkpoints of waiting candidates
MOST_FINAL_FAILURES = 3  # of one candidate, one after the other
LEAST_START_S = 20.0  # for a trial to begin
SILENCE = 3.0  # a trial is ended that has told nothing for so many times as long as it should take
LEAST_SILENCE_S = 10.0
STOP_LIMIT_S = 3.0
TICK_S = 0.1
NOTED_EVERY_S = 1.0  # points of a curve are kept at most so often, and at the end of each rung
DELIVERED = "delivered"
NUM_BROKEN = 3  # candidates that raised, and none that did not: the user's code is broken


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a search is to keep to, besides its task and time."""

    folder: Path
    task_file: Path
    modules: list[str]
    everywhere: Cluster
    limits: Limits
    seed: int
    num_slots: int | None  # None: by `Budget.num_slots`
    max_trials: int | None  # candidates
    retries: int  # of a candidate whose process died


@dataclass
class _Running:
    """A trial whose process lives."""

    number: int
    candidate: int
    process: TrialProcess
    cores: tuple[int, ...]
    is_final: bool
    started_s: float
    due_s: float  # it must have told something by then
    is_stopping: bool = False
    is_ready: bool = False
    saved: bool = False
    beaten_s: float = field(default_factory=time.time)
    noted_s: float = 0.0


class Coordinator:
    """One search. `run` returns the candidate whose weights are to be delivered."""

    def __init__(
        self, study: Study, aims: Aims, budget: Budget, settings: Settings, tell: Callable[[str], None]
    ) -> None:
        self._study, self._aims, self._budget, self._settings, self._tell = study, aims, budget, settings, tell
        self._running: list[_Running] = []
        self._startups_s: list[float] = []
        self._first_rung_s: float | None = study.read("first_rung_s")
        self._final: int | None = study.read("final")
        self._final_failures = 0
        self._looked_s = time.time()  # for trials of other searches
        self.candidates, interrupted = study.recover()
        for candidate in interrupted:
            self._recover(candidate)

    # The course of things --------------------------------------------------------------------------------------

    def run(self) -> Candidate:
        """Explores, trains the best candidate, and returns it.

        Raises:
            SearchError: no candidate could be trained.
        """
        try:
            while (found := self._delivered()) is None:
                self._fill()
                self._listen()
                self._watch()
            return found
        finally:
            for one in list(self._running):
                self._lose(one, "the search has ended", kill=True)

    def _delivered(self) -> Candidate | None:
        """What is to be delivered, once the final training is over or no time is left."""
        now_s = time.time()
        final = None if self._final is None else self.candidates[self._final]
        if final is not None and final.why == DELIVERED:
            return final
        if now_s < self._budget.deadline_s - self._budget.margin_s / 2 and not self._is_exhausted():
            return None
        for one in list(self._running):
            one.is_stopping = True
            self._lose(one, "no time is left", kill=True)
        if final is not None and final.is_saved:
            return final
        best = best_of(self._all(), self._aims, self._budget, now_s)
        if best is None:
            raise SearchError(self._nothing())
        return best

    def _all(self) -> list[Candidate]:
        return list(self.candidates.values())

    def _is_exhausted(self) -> bool:
        """Whether nothing that could be delivered is to be expected any more."""
        raised = [one for one in self._all() if one.state == "raised"]
        if len(raised) >= NUM_BROKEN and len(raised) == len(self.candidates):
            raise SearchError(f"every candidate raises an error, the last one:\n{raised[-1].why}")
        if self._running:
            return False
        if self._is_explored():
            return self._final_candidate() is None
        return not self._has_waiting() and not self._may_propose(time.time())

    def _nothing(self) -> str:
        reasons = [one.why for one in self.candidates.values() if one.why]
        told = f" The last reason: {reasons[-1]}" if reasons else ""
        return (
            f"the search must have trained a candidate to deliver one, but none of {len(self.candidates)} was judged "
            f"before the deadline.{told} Give it more time, or a smaller space"
        )

    def _is_explored(self) -> bool:
        """Whether exploring is over: by its time or because as many candidates as were wanted are through, once there
        is one to go on with."""
        if self._final is not None:
            return True
        if not self._has_waiting() and not any(one.saved for one in self._running):
            return False
        if time.time() >= self._budget.explore_end_s:
            return True
        is_full = not self._running and self._is_full()
        return is_full and next_promoted(self._standings()) is None

    def _has_waiting(self) -> bool:
        return any(one.state == "waiting" for one in self._all())

    def _is_full(self) -> bool:
        """Whether as many candidates were proposed as were wanted; those that are tried again count once."""
        retried = [one for one in self._all() if one.state == "failed" and one.failures <= self._settings.retries]
        most = self._settings.max_trials
        return most is not None and len(self.candidates) - len(retried) >= most

    # Starting --------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Starts what should run now and does not."""
        if self._is_explored():
            self._stop_exploring()
            if not self._running:
                self._start_final()
            return
        now_s = time.time()
        num_cores = self._settings.everywhere.num_cores
        num_slots = self._settings.num_slots or self._budget.num_slots(num_cores, now_s)
        while len(self._running) < num_slots:
            cores = self._free_cores(num_slots)
            number = next_promoted(self._standings())
            if number is not None:
                self._start(self._study.continued(self.candidates[number]), number, cores)
            elif self._may_propose(now_s):
                trial = self._study.propose()
                self._start(trial, trial, cores)
            else:
                break

    def _may_propose(self, now_s: float) -> bool:
        """Whether a new candidate could still be judged while exploring lasts, or there is none at all."""
        if self._is_full():
            return False
        needed_s = (self._first_rung_s or 0.0) + self._startup_s()
        is_worth_it = now_s + needed_s < self._budget.explore_end_s
        return is_worth_it or not (self._running or self._has_waiting())

    def _free_cores(self, num_slots: int) -> tuple[int, ...]:
        """The cores of a new trial: its share of all, of those that nobody has if there are any."""
        cores = [core for process in self._settings.everywhere.processes for core in process.cores]
        taken = {core for one in self._running for core in one.cores}
        size = max(split_evenly(len(cores), num_slots))
        free = [core for core in cores if core not in taken]
        return tuple(free[:size] or cores[:size])

    def _start(self, trial: int, number: int, cores: tuple[int, ...], *, is_final: bool = False) -> None:
        candidate = self.candidates.get(number)
        resumed = candidate is not None
        if candidate is None:
            candidate = Candidate(number=number, failures=self._study.failures(number))
        now_s, settings = time.time(), self._settings
        self.candidates[number] = dataclasses.replace(candidate, state="running", why="")
        self._study.note(trial, self.candidates[number])
        order = Order(
            task_file=str(settings.task_file),
            folder=str(self._folder(number)),
            number=number,
            seed=settings.seed,
            known=candidate.params,
            resumed=resumed,
            cores=cores,
            everywhere=settings.everywhere,
            limits=settings.limits,
            final=(self._final_begin_s(), self._budget.last_s) if is_final else None,
            best_score=candidate.best_score,
            planned_from_s=PLANNED_FROM_S,
        )
        process = TrialProcess(order, settings.modules)
        due_s = now_s + max(LEAST_START_S, (self._budget.explore_end_s - self._budget.start_s) / 2)
        self._running.append(
            _Running(
                number=trial,
                candidate=number,
                process=process,
                cores=cores,
                is_final=is_final,
                started_s=now_s,
                due_s=due_s,
                saved=candidate.is_saved,
            )
        )

    def _start_final(self) -> None:
        candidate = self._final_candidate()
        if candidate is None:
            return
        if self._final != candidate.number:
            self._final, self._final_failures = candidate.number, 0
            self._study.write("final", candidate.number)
            if self._study.read("final_begin_s") is None:
                self._study.write("final_begin_s", time.time())
            self._tell(f"candidate {candidate.number} is trained until the deadline: {values_of(candidate)}")
        cores = tuple(core for process in self._settings.everywhere.processes for core in process.cores)
        self._start(self._study.continued(candidate), candidate.number, cores, is_final=True)

    def _final_candidate(self) -> Candidate | None:
        """Whom the final training is for: the one that has begun it, or the best that can be trained on."""
        chosen = None if self._final is None else self.candidates[self._final]
        if chosen is not None and chosen.state == "waiting" and self._final_failures < MOST_FINAL_FAILURES:
            return chosen
        others = [one for one in self._all() if one.number != self._final]
        return best_of(others, self._aims, self._budget, time.time())

    def _final_begin_s(self) -> float:
        return float(self._study.read("final_begin_s") or time.time())

    def _stop_exploring(self) -> None:
        for one in self._running:
            if not one.is_final and not one.is_stopping:
                self._stop(one)

    def _stop(self, one: _Running) -> None:
        one.is_stopping, one.due_s = True, time.time() + STOP_LIMIT_S
        one.process.send(Stop())

    # Listening -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Handles what trials have told, waiting a moment if none has."""
        lines = [line for one in self._running for line in one.process.waits_for]
        ready = set(wait(lines, timeout=TICK_S)) if lines else set()
        if not lines:
            time.sleep(TICK_S)
        for one in list(self._running):
            if not ready.intersection(one.process.waits_for):
                continue
            try:
                while one in self._running and (message := one.process.receive()) is not None:
                    self._handle(one, message)
            except EOFError:
                self._lose(one, "", kill=False)

    def _handle(self, one: _Running, message: FromTrial) -> None:
        candidate = self.candidates[one.candidate]
        one.due_s = max(one.due_s, time.time() + LEAST_SILENCE_S) if not one.is_stopping else one.due_s
        match message:
            case Suggest():
                one.process.send(self._study.suggest(one.number, message))
            case Ready():
                self._ready(one, candidate, message)
            case Judged():
                self._judged(one, candidate, message)
            case RungEnd():
                self._rung_end(one, candidate)
            case Ended():
                self._ended(one, candidate, message)
            case Rejected():
                self._rejected(one, candidate, message)
            case Failed():
                self._end(one, dataclasses.replace(candidate, state="raised", why=message.error))
                self._tell(f"candidate {candidate.number} failed: {message.error.strip().splitlines()[-1]}")

    def _ready(self, one: _Running, candidate: Candidate, message: Ready) -> None:
        price, now_s = message.price, time.time()
        one.is_ready = True
        self._startups_s.append(now_s - one.started_s)
        notes = (price.note,) if price.note else ()
        candidate = dataclasses.replace(
            candidate,
            params=candidate.params or self._study.params(one.number),
            wide_gain=price.wide_gain,
            num_parameters=price.num_parameters,
            memory_bytes=price.memory_bytes,
            batch_size=message.batch_size,
            notes=notes,
        )
        self._keep(one, candidate, **{f"user_{name}": value for name, value in message.attributes.items()})
        if one.is_stopping:
            return
        if self._first_rung_s is None:
            self._first_rung_s = self._budget.first_rung_s(self._startup_s())
            self._study.write("first_rung_s", self._first_rung_s)
        if one.is_final:
            self._go(one, float("inf"), self._budget.last_s - now_s)
        else:
            until_s = rung_s(self._first_rung_s, candidate.rung + 1)
            self._go(one, until_s, max(0.1, until_s - candidate.train_s))

    def _go(self, one: _Running, until_s: float, granted_s: float) -> None:
        one.due_s = time.time() + SILENCE * min(granted_s, self._budget.final_s) + LEAST_SILENCE_S
        one.process.send(Go(until_s=until_s, granted_s=granted_s))

    def _judged(self, one: _Running, candidate: Candidate, message: Judged) -> None:
        changes: dict[str, object] = {"plan": message.plan, "num_cores": message.num_cores}
        if message.samples_per_s > 0:
            changes |= {"samples_per_s": message.samples_per_s, "step_time_s": message.step_time_s}
        candidate = candidate.with_point(message.point, **changes)
        if one.is_final:
            score, kept = message.point.score, candidate.best_score
            better = max if self._aims.maximize else min
            candidate = dataclasses.replace(candidate, best_score=score if kept is None else better(kept, score))
        self.candidates[candidate.number] = candidate
        if one.is_final or time.time() - one.noted_s > NOTED_EVERY_S:
            one.noted_s = time.time()
            self._keep(one, candidate)

    def _rung_end(self, one: _Running, candidate: Candidate) -> None:
        """A candidate has trained as far as it may: it goes on if it is among the best, and not if others wait for its
        cores by being better."""
        assert self._first_rung_s is not None
        one.saved = True
        rung = candidate.rung
        while candidate.train_s >= rung_s(self._first_rung_s, rung + 1):
            rung += 1
        candidate = dataclasses.replace(candidate, rung=rung, is_saved=True)
        self._keep(one, candidate)
        if one.is_stopping:
            return
        if self._is_explored() or candidate.rung < 0 or not goes_on(candidate.number, self._standings()):
            self._stop(one)
            return
        until_s = rung_s(self._first_rung_s, candidate.rung + 1)
        self._go(one, until_s, until_s - candidate.train_s)

    def _ended(self, one: _Running, candidate: Candidate, message: Ended) -> None:
        if one.is_final:
            self._end(one, dataclasses.replace(candidate, state="waiting", why=DELIVERED))
            return
        is_saved = message.saved and bool(candidate.points)
        self._end(one, dataclasses.replace(candidate, state="waiting" if is_saved else "gone", is_saved=is_saved))
        self._forget_worst()
        if candidate.points:
            forecast = self._aims.predicted(candidate, self._budget, time.time())
            self._tell(
                f"candidate {candidate.number}: score {candidate.score:.4g} after {candidate.train_s:.2g} s, "
                f"{forecast.score:.4g} predicted for the deadline; {values_of(candidate)}"
            )

    def _rejected(self, one: _Running, candidate: Candidate, message: Rejected) -> None:
        price = message.price
        if price is not None:
            candidate = dataclasses.replace(
                candidate, num_parameters=price.num_parameters, memory_bytes=price.memory_bytes
            )
        self._tell(f"candidate {candidate.number} is not trained: {message.reason}")
        if one.is_final:  # from its checkpoint it may get further; others come after some trials of that
            self._final_failures += 1
            self._end(one, dataclasses.replace(candidate, state="waiting", why=message.reason))
            return
        params = candidate.params or self._study.params(one.number)
        self._end(one, dataclasses.replace(candidate, params=params, state="rejected", why=message.reason))

    # Ending ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Ends trials that are silent for too long, and tells the storage of those that live."""
        now_s = time.time()
        for one in list(self._running):
            if now_s > one.due_s and not (one.is_stopping and self._is_needed()):
                waited = "to stop" if one.is_stopping else "for a sign of it"
                self._lose(one, f"it was ended after waiting {waited} for too long", kill=True)
            elif now_s - one.beaten_s > HEARTBEAT_S:
                one.beaten_s = now_s
                self._study.beat(one.number)
        if now_s - self._looked_s > GRACE_S:
            self._looked_s = now_s
            self._study.fail_stale()

    def _is_needed(self) -> bool:
        """Whether a trial that is slow to save its candidate is waited for, because there is no other candidate."""
        return not self._has_waiting() and time.time() < self._budget.last_s

    def _lose(self, one: _Running, reason: str, *, kill: bool) -> None:
        """A process is gone, or is ended, without having said so."""
        self._running.remove(one)
        ended = one.process.end(kill=kill)
        reason = reason or ended or "its process has ended without a word"
        candidate = self.candidates[one.candidate]
        params = candidate.params or self._study.params(one.number)
        is_saved = bool(candidate.points) and self._has_weights(candidate)
        candidate = dataclasses.replace(candidate, params=params, is_saved=is_saved)
        if one.is_stopping:  # it was to end anyway
            self._finish(one, dataclasses.replace(candidate, state="waiting" if is_saved else "gone"))
            return
        candidate = dataclasses.replace(candidate, state="failed", why=reason, failures=candidate.failures + 1)
        self._finish(one, candidate)
        self._tell(f"candidate {candidate.number}: {reason}")
        if one.is_final:
            self._final_failures += 1
        self._recover(candidate)

    def _recover(self, candidate: Candidate) -> None:
        """A candidate whose process died waits to go on from its checkpoint, or is proposed again, or has failed."""
        if candidate.points and self._has_weights(candidate):
            self.candidates[candidate.number] = dataclasses.replace(candidate, state="waiting", why="", is_saved=True)
            return
        why = candidate.why or "the search was interrupted while it was trained"
        self.candidates[candidate.number] = dataclasses.replace(candidate, state="failed", why=why)
        if candidate.failures <= self._settings.retries:
            self._study.again(candidate)

    def _end(self, one: _Running, candidate: Candidate) -> None:
        """A process has said that it ends."""
        self._running.remove(one)
        one.process.end(kill=False)
        self._finish(one, candidate)

    def _finish(self, one: _Running, candidate: Candidate) -> None:
        self.candidates[candidate.number] = candidate
        score = None
        if candidate.points:
            score = self._aims.predicted(candidate, self._budget, time.time()).score
        if one.is_final and candidate.best_score is not None:
            score = candidate.best_score
        self._study.finish(one.number, candidate, score=score)

    def _keep(self, one: _Running, candidate: Candidate, **attributes: object) -> None:
        self.candidates[candidate.number] = candidate
        self._study.note(one.number, candidate, **attributes)

    # What it knows ---------------------------------------------------------------------------------------------

    def _standings(self) -> list[Standing]:
        return standings(self.candidates.values(), self._aims, self._budget, time.time())

    def _startup_s(self) -> float:
        return median(self._startups_s) if self._startups_s else 0.0

    def _folder(self, number: int) -> Path:
        return self._settings.folder / "candidates" / str(number)

    def _has_weights(self, candidate: Candidate) -> bool:
        return any(self._folder(candidate.number).glob("step-*/checkpoint.json"))

    def _forget_worst(self) -> None:
        """Removes checkpoints of those that wait with the least prospect."""
        waiting = [one for one in self._standings() if one.is_waiting]
        for place in ordered([one.values for one in waiting])[MOST_KEPT:]:
            number = waiting[place].number
            shutil.rmtree(self._folder(number), ignore_errors=True)
            self.candidates[number] = dataclasses.replace(self.candidates[number], state="gone", is_saved=False)
