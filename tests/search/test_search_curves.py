"""Learning curves: what is extrapolated from power laws, with and without noise, and from everything else."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.search.curves import Forecast, Point, forecast, gained, handicaps, is_past_best, score_at

SAMPLES = np.geomspace(100, 2000, 9)


def power_law(floor: float, slope: float, exponent: float, *, noise: float = 0.0, seed: int = 0) -> list[Point]:
    random = np.random.default_rng(seed)
    return [
        Point(n, n / 100, floor + slope * n**-exponent + noise * slope * 100**-exponent * random.standard_normal())
        for n in SAMPLES
    ]


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.0, 1.5])
def test_a_power_law_with_a_floor_is_found_again(exponent: float) -> None:
    floor, slope = 0.3, 2.0 * 100**exponent
    found = forecast(power_law(floor, slope, exponent), 40_000, maximize=False)
    gain = slope * (100**-exponent - 40_000**-exponent)
    assert found.score == pytest.approx(floor + slope * 40_000**-exponent, abs=0.05 * gain)
    assert found.deviation < 0.2 * gain


def test_noise_makes_it_less_sure_and_not_wrong() -> None:
    """Over many noisy curves the error is about what it says that it is."""
    errors, deviations = [], []
    for seed in range(60):
        found = forecast(power_law(0.3, 20.0, 0.5, noise=0.05, seed=seed), 20_000, maximize=False)
        deviations.append(found.deviation)
        errors.append((found.score - (0.3 + 20.0 * 20_000**-0.5)) / found.deviation)
    assert np.mean(deviations) > forecast(power_law(0.3, 20.0, 0.5), 20_000, maximize=False).deviation
    assert np.mean(np.abs(errors) < 2) > 0.8
    assert abs(np.mean(errors)) < 1.5


def test_it_is_nearer_than_the_last_score() -> None:
    """What it is for: to rank slow learners that end up better before fast ones that do not."""
    slow, fast = power_law(0.1, 8.0, 0.3), power_law(0.5, 100.0, 1.0)
    assert slow[-1].score > fast[-1].score
    at = 50_000
    assert forecast(slow, at, maximize=False).score < forecast(fast, at, maximize=False).score


@given(
    exponent=st.floats(0.15, 1.8), floor=st.floats(-3, 3), scale=st.floats(0.01, 100), shift=st.floats(-50, 50),
    seed=st.integers(0, 10),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_units_do_not_matter(exponent: float, floor: float, scale: float, shift: float, seed: int) -> None:
    """Scores in other units, turned round, and samples counted in thousands give the same forecast."""
    points = power_law(floor, 100**exponent, exponent, noise=0.02, seed=seed)
    found = forecast(points, 10_000, maximize=False)
    other = [Point(p.samples / 1000, p.train_s, -(scale * p.score + shift)) for p in points]
    turned = forecast(other, 10, maximize=True)
    assert -turned.score == pytest.approx(scale * found.score + shift, rel=1e-6, abs=1e-6 * scale)
    assert turned.deviation == pytest.approx(scale * found.deviation, rel=1e-6)


@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=9), maximize=st.booleans())
@settings(max_examples=60, deadline=None)
def test_anything_gives_a_number_that_is_not_worse_than_the_worst(values: list[float], maximize: bool) -> None:
    points = [Point(100.0 * (i + 1), float(i), value) for i, value in enumerate(values)]
    found = forecast(points, 5000, maximize=maximize)
    assert math.isfinite(found.score) and found.deviation >= 0
    worst, slack = (min if maximize else max)(values), 1e-6 * (1 + max(map(abs, values)))
    assert found.score >= worst - slack if maximize else found.score <= worst + slack


def test_curves_that_get_worse_are_not_expected_to_get_better() -> None:
    points = [Point(100.0 * i, i, 1.0 - 0.05 * i) for i in range(1, 9)]
    assert forecast(points, 10_000, maximize=True).score <= max(point.score for point in points)


def test_one_point_says_nothing_and_equal_ones_say_that_it_is_over() -> None:
    assert forecast([Point(10, 1, 0.5)], 100, maximize=True) == (0.5, math.inf)
    assert forecast([Point(10, 1, 0.5), Point(20, 2, 0.5)], 100, maximize=True) == (0.5, 0.0)


def test_no_forecast_is_better_than_the_bound() -> None:
    points = [Point(p.samples, p.train_s, 1.02 - 2 * p.samples**-0.3) for p in power_law(0, 1, 1)]
    assert forecast(points, 1e9, maximize=True).score > 1
    assert forecast(points, 1e9, maximize=True, bound=1.0).score == 1.0


def test_first_steps_are_left_out() -> None:
    """Before a quarter of the samples, training follows other laws."""
    points = power_law(0.3, 20.0, 0.5)
    strange = [Point(1, 0.01, 50.0), Point(4, 0.04, 70.0), *points]
    assert forecast(strange, 20_000, maximize=False) == forecast(points, 20_000, maximize=False)


def test_score_at_interpolates_what_was_measured() -> None:
    points = [Point(10, 1, 0.2), Point(1000, 2, 0.6)]
    assert score_at(points, 100, maximize=True).score == pytest.approx(0.4)
    assert score_at(points, 1, maximize=True).score == 0.2
    assert score_at(points, 1e5, maximize=True) == forecast(points, 1e5, maximize=True)


def test_a_curve_that_rises_for_good_is_past_its_best() -> None:
    falls = [Point(n, n / 100, 1.0 + (n / 100) ** -0.5) for n in range(100, 1100, 100)]
    assert not is_past_best(falls, maximize=False) and not is_past_best(falls[:1], maximize=False)
    rises = [Point(n, n / 100, 1.0 + abs(math.log(n / 300))) for n in range(100, 1100, 100)]
    assert [is_past_best(rises[:k], maximize=False) for k in range(1, 11)] == [False] * 5 + [True] * 5
    turned = [Point(*point[:2], -point.score) for point in rises]
    assert is_past_best(turned, maximize=True)


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_noise_on_a_plateau_is_no_reason_to_give_up(seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(0.0, 0.02, 30)
    noisy = [Point(100.0 * k, float(k), 0.9 - 0.3 / k + noise[k]) for k in range(1, 30)]
    assert not any(is_past_best(noisy[:k], maximize=True) for k in range(1, 30))


def test_the_best_score_counts_however_long_ago_it_was() -> None:
    rises = [Point(n, n / 100, 1.0 + abs(math.log(n / 300))) for n in range(100, 3000, 100)]
    assert forecast(rises, 6000, maximize=False) == Forecast(1.0, 0.0)


def test_gains_are_for_every_fold_of_samples_and_never_below_zero() -> None:
    curve = [Point(n, n / 100, 2.0 - 0.3 * math.log(n)) for n in (10, 100, 1000)]
    risen = [Point(one.samples, one.train_s, -one.score) for one in curve]
    assert gained(curve, 10, 1000, maximize=False) == pytest.approx(0.3)
    assert gained(risen, 10, 1000, maximize=True) == pytest.approx(0.3)
    assert gained(risen, 10, 1000, maximize=False) == 0 and gained(curve, 100, 100, maximize=False) == 0


SAMPLES_SEEN = st.lists(st.floats(1, 1e9), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(samples=SAMPLES_SEEN, gain=st.floats(0, 10), ahead=st.floats(1, 1000))
def test_who_has_seen_fewer_samples_is_expected_to_gain_more(samples: list[float], gain: float, ahead: float) -> None:
    found = handicaps([gain] * len(samples), samples, [ahead] * len(samples))
    assert sum(found) == pytest.approx(0, abs=1e-6 * (1 + gain))
    order = sorted(range(len(samples)), key=lambda i: samples[i])
    assert all(found[a] <= found[b] + 1e-9 for a, b in itertools.pairwise(order))
    assert handicaps([gain] * len(samples), samples, [1.0] * len(samples)) == [0.0] * len(samples)


def test_nobody_has_no_handicaps() -> None:
    assert handicaps([], [], []) == []
