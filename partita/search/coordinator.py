"""Runs a search: starts the processes of trials, listens to them, and sees to it that the end is met.

What is to happen is decided by `course`; here are processes, their messages and the limits of waiting for them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Literal

from partita.cluster import Cluster
from partita.errors import SearchError
from partita.search.candidates import Candidate
from partita.search.course import DELIVERED, Course
from partita.search.deadline import FACTOR
from partita.search.messages import (
    Ended,
    Failed,
    FromTrial,
    Go,
    Judged,
    Order,
    Priced,
    Ready,
    Rejected,
    RungEnd,
    Stop,
    Suggest,
)
from partita.search.pricing import Limits, Price
from partita.search.processes import Server, TrialProcess
from partita.search.report import values_of
from partita.search.study import GRACE_S, HEARTBEAT_S
from partita.units import split_evenly

LEAST_START_S = 20.0  # for a trial to begin, and to be judged first
SILENCE, LEAST_SILENCE_S = 3.0, 60.0  # a trial is ended that tells nothing for three times as long as the last time
TOLD_TIMES = 10  # lines about the final training
STOP_LIMIT_S, STOP_SHARE = 3.0, 0.05  # of the final training, for a trial to judge and save its candidate
TICK_S = 0.1
NOTED_EVERY_S = 1.0  # points of a curve are kept at most so often, and at the end of each rung


# "final": the chosen candidate's training until the deadline; "runner-up": that of another one on cores that it leaves.
Role = Literal["explorer", "final", "runner-up"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What trials are started with.

    Args:
        everywhere: all cores.
        target: what the network is searched for; None: these cores.
        num_slots: trials side by side; None: by `Budget.num_slots`.
    """

    task_file: Path
    everywhere: Cluster
    target: Cluster | None
    limits: Limits
    seed: int
    num_slots: int | None

    @property
    def cores(self) -> tuple[int, ...]:
        return tuple(core for process in self.everywhere.processes for core in process.cores)


@dataclass
class _Running:
    """A trial whose process lives."""

    number: int
    candidate: int
    process: TrialProcess
    cores: tuple[int, ...]
    role: Role
    started_s: float
    due_s: float  # it must have told something by then
    idle_cores: tuple[int, ...] = ()  # of its own, those that its plan leaves to others
    is_stopping: bool = False
    is_given_up: bool = False  # it stops because it is past its best
    beaten_s: float = field(default_factory=time.time)
    heard_s: float = field(default_factory=time.time)
    told_s: float = 0.0
    noted_s: float = 0.0

    @property
    def is_final(self) -> bool:
        return self.role == "final"

    @property
    def explores(self) -> bool:
        return self.role == "explorer"


