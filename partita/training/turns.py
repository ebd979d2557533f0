"""Whose turn it is: which candidate runs the next training step while a plan is being adopted.

Candidates run real steps in turns. Those that are ready race: each has `NUM_TURNS` turns in alternation, so that a
machine which slows down for a while does so for all; who is clearly slower leaves after a round. The winner runs the
steps until others are ready (compiled, say); then it races them anew. When none is left to come, it is adopted.

While others are being compiled, steps share the cores with the compiler, and not all candidates to the same degree: on
one core each, plain PyTorch lost to a pipeline over two machines that takes longer on its own. So what was measured
then is not the last word: whoever may have lost by it races again once it is calm.
Everything here is decided by what it is told alone, so that all processes of a job decide alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

NUM_TURNS = 3
TURN_TIME_S = 0.1  # short steps: as many as fill it
MIN_STEPS = 2  # measured in a turn; the one before them, after another candidate's, is not
MAX_STEPS = 60
HOPELESS_RATIO = 1.25  # slower than this after a round: no more turns
DISTURBED_RATIO = 2.0  # the same while it is not calm: a compiler may take up to half of a core
TIE_SHARE = 0.02  # a plan must be faster than a simpler one by this share to be preferred to it: less is noise


@dataclass
class Course:
    """What is known of one candidate: measured step times of its last race, turns in it, whether it was calm when that
    began, and why it left."""

    simplicity: tuple[int, ...]  # smaller is simpler; decides ties
    times_s: list[float] = field(default_factory=list)
    num_turns: int = 0
    has_raced: bool = False
    was_calm: bool = True
    failed: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)


class Turns:
    """Asks `next` before and tells `record` after every step.

    Args:
        simplicity: of every candidate, smaller is simpler.
        start: the candidate that runs while none has been measured.
        provisional: it takes no part in races, and runs only as long as there is no other.

    Example:
        >>> turns = Turns([(0,), (1,)], start=0)
        >>> turns.next(ready=[True, False])
        0
        >>> turns.record(0.5)
    """

    def __init__(self, simplicity: Sequence[tuple[int, ...]], *, start: int, provisional: bool = False) -> None:
        self.courses = [Course(rank) for rank in simplicity]
        self.best = start
        self._absent = start if provisional else -1
        self._racing: list[int] = []
        self._current: int | None = None  # whose turn it is
        self._num_steps = 0  # in this turn
        self._last = -1  # who ran the last step

    def next(self, ready: Sequence[bool], *, calm: bool = True) -> int:
        """The candidate that runs the next step. `ready`: whether each could; `calm`: nothing else takes time."""
        if self._current is None:
            self._begin_turn(ready, calm)
        return self.best if self._current is None else self._current

    def is_over(self, coming: Sequence[bool]) -> bool:
        """Whether `best` is to be adopted: nobody races, and nobody of those who are still `coming` may."""
        left = [
            index
            for index, (here, course) in enumerate(zip(coming, self.courses, strict=True))
            if here
            and (not course.has_raced or self.may_race_again(index))
            and not course.failed
            and index not in (self.best, self._absent)
        ]
        return self._current is None and not self._racing and not left

    def is_racing(self, index: int) -> bool:
        return index in self._racing

    def may_race_again(self, index: int) -> bool:
        """Whether the candidate may have lost because it was not calm."""
        course, best = self.courses[index], self.courses[self.best]
        if course.was_calm or course.failed or not course.times_s:
            return False
        return not best.times_s or course.median_s <= DISTURBED_RATIO * best.median_s

    def record(self, time_s: float) -> None:
        """The candidate whose turn it is has run a step."""
        runner, self._last, was = self._current, self.best, self._last
        if runner is None:
            return
        self._last = runner
        course = self.courses[runner]
        self._num_steps += 1
        if self._num_steps > 1 or was == runner:
            course.times_s.append(time_s)
        measured_s = sum(course.times_s[-self._num_steps :])
        if self._num_steps > MIN_STEPS and (measured_s >= TURN_TIME_S or self._num_steps > MAX_STEPS):
            course.num_turns += 1
            self._end_turn()

    def fail(self, index: int, reason: str) -> None:
        """The candidate cannot run; it is out."""
        self.courses[index].failed = reason
        self.courses[index].has_raced = True
        self._racing = [other for other in self._racing if other != index]
        if self.best == index:
            alive = [i for i, course in enumerate(self.courses) if not course.failed]
            self.best = min(alive, key=lambda i: (not self.courses[i].times_s, i), default=index)
        if self._current == index:
            self._end_turn()

    def stop(self) -> None:
        """Decide with what is known."""
        self._racing, self._current = [], None
        known = [i for i, course in enumerate(self.courses) if course.times_s and not course.failed]
        self.best = self._fastest(known, self.best)

    def _begin_turn(self, ready: Sequence[bool], calm: bool) -> None:
        if not self._racing:
            here = [i for i, can in enumerate(ready) if can and i not in (self.best, self._absent)]
            new = [i for i in here if not self.courses[i].has_raced or (calm and self.may_race_again(i))]
            if not new:
                return
            self._racing = new if self.best == self._absent else [self.best, *new]
            for index in self._racing:
                course = self.courses[index]
                course.times_s, course.num_turns, course.has_raced, course.was_calm = [], 0, True, calm
        self._current, self._num_steps = min(self._racing, key=lambda i: (self.courses[i].num_turns, i != self.best)), 0

    def _end_turn(self) -> None:
        self._current = None
        if any(self.courses[i].num_turns != self.courses[self._racing[0]].num_turns for i in self._racing):
            return  # the round is not over
        if any(not self.courses[i].times_s for i in self._racing):
            return  # it has not begun
        fastest_s = min((self.courses[i].median_s for i in self._racing), default=0.0)
        calm = all(self.courses[i].was_calm for i in self._racing)
        hopeless_s = (HOPELESS_RATIO if calm else DISTURBED_RATIO) * fastest_s
        self._racing = [i for i in self._racing if self.courses[i].median_s <= hopeless_s]
        if len(self._racing) < 2 or self.courses[self._racing[0]].num_turns >= NUM_TURNS:
            self.best = self._fastest(self._racing, self.best)
            self._racing = []

    def _fastest(self, indices: Sequence[int], otherwise: int) -> int:
        if not indices:
            return otherwise
        fastest_s = min(self.courses[i].median_s for i in indices)
        near = [i for i in indices if self.courses[i].median_s <= fastest_s * (1 + TIE_SHARE)]
        return min(near, key=lambda i: (self.courses[i].simplicity, self.courses[i].median_s))
