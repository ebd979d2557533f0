"""The inter-stage solver against plain enumeration, and what it says where nothing fits."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from partita.errors import InfeasibleError
from partita.planner.inter import InterProblem, solve_inter
from tests.planner.inter_cases import best_by_enumeration, problems


@given(problems())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_enumeration(problem: InterProblem) -> None:
    best = best_by_enumeration(problem)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve_inter(problem)
        return
    solution = solve_inter(problem)
    assert solution.objective_s == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solution.lower_bound_s == pytest.approx(best, rel=1e-9, abs=1e-9)
