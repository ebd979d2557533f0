"""Frontiers against all pairs; thinned ones stay on their side."""

from __future__ import annotations

import numpy as np
import pytest

from partita.planner.placement.groups import Array
from partita.planner.placement.piper_frontier import Thinning, add_layer, frontier, thinned


def random_points(seed: int, count: int) -> Array:
    return np.random.default_rng(seed).integers(0, 12, size=(count, 4)).astype(np.float64)


def beats(points: Array, other: Array) -> bool:
    return bool((points <= other).all(axis=1).any())


@pytest.mark.parametrize(("seed", "count"), [(0, 0), (1, 1), (2, 60), (3, 300), (4, 3000)])
def test_the_frontier_keeps_what_nothing_beats(seed: int, count: int) -> None:
    points = random_points(seed, count)
    kept = frontier(points)
    assert all(beats(kept, point) for point in points)
    for i, point in enumerate(kept):
        assert not beats(np.delete(kept, i, axis=0), point)


def test_a_frontier_grows_by_one_layer_within_the_limit() -> None:
    points, rows = random_points(5, 8), random_points(6, 3)
    grown = add_layer(points, rows, 20.0, Thinning(limit=1000))
    sums = (points[:, None] + rows[None]).reshape(-1, 4)
    assert all(beats(grown, point) for point in sums if point[2] + point[3] <= 20)
    assert (grown[:, 2] + grown[:, 3] <= 20).all()


@pytest.mark.parametrize("seed", range(10))
def test_thinned_points_are_real_or_optimistic(seed: int) -> None:
    points = frontier(np.random.default_rng(seed).dirichlet(np.ones(4), size=100))  # of equal sums: none beats another
    real, optimistic = Thinning(limit=7), Thinning(limit=7, optimistic=True)
    kept = thinned(points, real)
    assert len(kept) == 7 and real.happened
    assert {tuple(point) for point in kept} <= {tuple(point) for point in points}
    below = thinned(points, optimistic)
    assert len(below) <= 7 and all(beats(below, point) for point in points)
    assert thinned(points, Thinning(limit=1000)) is points
