"""Calibration from measured runs: a few constants of each generation of GPUs, by regularised least squares.

With constants c (positive; u = log c), runs i with measured time y_i and predicted p_i(c), and shipped constants c0:

    minimise  sum_i w_i rho(log p_i(c) - log y_i) + sum_j ((u_j - log c0_j) / s_j)^2

`rho` is Huber's loss (quadratic up to `HUBER`: single measurements are off by tens of per cent). `w_i` shares
`SOURCE_WEIGHT` among the runs of one source beyond its first ones, so that a sweep of hundreds does not outvote the
rest. The second term is a prior of `s_j` (as a share of the constant) that keeps what the runs do not determine.
Solved by Levenberg-Marquardt with differences (Moré, 1978), one generation after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from partita.cost.calibration import KNOWN, LIMITS, PRIOR_SPREADS, Calibration
from partita.errors import InputError
from partita.planner.scale.runs import Measured

Vector = np.ndarray[Any, np.dtype[np.float64]]
HUBER = 0.15
SOURCE_RUNS = 30  # a source's runs count fully up to about this many
MAX_ROUNDS = 25
SCALE = 0.1  # the error of a run that weighs as much as one spread of a constant


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The calibration found, and mean absolute relative errors of the runs before and after."""

    calibration: Calibration
    error_before: float
    error_after: float
    num_runs: int


def fit(measured: Sequence[Measured], start: Calibration | None = None) -> Fit:
    """Fit the constants of the generations that occur in `measured`, from `start` (default: the shipped ones).

    Raises:
        InputError: there is no run.
    """
    if not measured:
        raise InputError("a calibration must have at least one measured run that can be predicted, but got none.")
    start = start or Calibration()
    found = start
    for generation in sorted({name for one in measured for name in _generations(one, start)}):
        own = [one for one in measured if generation in _generations(one, start)]
        found = _fit_generation(own, found, generation)
    return Fit(
        calibration=found,
        error_before=mean_error(measured, start),
        error_after=mean_error(measured, found),
        num_runs=len(measured),
    )


def _generations(one: Measured, calibration: Calibration) -> set[str]:
    return {calibration.name_of(group.kind.generation) for group in one.run.fabric.groups}


def _fit_generation(measured: list[Measured], start: Calibration, generation: str) -> Calibration:
    names = list(PRIOR_SPREADS)
    origin = np.log([getattr(start.of(generation), name) for name in names])
    known = {name: spread for name, (_, spread) in KNOWN.get(generation, {}).items()}
    spreads = np.array([known.get(name, PRIOR_SPREADS[name]) for name in names])
    counts = Counter(one.source for one in measured)
    weights = np.array([min(1.0, SOURCE_RUNS / counts[one.source]) ** 0.5 for one in measured])
    targets = np.log([one.step_time_s for one in measured])

    def residuals(point: Vector) -> Vector:
        calibration = _at(start, generation, names, point)
        errors = np.log([one.run.predict(calibration).step_time_s for one in measured]) - targets
        size = np.abs(errors)
        huber = np.where(size > HUBER, np.sign(errors) * np.sqrt(np.maximum(2 * HUBER * size - HUBER**2, 0)), errors)
        return np.concatenate([weights * huber, SCALE * (point - origin) / spreads])

    return _at(start, generation, names, _minimise(residuals, origin))


def mean_error(measured: Sequence[Measured], calibration: Calibration) -> float:
    """Mean of |predicted / measured - 1|."""
    ratios = [one.run.predict(calibration).step_time_s / one.step_time_s for one in measured]
    return float(np.mean(np.abs(np.array(ratios) - 1)))


def _at(start: Calibration, generation: str, names: list[str], point: Vector) -> Calibration:
    values = {}
    for name, log_value in zip(names, point, strict=True):
        low, high = LIMITS.get(name, (0.0, float("inf")))
        values[name] = float(min(max(np.exp(log_value), low), high))
    return start.with_constants(generation, **values)


def _minimise(residuals: Callable[[Vector], Vector], origin: Vector) -> Vector:
    """Levenberg-Marquardt with a forward-difference Jacobian."""
    point, damping = origin.copy(), 1e-2
    current = residuals(point)
    for _ in range(MAX_ROUNDS):
        jacobian = np.stack([(residuals(point + step) - current) / 0.02 for step in 0.02 * np.eye(len(origin))], axis=1)
        gradient, hessian = jacobian.T @ current, jacobian.T @ jacobian
        improved = False
        for _ in range(8):
            move = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian) + 1e-9), -gradient)
            candidate = residuals(point + np.clip(move, -0.5, 0.5))
            if candidate @ candidate < current @ current:
                gain = 1 - (candidate @ candidate) / (current @ current)
                point, current, damping, improved = point + np.clip(move, -0.5, 0.5), candidate, damping / 3, True
                break
            damping *= 4
        if not improved or gain < 1e-4:
            break
    return point
