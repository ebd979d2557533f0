"""Stage boundaries against brute force, and the bound against both."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import InfeasibleError
from partita.planner.bound import pipeline_bound_s
from partita.planner.stages import StageProblem, StageSolution, evaluate_starts, solve_stages


@st.composite
def problems(draw: st.DrawFn) -> StageProblem:
    num_ops = draw(st.integers(1, 9))
    num_stages = draw(st.integers(1, min(4, num_ops)))
    numbers = st.integers(0, 9).map(float)
    row = st.lists(numbers, min_size=num_ops, max_size=num_ops)
    grid = st.lists(row, min_size=num_stages, max_size=num_stages)
    limits = draw(st.lists(st.sampled_from([5.0, 20.0, np.inf]), min_size=num_stages, max_size=num_stages))
    return StageProblem(
        time_s=np.array(draw(grid)),
        transfer_s=np.array(draw(grid)),
        memory_bytes=np.array(draw(grid)),
        limit_bytes=np.array(limits),
        num_microbatches=draw(st.integers(1, 6)),
    )


def brute_force(problem: StageProblem) -> StageSolution | None:
    num_stages, num_ops = problem.time_s.shape
    found = [evaluate_starts(problem, starts) for starts in combinations(range(1, num_ops), num_stages - 1)]
    feasible = [solution for solution in found if solution is not None]
    return min(feasible, key=lambda solution: solution.objective_s, default=None)


@given(problems())
@settings(max_examples=400, deadline=None)
def test_equals_brute_force(problem: StageProblem) -> None:
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasibleError, match="smallest change"):
            solve_stages(problem)
        return
    assert solve_stages(problem).objective_s == pytest.approx(best.objective_s)
    assert pipeline_bound_s(problem.time_s, problem.time_s.shape[0], problem.num_microbatches) <= best.objective_s


def test_more_stages_than_ops_is_infeasible() -> None:
    one = np.ones((3, 2))
    with pytest.raises(InfeasibleError, match="3 stages for 2 ops"):
        solve_stages(
            StageProblem(
                time_s=one, transfer_s=one, memory_bytes=one, limit_bytes=np.full(3, np.inf), num_microbatches=1
            )
        )


def test_a_slow_device_gets_fewer_ops() -> None:
    time_s = np.stack([np.ones(9), 2 * np.ones(9)])
    zero = np.zeros((2, 9))
    problem = StageProblem(
        time_s=time_s, transfer_s=zero, memory_bytes=zero, limit_bytes=np.full(2, np.inf), num_microbatches=50
    )
    assert solve_stages(problem).starts == (6,)
