"""Learning curves: what a score will be after more training, and how sure that is.

    y(n) = c + a (n / m)^-b,    n  samples seen,  y  the best score until then, turned so that lower is better,
                                m  samples of the last point

A power law with a floor. Given an exponent b, the floor c and the slope a >= 0 are a linear least-squares fit. Few
noisy points do not tell b, so none is chosen: predictions of all exponents on a grid are averaged, weighted by

    p(b | points) ~ p(b) (S_b + s^2)^(-k/2),    S_b  sum of squared residuals over k points

which is the marginal likelihood up to terms that hardly depend on b, with the noise integrated out; p(b) is log-normal
around 0.5. Their spread, with the residuals', is the uncertainty, times `DOUBT`. Points from before a quarter of the
samples are left out: the first steps follow other laws. Scores that are worse than earlier ones count as these, since
the best weights are kept: one spike would change the whole fit.

`OLDEST`, `LEAST_NOISE` and `DOUBT` are those of small trainings (characters by transformers and convolutions, digits by
perceptrons), continued to 2, 4 and 8 times their samples: errors are 0.3 to 0.4 of the improvement that is to come for
characters; with points from a twentieth on they were 0.4 to 0.45, and larger than it for digits.

What a decaying learning rate adds in the end is not predicted, for no candidate.

No power law rises again, but where data are few scores do: from some moment on the network learns them by heart.
`is_past_best` tells of a curve whether training on is of no use. Scores are noisy, so that a best one alone says
nothing: as many samples again as had led to it, and at least `LEAST_AFTER` points, must have been worse by a good part
of all that was gained until then.

Sources: the form is "pow3" of Viering and Loog, "The shape of learning curves", 2022, section 4, and Hestness et al.
2017; averaging over forms instead of choosing one Domhan et al. 2015, section 3, here over exponents on a grid and
without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXPONENTS = np.geomspace(0.1, 2.0, 24)
PRIOR_EXPONENT, PRIOR_WIDTH = 0.5, 0.8  # the width in logarithms
OLDEST = 1 / 4  # of the last point's samples
LEAST_NOISE = 0.03  # of the range of the points: scores are never exact, and curves no power laws
DOUBT = 2.0  # real curves are so many times as far off as their fits say
FALL = 0.15  # of the gain for an e-fold of samples, for every e-fold that a candidate is ahead of others
PAST, LEAST_AFTER, WORSE = 2.0, 3, 0.2  # of the best point's samples; points; of the gain until then, in the mean


class Point(NamedTuple):
    """A candidate's score after so many samples and seconds of training."""

    samples: float
    train_s: float
    score: float


class Forecast(NamedTuple):
    """A predicted score, and its standard deviation (infinite: one or two points say nothing of the future)."""

    score: float
    deviation: float


def forecast(points: Sequence[Point], at_samples: float, *, maximize: bool, bound: float | None = None) -> Forecast:
    """The score after `at_samples` samples.

    Args:
        points: by samples, ascending; at least one.
        at_samples: at least those of the last point.
        maximize: whether higher scores are better.
        bound: no score is better than this, e.g. 1.0 for a share that is right; None: unknown.

    Example:
        >>> curve = [Point(n, n / 100, 1.0 + n**-0.5) for n in (100, 200, 400, 800)]
        >>> round(forecast(curve, 80_000, maximize=False).score, 2)
        1.0
    """
    sign = -1.0 if maximize else 1.0
    x = np.array([point.samples for point in points], dtype=np.float64)
    y = sign * np.array([point.score for point in points], dtype=np.float64)
    recent = x >= OLDEST * x[-1]
    x, y = x[recent], np.minimum.accumulate(y)[recent]
    if len(x) == 1:
        return Forecast(float(sign * y[0]), float("inf"))
    spread = float(np.ptp(y))
    if spread == 0:
        return Forecast(float(sign * y[-1]), 0.0)
    later = max(1.0, at_samples / x[-1])
    predictions, residuals = _fits(x / x[-1], (y - y[-1]) / spread, later)
    weights = _weights(residuals, len(x))
    mean = float(weights @ predictions)
    variance = weights @ ((predictions - mean) ** 2 + (residuals + LEAST_NOISE**2) / len(x))
    variance *= len(x) / (len(x) - 2) if len(x) > 2 else float("inf")  # floor and slope are estimates
    found = float(y[-1]) + spread * mean
    found = found if bound is None else max(found, sign * bound)
    return Forecast(sign * found, DOUBT * spread * float(np.sqrt(variance)))