class Coordinator:
    """One search. `run` returns the candidate that is to be delivered."""

    def __init__(self, course: Course, settings: Settings, server: Server, tell: Callable[[str], None]) -> None:
        self._course, self._study, self._budget = course, course.study, course.budget
        self._settings, self._server, self._tell = settings, server, tell
        self._running: list[_Running] = []
        self._startups_s: list[float] = []
        self._looked_s = time.time()  # for trials of other searches

    def run(self) -> Candidate:
        """Explores, and trains the best candidate until the end.

        Raises:
            SearchError: no candidate could be trained.
        """
        left_s = self._budget.last_s - time.time()
        if left_s > 0 and not self._server.is_ready(left_s) and not self._course.has_waiting():
            raise SearchError(
                "the modules of the functions given must be imported by other processes, which had not ended at the "
                "deadline. Do they wait for something, or train, while they are imported?"
            )
        try:
            while not self._is_over():
                self._fill()
                self._listen()
                self._watch()
        finally:
            for one in list(self._running):
                one.is_stopping = True
                self._lose(one, "", kill=True)
        return self._course.delivered()

    def _is_over(self) -> bool:
        now_s = time.time()
        if self._is_delivered and not self._running:
            return True
        if now_s >= self._budget.deadline_s - self._budget.margin_s / 2:
            return True
        if self._running:
            return self._course.is_exhausted(now_s, num_running=len(self._running))
        would_be_late = now_s + self._startup_s() >= self._budget.last_s
        is_through = would_be_late and self._course.is_explored(now_s, num_running=0)
        return is_through or self._course.is_exhausted(now_s, num_running=0)

    @property
    def _is_delivered(self) -> bool:
        """Whether the final training has come to its end."""
        final = self._course.final
        return final is not None and self._course.candidates[final].why == DELIVERED

    # Starting --------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Starts what should run now and does not."""
        now_s, course = time.time(), self._course
        if course.is_explored(now_s, num_running=len(self._running)):
            self._fill_finally(now_s)
            return
        num_slots = self._num_slots(now_s)
        while len(self._running) < num_slots:
            promoted = course.promoted(now_s)
            cores = self._free_cores(num_slots)
            if promoted is not None:
                self._start(self._study.continued(course.candidates[promoted]), promoted, cores)
            elif course.may_propose(now_s, startup_s=self._startup_s(), num_running=len(self._running)):
                trial = course.proposed()
                self._start(trial, trial, cores)
            else:
                break

    def _num_slots(self, now_s: float) -> int:
        """Trials side by side while exploring; as many as there are cores where it goes on beyond its time."""
        num_cores = len(self._settings.cores)
        usual = num_cores if now_s > self._budget.explore_end_s else self._budget.num_slots(num_cores, now_s)
        return self._settings.num_slots or usual

    def _fill_finally(self, now_s: float) -> None:
        """Once exploring is over: ends it, and starts the final training and that of runners-up."""
        exploring = [one for one in self._running if one.explores]
        for one in exploring:
            if not one.is_stopping:
                self._stop(one)
        if exploring:
            return
        final = next((one for one in self._running if one.is_final), None)
        if final is not None:
            self._start_runner_up(final, now_s)
        elif not self._is_delivered:
            self._start_final(now_s)

    def _free_cores(self, num_slots: int) -> tuple[int, ...]:
        """The cores of a new trial: its share of all, of those that nobody has if there are any."""
        cores = self._settings.cores
        taken = {core for one in self._running for core in one.cores}
        size = max(split_evenly(len(cores), num_slots))
        return tuple([core for core in cores if core not in taken][:size] or cores[:size])

    def _start_final(self, now_s: float) -> None:
        candidate = self._course.finalist(now_s)
        if candidate is None:
            return
        if candidate.number != self._course.final:
            self._course.choose(candidate, now_s)
            self._tell(f"candidate {candidate.number} is trained until the deadline: {values_of(candidate)}")
        self._start(self._study.continued(candidate), candidate.number, self._settings.cores, "final")

    def _start_runner_up(self, final: _Running, now_s: float) -> None:
        """Trains another candidate on cores that are left idle, since one thread is fastest for a small network: what
        is promised by a short curve is not sure, and the best of several is delivered."""
        taken = {core for one in self._running if one is not final for core in one.cores}
        idle = [core for core in final.idle_cores if core not in taken]
        most = self._settings.num_slots or len(self._settings.cores)
        if not idle or len(self._running) >= most or self._budget.last_s - now_s < self._budget.final_s / FACTOR:
            return
        candidate = self._course.runner_up(now_s)
        if candidate is None:
            return
        cores = tuple(idle[: max(1, candidate.num_cores)])
        told = ", ".join(map(str, cores))
        self._tell(f"candidate {candidate.number} is trained beside it on core {told}: {values_of(candidate)}")
        self._start(self._study.continued(candidate), candidate.number, cores, "runner-up")

    def _start(self, trial: int, number: int, cores: tuple[int, ...], role: Role = "explorer") -> None:
        before = self._course.candidates.get(number)
        candidate = before or Candidate(number=number, failures=self._study.failures(number))
        candidate = self._course.candidates[number] = dataclasses.replace(candidate, state="running", why="")
        self._study.note(trial, candidate)
        now_s, settings = time.time(), self._settings
        begin_s = {"explorer": None, "final": self._course.final_begin_s, "runner-up": now_s}[role]
        order = Order(
            task_file=str(settings.task_file),
            folder=str(self._course.folder_of(number)),
            number=number,
            seed=settings.seed,
            known=candidate.params,
            resumed=before is not None,
            cores=cores,
            everywhere=settings.everywhere,
            target=settings.target,
            limits=settings.limits,
            final_s=self._budget.final_s,
            final=None if begin_s is None else (begin_s, self._budget.last_s),
            price=self._known_price(before, len(cores)),
        )
        self._running.append(
            _Running(
                number=trial,
                candidate=number,
                process=self._server.trial(order),
                cores=cores,
                role=role,
                started_s=now_s,
                due_s=now_s + self._start_limit_s(),
            )
        )

    def _known_price(self, before: Candidate | None, num_cores: int) -> Price | None:
        """What was predicted of a candidate on so many cores, or follows from it."""
        if before is None or not before.points:
            return None
        is_wide = num_cores == len(self._settings.cores) and self._settings.target is None
        if before.num_cores != num_cores and not is_wide:
            return None
        return Price(
            num_parameters=before.num_parameters,
            memory_bytes=before.memory_bytes,
            wide_gain=1.0 if is_wide else before.wide_gain,
            note="".join(before.notes),
            outline_s=before.outline_s,
            is_rough=before.is_rough and not is_wide,
        )

    def _go(self, one: _Running, candidate: Candidate) -> None:
        """Lets a candidate train until its next rung, or the end."""
        now_s = time.time()
        until_s, granted_s = float("inf"), self._budget.last_s - now_s
        if one.explores:
            until_s = self._course.next_until_s(candidate, self._startup_s())
            granted_s = max(0.0, until_s - candidate.train_s)
        one.due_s = now_s + self._start_limit_s()
        one.process.send(Go(until_s=until_s, granted_s=granted_s))

    def _stop(self, one: _Running) -> None:
        one.is_stopping = True
        one.due_s = time.time() + max(STOP_LIMIT_S, STOP_SHARE * self._budget.final_s)
        one.process.send(Stop())

    def _start_limit_s(self) -> float:
        return max(LEAST_START_S, (self._budget.explore_end_s - self._budget.start_s) / 2)

    def _startup_s(self) -> float:
        return median(self._startups_s) if self._startups_s else 0.0

    # Listening -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Handles what trials have told, waiting a moment if none has."""
        if not self._running:
            time.sleep(TICK_S)
            return
        ready = set(wait([line for one in self._running for line in one.process.waits_for], timeout=TICK_S))
        for one in list(self._running):
            if not ready.intersection(one.process.waits_for):
                continue
            try:
                while one in self._running and (message := one.process.receive()) is not None:
                    self._handle(one, self._course.candidates[one.candidate], message)
                if one in self._running and one.process.is_gone:  # what it has started may hold the line open
                    raise EOFError
            except EOFError:
                self._lose(one, "", kill=False)

    def _handle(self, one: _Running, candidate: Candidate, message: FromTrial) -> None:
        now_s = time.time()
        if not one.is_stopping:
            one.due_s = max(one.due_s, now_s + LEAST_SILENCE_S + SILENCE * (now_s - one.heard_s))
        one.heard_s = now_s
        match message:
            case Suggest():
                one.process.send(self._study.suggest(one.number, message))
            case Ready():
                self._ready(one, candidate, message)
            case Priced():
                self._keep(one, _with_price(candidate, message.price))
            case Judged():
                self._judged(one, candidate, message)
            case RungEnd():
                self._rung_end(one, self._course.at_its_rung(candidate))
            case Ended():
                self._ended(one, candidate, message)
            case Rejected():
                self._rejected(one, candidate, message)
            case Failed():
                self._tell(f"candidate {candidate.number} failed: {message.error.strip().splitlines()[-1]}")
                params = candidate.params or self._study.params(one.number)
                self._end(one, dataclasses.replace(candidate, params=params, state="raised", why=message.error))

    def _ready(self, one: _Running, candidate: Candidate, message: Ready) -> None:
        self._startups_s.append(time.time() - one.started_s)
        candidate = dataclasses.replace(
            _with_price(candidate, message.price),
            params=candidate.params or self._study.params(one.number),
            batch_size=message.batch_size,
        )
        self._keep(one, candidate, **{f"user_{name}": value for name, value in message.attributes.items()})
        if not one.is_stopping:
            self._go(one, candidate)

    def _judged(self, one: _Running, candidate: Candidate, message: Judged) -> None:
        candidate = candidate.with_point(
            message.point, plan=message.plan, num_cores=message.num_cores, best_score=message.best_score
        )
        if message.samples_per_s > 0:
            candidate = dataclasses.replace(
                candidate, samples_per_s=message.samples_per_s, step_time_s=message.step_time_s
            )
        one.idle_cores = message.idle_cores
        if one.is_final:
            self._tell_of_final(one, candidate)
        self._course.candidates[candidate.number] = candidate
        if not one.explores and not one.is_stopping and self._course.aims.is_past_best(candidate):
            self._tell(f"candidate {candidate.number} is past its best score of {candidate.best_score:.4g}")
            one.is_given_up = True
            self._stop(one)
        if one.is_final or time.time() - one.noted_s > NOTED_EVERY_S:
            one.noted_s = time.time()
            self._keep(one, candidate)

    def _tell_of_final(self, one: _Running, candidate: Candidate) -> None:
        now_s = time.time()
        if now_s - one.told_s > self._budget.final_s / TOLD_TIMES:
            one.told_s = now_s
            left_s = max(0.0, self._budget.deadline_s - now_s)
            self._tell(
                f"candidate {candidate.number}: score {candidate.points[-1].score:.4g} after {candidate.train_s:.2g} "
                f"s, best {candidate.best_score:.4g}; {left_s:.2g} s until the deadline"
            )

    def _rung_end(self, one: _Running, candidate: Candidate) -> None:
        """A candidate has trained as far as it may: it goes on if it is among the best."""
        self._keep(one, candidate)
        now_s = time.time()
        if one.is_stopping:
            return
        if self._course.is_explored(now_s, num_running=1) or not self._course.goes_on(candidate, now_s):
            self._stop(one)
        else:
            self._go(one, candidate)

    def _ended(self, one: _Running, candidate: Candidate, message: Ended) -> None:
        if one.is_final and one.is_given_up:
            self._course.give_up_final()
        elif one.is_final:
            self._end(one, dataclasses.replace(candidate, state="waiting", why=DELIVERED))
            return
        is_saved = (message.saved or not one.explores) and bool(candidate.points)
        self._end(one, dataclasses.replace(candidate, state="waiting" if is_saved else "gone", is_saved=is_saved))
        now_s = time.time()
        self._course.forget_worst(now_s)
        if candidate.points:
            self._tell(
                f"candidate {candidate.number}: score {candidate.points[-1].score:.4g} after {candidate.train_s:.2g} "
                f"s, {self._course.predicted(candidate, now_s):.4g} predicted for the deadline; {values_of(candidate)}"
            )

    def _rejected(self, one: _Running, candidate: Candidate, message: Rejected) -> None:
        self._tell(f"candidate {candidate.number} is not trained: {message.reason}")
        if one.is_final:  # from its checkpoint it may get further; others come after some trials of that
            self._course.final_failed()
            self._end(one, dataclasses.replace(candidate, state="waiting", why=message.reason))
            return
        size = message.price.num_parameters if message.price else candidate.num_parameters
        memory = message.price.memory_bytes if message.price else candidate.memory_bytes
        self._end(
            one,
            dataclasses.replace(
                candidate,
                params=candidate.params or self._study.params(one.number),
                state="rejected",
                why=message.reason,
                num_parameters=size,
                memory_bytes=memory,
            ),
        )

    # Ending ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Ends trials that are silent for too long, and tells the storage of those that live."""
        now_s = time.time()
        for one in list(self._running):
            if now_s > one.due_s and not (one.is_stopping and self._is_needed(now_s)):
                waited = "to stop" if one.is_stopping else "for a sign of it"
                self._lose(one, f"it was ended after waiting {waited} for too long", kill=True)
            elif now_s - one.beaten_s > HEARTBEAT_S:
                one.beaten_s = now_s
                self._study.beat(one.number)
        if now_s - self._looked_s > GRACE_S:
            self._looked_s = now_s
            self._study.fail_stale()

    def _is_needed(self, now_s: float) -> bool:
        """Whether a trial that is slow to save its candidate is waited for, because there is no other candidate."""
        return not self._course.has_waiting() and now_s < self._budget.last_s

    def _lose(self, one: _Running, reason: str, *, kill: bool) -> None:
        """A process is gone, or is ended, without having said so."""
        self._running.remove(one)
        ended = one.process.end(kill=kill)
        candidate = self._course.candidates[one.candidate]
        params = candidate.params or self._study.params(one.number)
        is_saved = bool(candidate.points) and self._course.has_checkpoint(candidate)
        candidate = dataclasses.replace(candidate, params=params, is_saved=is_saved)
        if one.is_stopping:  # it was to end anyway
            if one.is_final and one.is_given_up:
                self._course.give_up_final()
            self._finish(one, dataclasses.replace(candidate, state="waiting" if is_saved else "gone"))
            return
        reason = reason or ended or "its process has ended without a word"
        candidate = dataclasses.replace(candidate, state="failed", why=reason, failures=candidate.failures + 1)
        self._tell(f"candidate {candidate.number}: {reason}")
        self._finish(one, candidate)
        if one.is_final:
            self._course.final_failed()
        self._course.recover(candidate)

    def _end(self, one: _Running, candidate: Candidate) -> None:
        """A process has said that it ends."""
        self._running.remove(one)
        one.process.end(kill=False)
        self._finish(one, candidate)

    def _finish(self, one: _Running, candidate: Candidate) -> None:
        self._course.candidates[candidate.number] = candidate
        score = self._course.expected(candidate, time.time())
        if not one.explores and candidate.best_score is not None:
            score = candidate.best_score
        self._study.finish(one.number, candidate, score=score)

    def _keep(self, one: _Running, candidate: Candidate, **attributes: object) -> None:
        self._course.candidates[candidate.number] = candidate
        self._study.note(one.number, candidate, **attributes)


def _with_price(candidate: Candidate, price: Price) -> Candidate:
    return dataclasses.replace(
        candidate,
        wide_gain=price.wide_gain,
        num_parameters=price.num_parameters,
        memory_bytes=price.memory_bytes,
        notes=(price.note,) if price.note else (),
        outline_s=price.outline_s,
        is_rough=price.is_rough,
    )
