"""Held-out losses by steps: which one is the target, and after how many steps it is reached for good.

A curve is a list of (steps, loss). Held-out losses of small tasks wander from one judging to the next, so a curve is
looked at through its trailing mean over `WINDOW` judgings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]
WINDOW = 3  # judgings
TARGET_SHARE = 0.8  # of exact training's steps, from which on the target is what it keeps
SLACK = 1.02


def mean_of(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean over seeds, as far as all of them go."""
    return [(column[0][0], statistics.fmean(loss for _, loss in column)) for column in zip(*curves, strict=False)]


def smoothed(curve: Curve) -> list[tuple[float, float]]:
    """Each loss as the mean of it and those before it.

    >>> smoothed([(1, 4.0), (2, 2.0), (3, 3.0), (4, 1.0)])
    [(1, 4.0), (2, 3.0), (3, 3.0), (4, 2.0)]
    """
    losses = [loss for _, loss in curve]
    return [
        (steps, statistics.fmean(losses[max(0, place - WINDOW + 1) : place + 1]))
        for place, (steps, _) in enumerate(curve)
    ]


def target_of(curve: Curve) -> float:
    """The loss that exact training keeps from `TARGET_SHARE` of its steps on: the largest smoothed one there, and a
    little more.

    >>> round(target_of([(step, 10.0 / step) for step in range(1, 11)]), 3)  # the mean of 10/6, 10/7 and 10/8
    1.477
    """
    last = curve[-1][0]
    return SLACK * max(loss for steps, loss in smoothed(curve) if steps >= TARGET_SHARE * last)


def steps_to(curve: Curve, target: float) -> float | None:
    """Steps after which the smoothed loss is at most the target and stays there, between judgings by interpolation;
    None if it is above the target in the end.

    >>> steps_to([(10, 9.0), (20, 6.0), (30, 3.0)], 7.0)  # smoothed: 9, 7.5, 6
    23.333333333333332
    """
    seen = smoothed(curve)
    if not seen or math.isnan(seen[-1][1]) or seen[-1][1] > target:
        return None
    above = [place for place, (_, loss) in enumerate(seen) if not loss <= target]
    if not above:
        return float(seen[0][0])
    (before, high), (after, low) = seen[above[-1]], seen[above[-1] + 1]
    if not math.isfinite(high):
        return float(after)
    return before + (after - before) * (high - target) / (high - low)


def time_of_first(times_s: Sequence[float], steady_s: float, steps: float) -> float:
    """Of so many steps from the first one on: as measured, then as long as steady ones take.

    >>> time_of_first([3.0, 2.0, 1.0], 0.5, 5)
    7.0
    >>> time_of_first([3.0, 2.0, 1.0], 0.5, 2)
    5.0
    """
    measured = list(times_s[: math.ceil(steps)])
    return sum(measured) + max(steps - len(measured), 0.0) * steady_s


def whole_turns(seconds: float, step_time_s: float, every: int) -> int:
    """So many steps as take about so long, a multiple of `every`, at least one turn.

    >>> whole_turns(1.0, 0.01, 50), whole_turns(1.0, 0.1, 50), whole_turns(1.0, 0.3, 1)
    (100, 50, 3)
    """
    return max(round(seconds / max(step_time_s, 1e-6) / every), 1) * every
