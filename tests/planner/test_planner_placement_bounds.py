"""Bounds never exceed the optimum, and bins are counted as by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.planner.placement import read_placement
from partita.planner.placement.bounds import lower_bound, num_bins
from partita.planner.placement.groups import contract_colors
from tests.planner.placement_cases import best_placement, placement_file


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_bound_is_at_most_the_optimum(seed: int) -> None:
    problem = read_placement(placement_file(seed))
    if problem.num_devices ** len(problem.operators) > 3000:
        return
    optima = best_placement(problem)
    if optima is not None:
        bound = lower_bound(contract_colors(problem), optima[0] * 1.5)
        assert bound <= optima[0] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("items", "bins"),
    [([], 0), ([0.6, 0.6, 0.6], 3), ([0.34] * 6, 3), ([1 / 3] * 6, 2), ([0.21] * 24 + [0.33], 7), ([0.5, 0.5], 1)],
)
def test_bins_needed(items: list[float], bins: int) -> None:
    assert num_bins(np.array(items)) == bins
