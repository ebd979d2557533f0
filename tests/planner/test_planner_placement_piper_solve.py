"""Optima against enumeration, thinned frontiers, the published figure, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import InfeasibleError
from partita.planner.placement import piper_solve, price_pipeline, read_piper, solve_piper
from tests.planner.placement_cases import best_pipeline, piper_file
from tests.planner.test_planner_placement_piper_problem import FILE, PUBLISHED

LIMITS = {"maxDevices": 512, "maxMemoryPerDevice": 8 * 2**30, "bandwidth": 25 * 2**30, "mbsInBatch": 1920}


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_optima_are_those_of_enumeration(seed: int) -> None:
    problem = read_piper(piper_file(seed))
    optimum = best_pipeline(problem)
    if optimum is None:
        with pytest.raises(InfeasibleError, match="maxMemoryPerDevice"):
            solve_piper(problem)
        return
    solution = solve_piper(problem)
    assert solution.priced == price_pipeline(problem, solution.stages)
    assert solution.priced.broken == ()
    assert solution.exact
    assert solution.objective_s == pytest.approx(optimum, abs=1e-9)
    assert solution.lower_bound_s == pytest.approx(optimum, rel=1e-8)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_thinned_frontiers_keep_bounds_and_pipelines_valid(seed: int) -> None:
    problem = read_piper(piper_file(seed))
    optimum = best_pipeline(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piper_solve, "_POINTS", (1,))
        try:
            solution = solve_piper(problem)
        except InfeasibleError:
            return  # what would have fitted may have been dropped
    assert optimum is not None
    assert solution.priced.broken == ()
    assert solution.lower_bound_s <= optimum * (1 + 1e-9)
    assert solution.objective_s >= optimum * (1 - 1e-9)


def test_a_family_of_some_ideals_keeps_bounds_and_pipelines_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piper_solve, "_MAX_IDEALS", 4)
    monkeypatch.setattr(piper_solve, "_COARSE", ((2, 2),))
    for seed in range(60):
        problem = read_piper(piper_file(seed))
        optimum = best_pipeline(problem)
        if optimum is not None:
            solution = solve_piper(problem)
            assert solution.priced.broken == ()
            assert solution.lower_bound_s <= optimum * (1 + 1e-9) <= solution.objective_s * (1 + 2e-9)


def test_the_published_figure_is_reached_and_proven() -> None:
    problem = read_piper(json.loads(PUBLISHED.read_text()), LIMITS)
    solution = solve_piper(problem, time_limit_s=20.0)
    assert solution.objective_s == pytest.approx(0.00256113, abs=5e-9)
    assert solution.exact
    assert solution.lower_bound_s == pytest.approx(solution.objective_s, rel=1e-8)


def test_too_little_memory_is_named() -> None:
    with pytest.raises(InfeasibleError, match="maxMemoryPerDevice"):
        solve_piper(read_piper(FILE, {"maxMemoryPerDevice": 6}))