def is_past_best(points: Sequence[Point], *, maximize: bool) -> bool:
    """Whether the scores have become worse for good, so that a training that goes on will not find better ones.

    Example:
        >>> curve = [Point(n, n / 100, abs(n - 300) / 1000) for n in range(100, 800, 100)]
        >>> is_past_best(curve[:5], maximize=False), is_past_best(curve, maximize=False)
        (False, True)
    """
    y = (-1.0 if maximize else 1.0) * np.array([point.score for point in points])
    best = int(np.argmin(y)) if len(y) else 0
    after = y[best + 1 :]
    if len(after) < LEAST_AFTER or points[-1].samples < PAST * points[best].samples:
        return False
    return bool(after.mean() - y[best] > WORSE * (y[: best + 1].max() - y[best]))


def score_at(points: Sequence[Point], at_samples: float, *, maximize: bool, bound: float | None = None) -> Forecast:
    """The score after any number of samples: between points interpolated by their logarithms, as measured; after the
    last one as `forecast`; before the first one that of the first."""
    if at_samples > points[-1].samples:
        return forecast(points, at_samples, maximize=maximize, bound=bound)
    seen = np.log([max(1.0, point.samples) for point in points])
    return Forecast(float(np.interp(np.log(max(1.0, at_samples)), seen, [point.score for point in points])), 0.0)


def gained(points: Sequence[Point], before_samples: float, until_samples: float, *, maximize: bool) -> float:
    """How much better the score became for every e-fold of samples from `before_samples` to `until_samples`, at least
    0.

    Example:
        >>> curve = [Point(n, n / 100, 3.0 - np.log(n / 100)) for n in (100, 200, 400)]
        >>> round(gained(curve, 100, 400, maximize=False), 6)
        1.0
    """
    before, until = (score_at(points, n, maximize=maximize).score for n in (before_samples, until_samples))
    better = (until - before) if maximize else (before - until)
    folds = float(np.log(max(until_samples, 1.0) / max(before_samples, 1.0)))
    return max(0.0, better / folds) if folds > 0 else 0.0


def handicaps(gains: Sequence[float], samples: Sequence[float], ahead: Sequence[float]) -> list[float]:
    """What is added to predicted scores, turned so that lower is better, when candidates are compared: who has seen
    fewer samples in the same time has more to come than a short curve tells.

        h_i = FALL g log(ahead_i) (log n_i - mean log n)

    Curves flatten with the samples, so the gain for a next e-fold of them is taken to be the typical one less a share
    `FALL` of it for every e-fold that the candidate is ahead of the others: large networks are still in the steep part
    of their curves when small ones have come through. Of 24 candidates, by which `FALL` was chosen, the correlation of
    ranks with the loss after 37 s rises from 0.62 to 0.68 after 1.3 s, from 0.75 to 0.82 after 4 s and from 0.89 to
    0.96 after 12 s. Simulated searches (`benchmarks.allocation`) among 24 of 32 others come to a loss of 1.598 instead
    of 1.621, where the best of these have 1.596 after 37 s.

    Args:
        gains: of every candidate, lately (`gained`); g is their median.
        samples: n_i, that every candidate has seen, or will have, at the instant of the comparison.
        ahead: how many times its training so far the training will be in the end.

    Example:
        >>> [round(value, 3) for value in handicaps([0.4, 0.4], [100.0, 1000.0], [10.0, 10.0])]
        [-0.159, 0.159]
    """
    if not samples:
        return []
    logs = np.log(np.maximum(1.0, np.asarray(samples, dtype=np.float64)))
    typical = float(np.median(gains))
    return [float(value) for value in FALL * typical * np.log(np.maximum(1.0, ahead)) * (logs - logs.mean())]


def _fits(x_K: np.ndarray, y_K: np.ndarray, later: float) -> tuple[np.ndarray, np.ndarray]:
    """By exponent, the prediction at `later` (in units of the last x) and the sum of squared residuals. E exponents, K
    points."""
    z_EK = x_K ** -EXPONENTS[:, None]
    z_E, y = z_EK.mean(1), y_K.mean()
    off_EK = z_EK - z_E[:, None]
    slope_E = np.maximum(0.0, (off_EK @ (y_K - y)) / (off_EK**2).sum(1))
    residual_EK = (y_K - y) - slope_E[:, None] * off_EK
    return y + slope_E * (later**-EXPONENTS - z_E), (residual_EK**2).sum(1)


def _weights(residuals: np.ndarray, num_points: int) -> np.ndarray:
    prior = -0.5 * (np.log(EXPONENTS / PRIOR_EXPONENT) / PRIOR_WIDTH) ** 2
    logs = prior - num_points / 2 * np.log(residuals + LEAST_NOISE**2)
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())
