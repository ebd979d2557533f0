"""What a search knows of its candidates, as plain values that are kept with Optuna's trials.

A candidate is one network with its training settings. Each time that it is trained by a process is a trial of the
study: the first one proposes it, later ones continue it from its checkpoint. So a trial runs exactly as long as its
process, and whatever becomes of a process, its trial is finished then; a candidate that waits is no running trial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from partita.search.allocation import Standing, Values
from partita.search.curves import Forecast, Point, forecast, gained, handicaps, is_past_best, score_at
from partita.search.deadline import FACTOR, Budget, rung_s

# Of choices among three candidates of 7 s of training each (the best of twelve, as in `allocation`), the loss after
# 30 s was 0.027 above that of the best one with a quarter of a deviation, 0.033 with one, and 0.053 with two. Of
# choices among all that a search has judged, most of them for a second, it was 0.001, 0.003 and 0.006 (`best_of`).
CAUTION = 0.5
State = Literal["running", "waiting", "rejected", "raised", "failed", "gone"]


class Reached(NamedTuple):
    """What a candidate had come to after some time of training, measured or predicted.

    Args:
        gain: how much better its score had lately become for every e-fold of samples.
        samples: that it had seen; `later_samples` after `FACTOR` times the training, and its `later_score` then.
    """

    gain: float
    samples: float
    later_samples: float
    later_score: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate as the last message of its process left it.

    Args:
        number: of its first trial.
        params: suggested values.
        state: "waiting" to go on, "gone" if its checkpoint is; "raised" by the user's code, "failed" with its process.
        is_saved: whether it has a checkpoint.
        rung: the highest that it was judged at; -1: none.
        points: of its learning curve, by samples.
        samples_per_s: measured in the last while, on `num_cores` cores; `wide_gain` times as many are predicted on all.
        why: it was rejected or has failed.
        failures: processes of it that died.
        best_score: of the weights that are kept of it (`weights`).
        outline_s: what the outline of its step took; `is_rough`: `wide_gain` and `memory_bytes` follow from that.
    """

    number: int
    params: dict[str, Any] = field(default_factory=dict)
    state: State = "running"
    is_saved: bool = False
    rung: int = -1
    points: tuple[Point, ...] = ()
    samples_per_s: float = 0.0
    step_time_s: float = 0.0
    num_cores: int = 1
    wide_gain: float = 1.0
    num_parameters: int = 0
    memory_bytes: int | None = None
    batch_size: int = 0
    plan: str = ""
    notes: tuple[str, ...] = ()
    why: str = ""
    failures: int = 0
    best_score: float | None = None
    outline_s: float = 0.0
    is_rough: bool = False

    @property
    def train_s(self) -> float:
        """Training so far, seconds."""
        return self.points[-1].train_s if self.points else 0.0

    @property
    def score(self) -> float | None:
        """The last one."""
        return self.points[-1].score if self.points else None

    @cached_property
    def reached(self) -> dict[tuple[Aims, float], Reached]:
        """By aims and training time, what `Aims.reached` has found: a prediction takes 50 us, candidates are compared
        again whenever one of them stops, and those that wait do not change."""
        return {}

    def samples_at(self, more_s: float) -> float:
        """Samples that it will have seen after so many seconds more on all cores."""
        return self.points[-1].samples + more_s * self.samples_per_s * self.wide_gain

    def samples_after(self, train_s: float) -> float:
        """Samples that it has seen after so many seconds of training in all, or will have on the same cores."""
        if train_s > self.train_s:
            return self.points[-1].samples + (train_s - self.train_s) * self.samples_per_s
        times, samples = [0.0, *(point.train_s for point in self.points)], [0.0, *(one.samples for one in self.points)]
        return float(np.interp(train_s, times, samples))

    def with_point(self, point: Point, **changes: Any) -> Candidate:
        """With one more point of the curve; points that it replaces were made again after a crash."""
        before = tuple(one for one in self.points if one.samples < point.samples)
        return dataclasses.replace(self, points=(*before, point), **changes)


