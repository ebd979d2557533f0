"""Who should train on? Ways to deal out a search's time, tried on learning curves that were measured once.

    python -m benchmarks.allocation --collect 32 --json benchmarks/results/allocation.json    # an hour, on two cores
    python -m benchmarks.allocation --json benchmarks/results/allocation.json                  # minutes

Five searches for real differ by more than any two ways to search. Here a search is simulated: candidates come in a
random order and follow the curves that they had when they were trained alone (`benchmarks.joint_task`, each on one
core, in seconds of that core, so that other work does not count). Rungs, predictions, handicaps and the final choice
are those of `partita.search` themselves. Each way meets the same orders. `loss` is that of the chosen network after the
final training on one core, of characters that nobody has chosen by; `best` the least that any of the candidates could
have reached.

What is not simulated: the decay of the rate, plans for more than one core, proposals that learn.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, option_parser, show
from benchmarks.joint_peers import FINAL_SHARE, Training
from benchmarks.joint_task import suggest, test_loss
from partita.search.allocation import Standing, goes_on, next_promoted
from partita.search.candidates import Aims, Candidate, best_of, standings
from partita.search.curves import Point
from partita.search.deadline import FACTOR, Budget, rung_s
from partita.search.training_run import BETWEEN_JUDGED, take_cores

CURVES = Path(__file__).with_name("data") / "candidate_curves.json"
LONGEST_S, FIRST_S, BETWEEN = 48.0, 0.2, 1.3  # a candidate is judged at so many seconds, and at so many times as many
BUDGET = Budget(start_s=0.0, deadline_s=90.0, final_share=FINAL_SHARE)  # of `benchmarks.joint_search`
EXPLORED_S, FINAL_S, STARTUP_S, NUM_CORES = BUDGET.explore_end_s, BUDGET.final_s, 0.5, 2
AIMS = Aims(objectives=("score",), maximize=False)
COLUMNS = ("way", "first_rung_s", "patient", "loss", "deviation", "candidates", "best")


# Curves ---------------------------------------------------------------------------------------------------------------


def trained(number: int, core: int, seed: int) -> Row:
    """The curve of a random candidate: [samples, seconds, judged loss, tested loss] each."""
    take_cores([core])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1000 * seed + number))
    training = Training(suggest(study.ask()), number)
    points: list[list[float]] = []
    at_s, train_s, samples = FIRST_S, 0.0, 0
    while train_s < LONGEST_S:
        begin_s = time.process_time()
        while train_s + time.process_time() - begin_s < at_s:
            training.train(1, math.inf)  # a step
            samples += training.config.batch_size
        train_s += time.process_time() - begin_s
        at_s = max(at_s * BETWEEN, train_s)
        judged = training.judge()
        points.append([samples, round(train_s, 3), round(judged, 5), round(test_loss(training.model), 5)])
        training.model.train()
        if not math.isfinite(judged):
            break
    return {"number": number, "candidate": str(training.config), "points": points}


def collect(num: int, seed: int) -> list[Row]:
    """Curves of so many candidates, one on each core at a time."""
    cores = sorted(partita.Cluster.detect().processes[0].cores)
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(cores), maxtasksperchild=1) as pool:
        begun = [pool.apply_async(trained, (number, cores[number % len(cores)], seed)) for number in range(num)]
        return [one.get() for one in begun]


class Curve:
    """What a candidate would score after any time."""

    def __init__(self, points: Sequence[Sequence[float]]) -> None:
        columns = np.array(points, dtype=np.float64).T
        self._samples, self._train_s, self._judged, self._tested = columns

    def _at(self, values: np.ndarray, train_s: float) -> float:
        return float(np.interp(math.log(max(train_s, 1e-3)), np.log(self._train_s), values))

    def tested(self, train_s: float) -> float:
        return self._at(self._tested, train_s)

    def best(self, train_s: float) -> float:
        """The best judged loss until then."""
        return self._at(np.minimum.accumulate(self._judged), train_s)

    def samples(self, train_s: float) -> float:
        return float(np.interp(train_s, [0.0, *self._train_s], [0.0, *self._samples]))

    def seen(self, train_s: float) -> list[Point]:
        """The points that a search has of it by then."""
        times = [train_s]
        while times[-1] / BETWEEN_JUDGED > max(0.15, train_s / 64):
            times.append(times[-1] / BETWEEN_JUDGED)
        return [Point(self.samples(at), at, self._at(self._judged, at)) for at in reversed(times)]


# Searches -------------------------------------------------------------------------------------------------------------


@dataclass
class _Trained:
    """A candidate of the search, and the curve that it follows."""

    curve: Curve
    known: Candidate
    train_s: float = 0.0
    skips: int = 0  # rungs that it goes past before it is judged first

    @property
    def next_rung(self) -> int:
        return self.known.rung + 1 + self.skips

    def judge(self) -> None:
        """It has reached its next rung."""
        points = tuple(self.curve.seen(self.train_s))
        rate, best = points[-1].samples / self.train_s, self.curve.best(self.train_s)
        rung, self.skips = self.next_rung, 0
        self.known = replace(self.known, rung=rung, points=points, samples_per_s=rate, best_score=best, is_saved=True)


class Search:
    """Successive halving over rungs of time on all cores, as `partita.search` does it; `loss` is what it comes to.

    Args:
        patient: of so many candidates one is judged at the second rung first (0: none).
    """

    def __init__(self, curves: Sequence[Curve], first_rung_s: float, patient: int = 0) -> None:
        self._coming = list(curves)
        self._patient = patient
        self._first_s = first_rung_s
        self._last = BUDGET.last_rung(first_rung_s)
        self.candidates: list[_Trained] = []
        self._ends: list[tuple[float, int, int | None]] = [(0.0, core, None) for core in range(NUM_CORES)]
        while self._ends:
            self._end(*heapq.heappop(self._ends))

    def _standings(self, now_s: float) -> list[Standing]:
        return standings([one.known for one in self.candidates], AIMS, BUDGET, self._first_s, now_s)

    def _end(self, now_s: float, core: int, number: int | None) -> None:
        """A core has come to the end of a rung, or to that of exploring."""
        if number is not None:
            candidate = self.candidates[number]
            if candidate.train_s >= rung_s(self._first_s, candidate.next_rung) - 1e-6:
                candidate.judge()
                if goes_on(number, self._standings(now_s), self._last) and self._train(now_s, core, number):
                    return
            candidate.known = replace(candidate.known, state="waiting")
        if now_s >= EXPLORED_S:
            return
        promoted = next_promoted(self._standings(now_s), self._last)
        if promoted is not None:
            self._train(now_s + STARTUP_S, core, promoted)
        elif self._coming and now_s + STARTUP_S + self._first_s < EXPLORED_S:
            is_patient = self._patient and len(self.candidates) % self._patient == self._patient - 1
            new, number = Candidate(number=len(self.candidates)), len(self.candidates)
            self.candidates.append(_Trained(self._coming.pop(), new, skips=1 if is_patient else 0))
            self._train(now_s + STARTUP_S, core, number)

    def _train(self, now_s: float, core: int, number: int) -> bool:
        """Trains it until its next rung, or the end; whether there is time left."""
        candidate = self.candidates[number]
        end_s = min(EXPLORED_S, now_s + rung_s(self._first_s, candidate.next_rung) - candidate.train_s)
        if end_s <= now_s:
            return False
        candidate.train_s += end_s - now_s
        candidate.known = replace(candidate.known, state="running")
        heapq.heappush(self._ends, (end_s, core, number))
        return True

    @property
    def num_judged(self) -> int:
        return sum(one.known.rung >= 0 for one in self.candidates)

    @property
    def loss(self) -> float:
        best = best_of([one.known for one in self.candidates], AIMS, BUDGET, EXPLORED_S)
        assert best is not None, "a candidate must have been judged when exploring ends"
        chosen = self.candidates[best.number]
        return chosen.curve.tested(chosen.train_s + FINAL_S)


def at_random(curves: Sequence[Curve], num: int) -> float:
    """So many candidates, each for the same time; the best one goes on."""
    each_s = EXPLORED_S * NUM_CORES / num - STARTUP_S
    chosen = min(curves[-num:], key=lambda one: one.best(each_s))
    return chosen.tested(each_s + FINAL_S)


def rows_of(curves: Sequence[Curve], num_orders: int) -> list[Row]:
    orders = [random.Random(seed).sample(curves, len(curves)) for seed in range(num_orders)]
    best = min(one.tested(LONGEST_S) for one in curves)
    rows: list[Row] = []

    def add(way: str, losses: Sequence[float], **more: Any) -> None:
        spread = statistics.pstdev(losses)
        rows.append({"way": way, **more, "loss": statistics.fmean(losses), "deviation": spread, "best": best})

    for num in (4, 8, 12):
        add("random", [at_random(order, num) for order in orders], candidates=num)
    for rungs, patient in itertools.product((4, 3, 2, 1), (0, 2, 3)):
        first_s = FINAL_S / FACTOR**rungs
        searches = [Search(order, first_s, patient) for order in orders]
        tried = statistics.fmean(search.num_judged for search in searches)
        facts = {"first_rung_s": round(first_s, 2), "patient": patient, "candidates": round(tried, 1)}
        add("halving", [search.loss for search in searches], **facts)
    return rows


def main() -> int:
    parser = option_parser("Ways to deal out a search's time, on learning curves that were measured once.")
    parser.add_argument("--collect", type=int, default=0, metavar="N", help="curves of N candidates first")
    parser.add_argument("--seed", type=int, default=0, help="of the candidates that are collected")
    parser.add_argument("--curves", type=Path, default=CURVES, metavar="FILE")
    parser.add_argument("--orders", type=int, default=100)
    options = parser.parse_args()
    if options.collect:
        options.curves.write_text(json.dumps(collect(options.collect, options.seed)), encoding="utf-8")
    known = json.loads(options.curves.read_text(encoding="utf-8"))
    curves = [Curve(one["points"]) for one in known if one["points"][-1][1] >= LONGEST_S]
    report = Report("allocation", {"orders": options.orders, "curves": len(curves)}, options.json)
    for row in rows_of(curves, options.orders):
        report.add(row)
    least = min(report.rows, key=lambda row: float(row["loss"]))
    report.finish({name: least.get(name) for name in COLUMNS}, [])
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
