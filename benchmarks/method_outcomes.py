"""What is known of synchronisation methods on tasks as those of `benchmarks.method_tasks`, from runs elsewhere: what
comes out is compared by relations, since data and models are not the same to the last digit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, float]  # by method: accuracy in percent, or loss
MOST_FACTOR = 10.0


@dataclass(frozen=True)
class Outcome:
    """A relation of what methods reach on one task. `value` says by what."""

    text: str
    task: str
    value: str
    methods: tuple[str, ...]
    test: Callable[[Values], bool]

    def holds(self, rows: Sequence[Mapping[str, Any]]) -> bool | None:
        """Whether it does; None where one of the methods was not run."""
        found = {row["method"]: row[self.value] for row in rows if row["task"] == self.task and self.value in row}
        return self.test(found) if all(name in found for name in self.methods) else None


def _accuracy(text: str, methods: Sequence[str], test: Callable[[Values], bool]) -> Outcome:
    return Outcome(f"digits: {text}", "digits", "accuracy", tuple(methods), test)


def _loss(text: str, methods: Sequence[str], test: Callable[[Values], bool]) -> Outcome:
    return Outcome(f"chars: {text}", "chars", "loss", tuple(methods), test)


_RANKS = tuple(f"powersgd r{rank}" for rank in (1, 2, 4, 8))
_LOCAL = tuple(f"local sgd H={every}" for every in (5, 21, 105))
_SORTED = tuple(f"{name}, sorted" for name in _LOCAL)
_OUTER = ("exact", "diloco H=10", "diloco H=20", "diloco H=50", "one process")

OUTCOMES = (
    _accuracy("exact training reaches 96.5 %", ["exact"], lambda v: v["exact"] >= 96.5),
    _accuracy("PowerSGD of rank 1 to 8 is as good as exact to 0.7 points", ["exact", *_RANKS],
              lambda v: all(v[name] >= v["exact"] - 0.7 for name in _RANKS)),
    _accuracy("rank 2 without error feedback loses some", ["powersgd r2", "powersgd r2 without feedback"],
              lambda v: v["powersgd r2 without feedback"] <= v["powersgd r2"] - 0.3),
    _accuracy("the top 1 % is as good as exact to 0.7 points", ["exact", "topk 1%"],
              lambda v: v["topk 1%"] >= v["exact"] - 0.7),
    _accuracy("the top 1 % without error feedback loses at least a point", ["topk 1%", "topk 1% without feedback"],
              lambda v: v["topk 1% without feedback"] <= v["topk 1%"] - 1.0),
    _accuracy("local SGD is flat to H=105 on shuffled data, to 1.5 points", ["exact", *_LOCAL],
              lambda v: all(v[name] >= v["exact"] - 1.5 for name in _LOCAL)),
    _accuracy("and falls on sorted data, below 90 % at H=105", ["exact", *_SORTED],
              lambda v: v[_SORTED[-1]] < 90 and v[_SORTED[-1]] < v[_SORTED[0]]),
    _loss("exact < DiLoCo H=10 < H=20 < H=50 < one process", _OUTER,
          lambda v: all(v[a] < v[b] for a, b in itertools.pairwise(_OUTER))),
    _loss("outer gradients of 4 bits are as good as of 32, to 0.02", ["diloco H=50", "diloco H=50, int4"],
          lambda v: abs(v["diloco H=50, int4"] - v["diloco H=50"]) <= 0.02),
    _loss("Streaming DiLoCo with 4 bits is as good as DiLoCo, to 0.03", ["diloco H=50", "streaming diloco H=50, int4"],
          lambda v: v["streaming diloco H=50, int4"] <= v["diloco H=50"] + 0.03),
)  # fmt: skip


def steps_factor(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """How many times as many steps were made for a loss as exact training needs for it.

    Args:
        curve: (steps, loss) of exact training; the last one has as many steps as the method made.
        loss: what the method has reached.

    Returns:
        From 1 (as good as exact, or better) to `MOST_FACTOR`.

    Example:
        >>> steps_factor([(50, 3.0), (100, 2.0)], 2.5)
        1.3333333333333333
        >>> steps_factor([(50, 3.0), (100, 2.0)], 1.0)
        1.0
    """
    total = curve[-1][0]
    best: list[tuple[float, float]] = []  # losses that were not reached before
    for steps, value in curve:
        if not best or value < best[-1][1]:
            best.append((steps, value))
    before: tuple[float, float] | None = None
    for steps, value in best:
        if value <= loss:
            if before is None:
                return min(total / steps, MOST_FACTOR)
            share = (before[1] - loss) / (before[1] - value)
            return float(min(total / (before[0] + share * (steps - before[0])), MOST_FACTOR))
        before = steps, value
    return 1.0