def as_record(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON knows it; `of_record` is the inverse."""
    return dataclasses.asdict(candidate) | {"points": [list(point) for point in candidate.points]}


def of_record(record: dict[str, Any]) -> Candidate:
    """The candidate of a record; what this version does not know is left out."""
    known = {item.name for item in dataclasses.fields(Candidate)}
    values = {name: value for name, value in record.items() if name in known}
    points = tuple(Point(*map(float, point)) for point in record["points"])
    return Candidate(**values | {"points": points, "notes": tuple(record.get("notes", ()))})


@dataclass(frozen=True, kw_only=True)
class Aims:
    """What candidates are judged by: "score" first, then maybe "parameters" and "step_time". `bound`: no score is
    better;
    None: unknown."""

    objectives: tuple[str, ...]
    maximize: bool
    bound: float | None = None

    @property
    def sign(self) -> float:
        """A score times this is lower where it is better."""
        return -1.0 if self.maximize else 1.0

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """Optuna's."""
        return ["maximize" if name == "score" and self.maximize else "minimize" for name in self.objectives]

    def values(self, candidate: Candidate, score: float) -> list[float]:
        """A candidate's objectives, `score` being what is predicted or was reached."""
        of = {"score": score, "parameters": float(candidate.num_parameters), "step_time": candidate.step_time_s}
        return [of[name] for name in self.objectives]

    def predicted(self, candidate: Candidate, budget: Budget, now_s: float) -> Forecast:
        """A candidate's score at the deadline if all cores train it on from now."""
        at_samples = candidate.samples_at(max(0.0, budget.last_s - now_s))
        return forecast(candidate.points, at_samples, maximize=self.maximize, bound=self.bound)

    def after(self, train_s: float, candidate: Candidate, budget: Budget, now_s: float) -> float:
        """A candidate's score after `train_s` seconds of training, measured or predicted, or at the deadline if that
        comes first."""
        last = candidate.samples_at(max(0.0, budget.last_s - now_s))
        samples = min(last, candidate.samples_after(train_s))
        return score_at(candidate.points, samples, maximize=self.maximize, bound=self.bound).score

    def reached(self, candidate: Candidate, train_s: float) -> Reached:
        """What a candidate had come to after `train_s` seconds of training."""
        found = candidate.reached.get((self, train_s))
        if found is None:
            later = candidate.samples_after(FACTOR * train_s)
            score = score_at(candidate.points, later, maximize=self.maximize, bound=self.bound).score
            found = Reached(self.gain(candidate, train_s), candidate.samples_after(train_s), later, score)
            candidate.reached[self, train_s] = found
        return found

    def gain(self, candidate: Candidate, train_s: float) -> float:
        """How much better its score became for every e-fold of samples, before it had been trained for `train_s`."""
        before, until = candidate.samples_after(train_s / FACTOR), candidate.samples_after(train_s)
        return gained(candidate.points, before, until, maximize=self.maximize)

    def is_past_best(self, candidate: Candidate) -> bool:
        """Whether training a candidate on is of no use."""
        return is_past_best(candidate.points, maximize=self.maximize)

    def relied_on(self, candidate: Candidate, budget: Budget, now_s: float) -> float:
        """A candidate's predicted score at the deadline, made worse by `CAUTION` deviations, but not worse than what it
        scores already, since its best weights are kept. A few points may promise anything; a long curve is to be relied
        on."""
        found = self.predicted(candidate, budget, now_s)
        reached = candidate.points[-1].score if candidate.best_score is None else candidate.best_score
        return self.sign * min(self.sign * reached, self.sign * found.score + CAUTION * found.deviation)

    def turned(self, candidate: Candidate, score: float) -> Values:
        """A candidate's objectives, as by `values`, so that lower is better."""
        signs = [-1.0 if direction == "maximize" else 1.0 for direction in self.directions]
        return tuple(sign * value for sign, value in zip(signs, self.values(candidate, score), strict=True))


def standings(
    candidates: Iterable[Candidate], aims: Aims, budget: Budget, first_rung_s: float, now_s: float
) -> list[Standing]:
    """What allocation needs to know, with predictions of all candidates made at the same moment."""
    judged = [one for one in candidates if one.points and one.rung >= 0]
    judged = [one for one in judged if one.state in ("running", "waiting", "gone")]
    at: dict[int, list[Values]] = {one.number: [] for one in judged}
    left_s = max(0.0, budget.last_s - now_s)
    for rung in range(max((one.rung for one in judged), default=-1) + 1):
        there, train_s = [one for one in judged if one.rung >= rung], rung_s(first_rung_s, rung)
        reached = [aims.reached(one, train_s) for one in there]
        added = handicaps(
            [found.gain for found in reached],
            [found.samples for found in reached],
            [1 + budget.final_s / train_s] * len(there),
        )
        for one, found, more in zip(there, reached, added, strict=True):
            is_near = one.samples_at(left_s) < found.later_samples  # the deadline comes first
            score = aims.after(FACTOR * train_s, one, budget, now_s) if is_near else found.later_score
            at[one.number].append(aims.turned(one, score + aims.sign * more))
    return [
        Standing(number=one.number, rung=one.rung, at=tuple(at[one.number]), is_waiting=can_go_on(one, aims))
        for one in judged
    ]


def can_go_on(candidate: Candidate, aims: Aims) -> bool:
    """Whether a candidate waits with a checkpoint, and may become better yet."""
    waits = candidate.state == "waiting" and candidate.is_saved and bool(candidate.points)
    return waits and not aims.is_past_best(candidate)


def best_of(candidates: Sequence[Candidate], aims: Aims, budget: Budget, now_s: float) -> Candidate | None:
    """The one that is to be trained until the deadline: the best by what can be relied on, with `handicaps`, of those
    that can be trained on. Simulated on curves of 24 candidates in 60 orders (`benchmarks.allocation`, without
    handicaps) that comes to a loss of 1.527, the best choice there is to 1.525. The best of the highest rung comes to
    1.536, as two of the 60 searches lose 0.27: who was judged early and promoted among few may be alone there."""
    usable = [one for one in candidates if can_go_on(one, aims)]
    left_s = max(0.0, budget.last_s - now_s)
    added = handicaps(
        [aims.gain(one, one.train_s) for one in usable],
        [one.samples_at(left_s) for one in usable],
        [1 + left_s / one.train_s for one in usable],
    )
    pairs = zip(usable, added, strict=True)
    return min(pairs, key=lambda pair: aims.sign * aims.relied_on(pair[0], budget, now_s) + pair[1], default=(None,))[0]
