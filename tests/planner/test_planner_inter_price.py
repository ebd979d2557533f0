"""Prices computed anew find what is wrong with a solution (that they agree on right ones, the solver's tests say)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.inter_cases import chain_problem
from partita.planner.inter import InterProblem, InterSolution, solve_inter
from partita.planner.inter.price import price_inter


@pytest.fixture
def problem() -> InterProblem:
    problem = chain_problem(6, ("a", "b"), num_microbatches=4, batch_rows=4, row_s={"a": 1.0, "b": 1.0}, saved=1.0)
    return replace(problem, devices=tuple(replace(device, memory_bytes=7.0) for device in problem.devices))


def broken(problem: InterProblem, solution: InterSolution, **changes: object) -> str:
    return "; ".join(price_inter(problem, replace(solution, **changes)).broken)  # type: ignore[arg-type]


def test_each_broken_rule_is_named(problem: InterProblem) -> None:
    solution = solve_inter(problem)
    first, second = solution.stages
    assert broken(problem, solution) == ""
    assert "exactly one stage" in broken(problem, solution, stages=(replace(first, ops=first.ops[1:]), second))
    swapped = (replace(first, ops=second.ops), replace(second, ops=first.ops))
    assert "earlier stage" in broken(problem, solution, stages=swapped)
    turned = (replace(first, devices=second.devices), replace(second, devices=first.devices))
    assert "beginning of an order" in broken(problem, solution, stages=turned)
    quick = replace(first, option=replace(first.option, forward_s=0.5))
    assert "do not offer" in broken(problem, solution, stages=(quick, second))
    assert "must be candidates" in broken(problem, solution, schedule="gpipe")
    assert "only the interleaved" in broken(problem, solution, num_chunks=2)
    heavy = replace(problem, devices=tuple(replace(device, memory_bytes=5.0) for device in problem.devices))
    assert "a0 needs 6 bytes of 5" in broken(heavy, solution)
    assert "stage_sizes" in broken(replace(problem, stage_sizes=(2,)), solution)


def test_the_step_is_the_longest_path(problem: InterProblem) -> None:
    """Two stages of 3 ops, 3 + 6 seconds a microbatch: (4 + 1) x 9."""
    assert price_inter(problem, solve_inter(problem)).objective_s == pytest.approx(45.0)
