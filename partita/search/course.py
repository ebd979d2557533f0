"""What a search knows, and what is to happen next: no processes here, and time only as an argument.

A candidate waits between trainings. Exploring proposes new ones and promotes those that wait; once its time is over,
and some candidate waits, the best one is trained until the end.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

from partita.errors import SearchError
from partita.search.allocation import Standing, goes_on, next_promoted, ordered
from partita.search.candidates import Aims, Candidate, best_of, can_go_on, standings
from partita.search.deadline import FACTOR, Budget, rung_s
from partita.search.study import STARTUP_TRIALS, Study
from partita.search.weights import kept_score

MOST_KEPT = 32  # checkpoints of waiting candidates
MOST_FINAL_FAILURES = 3  # of one candidate; others come then
NUM_BROKEN = 3  # candidates that raised or died, again and again, and none that did not: the user's code is broken
DELIVERED = "delivered"


class Course:
    """The candidates of a search, as they were left before and as they become.

    Args:
        max_trials: so many candidates are proposed at most; None: as many as there is time for.
        retries: so often a candidate is proposed again whose process died before it had a checkpoint.
    """

    def __init__(
        self, study: Study, aims: Aims, budget: Budget, folder: Path, *, max_trials: int | None, retries: int
    ) -> None:
        self.study, self.aims, self.budget = study, aims, budget
        self._folder, self._max_trials, self._retries = folder, max_trials, retries
        self.first_rung_s: float | None = study.read("first_rung_s")
        self.final: int | None = study.read("final")
        self.final_begin_s: float | None = study.read("final_begin_s")
        self._final_failures = 0
        self.candidates, interrupted = study.recover()
        for candidate in interrupted:
            self.recover(dataclasses.replace(candidate, failures=candidate.failures + 1))

    def folder_of(self, number: int) -> Path:
        """Of a candidate's checkpoints."""
        return self._folder / "candidates" / str(number)

    @property
    def all(self) -> list[Candidate]:
        return list(self.candidates.values())

    def standings(self, now_s: float) -> list[Standing]:
        """What decides who trains on."""
        if self.first_rung_s is None:
            return []  # nobody was judged yet
        return standings(self.all, self.aims, self.budget, self.first_rung_s, now_s)

    def predicted(self, candidate: Candidate, now_s: float) -> float:
        """The score at the deadline of a candidate that was judged."""
        return self.aims.predicted(candidate, self.budget, now_s).score

    def expected(self, candidate: Candidate, now_s: float) -> float | None:
        """A candidate's score as far ahead as its curve tells; None: it was never judged."""
        if not candidate.points:
            return None
        return self.aims.after(FACTOR * candidate.train_s, candidate, self.budget, now_s)

    # Exploring -------------------------------------------------------------------------------------------------

    def is_explored(self, now_s: float, *, num_running: int) -> bool:
        """Whether exploring is over: by its time or because as many candidates as were wanted are through, once there
        is one to go on with. Where data are few, all that were found may be past their best: then it goes on."""
        if self.final is not None:
            return True
        alive = [one for one in self.all if one.is_saved and one.state in ("running", "waiting")]
        if all(self.aims.is_past_best(one) for one in alive):
            return False
        if now_s >= self.budget.explore_end_s:
            return True
        return not num_running and self._is_full() and self.promoted(now_s) is None

    def has_waiting(self) -> bool:
        """Whether some candidate waits, be it past its best."""
        return any(one.state == "waiting" for one in self.all)

    def _can_go_on(self) -> bool:
        """Whether some candidate could be trained on."""
        return any(can_go_on(one, self.aims) for one in self.all)

    def _is_full(self) -> bool:
        """Whether as many candidates were proposed as were wanted; those that are tried again count once."""
        retried = [one for one in self.all if one.state == "failed" and one.failures <= self._retries]
        return self._max_trials is not None and len(self.candidates) - len(retried) >= self._max_trials

    def promoted(self, now_s: float) -> int | None:
        """The candidate that is to train on next: one that was interrupted before its first rung, or that deserves it;
        None: there is none."""
        for one in self.all:
            if one.state == "waiting" and one.rung < 0 and one.failures <= self._retries:
                return one.number
        return next_promoted(self.standings(now_s), self._last_rung)

    def may_propose(self, now_s: float, *, startup_s: float, num_running: int) -> bool:
        """Whether a new candidate could still be judged while exploring lasts; or there is none at all."""
        if self._is_full():
            return False
        judged_s = now_s + (self.first_rung_s or 0.0) + startup_s
        if self.has_waiting() and not self._can_go_on():
            return judged_s < self.budget.last_s
        return judged_s < self.budget.explore_end_s or not (num_running or self.has_waiting())

    def proposed(self) -> int:
        """A new trial. Proposals learn from others once enough of these were promoted: what is best after a second of
        training is small and quick, and what is proposed by that is smaller and quicker still."""
        num_known = sum(one.rung >= min(1, self._last_rung) for one in self.all)
        return self.study.propose(learns=num_known >= STARTUP_TRIALS)

    def next_until_s(self, candidate: Candidate, startup_s: float) -> float:
        """The training time at which a candidate is at its next rung. The first candidate decides how long rungs
        are."""
        if self.first_rung_s is None:
            self.first_rung_s = self.budget.first_rung_s(startup_s)
            self.study.write("first_rung_s", self.first_rung_s)
        return rung_s(self.first_rung_s, candidate.rung + 1)

    def at_its_rung(self, candidate: Candidate) -> Candidate:
        """A candidate that has been saved, with the rung that its training time has reached."""
        rung = candidate.rung
        while self.first_rung_s is not None and candidate.train_s >= rung_s(self.first_rung_s, rung + 1):
            rung += 1
        return dataclasses.replace(candidate, rung=rung, is_saved=bool(candidate.points))

    def goes_on(self, candidate: Candidate, now_s: float) -> bool:
        """Whether one that was just judged at a rung trains on at once."""
        if self.aims.is_past_best(candidate):
            return False
        return candidate.rung >= 0 and goes_on(candidate.number, self.standings(now_s), self._last_rung)

    @property
    def _last_rung(self) -> int:
        return 0 if self.first_rung_s is None else self.budget.last_rung(self.first_rung_s)

    def forget_worst(self, now_s: float) -> None:
        """Removes checkpoints of those that wait with the least prospect."""
        waiting = [one for one in self.standings(now_s) if self.candidates[one.number].state == "waiting"]
        for place in ordered([one.at[-1] for one in waiting])[MOST_KEPT:]:
            number = waiting[place].number
            shutil.rmtree(self.folder_of(number), ignore_errors=True)
            self.candidates[number] = dataclasses.replace(self.candidates[number], state="gone", is_saved=False)

    # The final training ----------------------------------------------------------------------------------------

    def finalist(self, now_s: float) -> Candidate | None:
        """Whom the final training is for: the one that has begun it, or the best that waits."""
        chosen = None if self.final is None else self.candidates[self.final]
        if chosen is not None and can_go_on(chosen, self.aims) and self._final_failures < MOST_FINAL_FAILURES:
            return chosen
        return self._best_waiting(now_s)

    def runner_up(self, now_s: float) -> Candidate | None:
        """Whom cores are for that the final training leaves idle: the best other one that waits."""
        return self._best_waiting(now_s, most_failures=self._retries)

    def _best_waiting(self, now_s: float, *, most_failures: float = math.inf) -> Candidate | None:
        """The best candidate that can be trained on, but for that of the final training."""
        others = [one for one in self.all if one.number != self.final and one.failures <= most_failures]
        return best_of(others, self.aims, self.budget, now_s)

    def choose(self, candidate: Candidate, now_s: float) -> None:
        """The final training is this candidate's; it began when the first one's did."""
        self.final, self._final_failures = candidate.number, 0
        self.study.write("final", candidate.number)
        if self.final_begin_s is None:
            self.final_begin_s = now_s
            self.study.write("final_begin_s", now_s)

    def give_up_final(self) -> None:
        """The chosen candidate is past its best: another one is chosen, or exploring goes on."""
        self.final, self.final_begin_s = None, None
        self.study.write("final", None)
        self.study.write("final_begin_s", None)

    def final_failed(self) -> None:
        """A process of the final training has died, or its training diverged."""
        self._final_failures += 1

    # Ending ----------------------------------------------------------------------------------------------------

    def has_checkpoint(self, candidate: Candidate) -> bool:
        """Whether a complete one is on disk."""
        return any(self.folder_of(candidate.number).glob("step-*/checkpoint.json"))

    def recover(self, candidate: Candidate) -> None:
        """A candidate whose process died waits to go on from its checkpoint, or is proposed again, or has failed."""
        if candidate.points and self.has_checkpoint(candidate):
            found = self.at_its_rung(dataclasses.replace(candidate, state="waiting", why=""))
        else:
            why = candidate.why or "the search was interrupted while it was trained"
            found = dataclasses.replace(candidate, state="failed", why=why, is_saved=False)
            if candidate.failures <= self._retries:
                self.study.again(candidate)
        self.candidates[candidate.number] = found

    def is_exhausted(self, now_s: float, *, num_running: int) -> bool:
        """Whether nothing that could be delivered is to be expected any more.

        Raises:
            SearchError: all candidates raise or die, so nothing ever will.
        """
        ended = [one for one in self.all if one.state != "running" or one.points]
        broken = [one for one in ended if one.state in ("raised", "failed") and not one.points]
        if len(broken) >= NUM_BROKEN * (1 + self._retries) and len(broken) == len(ended):
            raise SearchError(f"no candidate can be trained, the last one for this reason:\n{broken[-1].why}")
        if num_running:
            return False
        if self.is_explored(now_s, num_running=0):
            return self.finalist(now_s) is None
        return not self._can_go_on() and not self.may_propose(now_s, startup_s=0.0, num_running=0)

    def delivered(self) -> Candidate:
        """The candidate to deliver, now that nothing more is trained: that whose weights score best, which is seldom
        another one than that of the final training.

        Raises:
            SearchError: there is none.
        """
        scores = {one.number: kept_score(self.folder_of(one.number)) for one in self.all if one.points}
        found = {number: score for number, score in scores.items() if score is not None}
        if found:
            return self.candidates[min(found, key=lambda number: self.aims.sign * found[number])]
        reasons = [one.why for one in self.all if one.why]
        told = f" The last reason: {reasons[-1]}" if reasons else ""
        raise SearchError(
            f"the search must have trained a candidate to deliver one, but none of {len(self.candidates)} was judged "
            f"before the deadline.{told} Give it more time, or a smaller space"
        )
