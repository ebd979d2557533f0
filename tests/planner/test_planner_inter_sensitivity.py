"""What would help most."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.inter_cases import chain_problem, problems
from partita.errors import InfeasibleError
from partita.planner.inter import InterProblem, solve_inter
from partita.planner.inter.price import price_inter
from partita.planner.inter.sensitivity import sensitivities


@given(problems(max_ops=4, max_devices=3))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_change_hurts_and_the_most_helpful_is_first(problem: InterProblem) -> None:
    try:
        solution = solve_inter(problem)
    except InfeasibleError:
        return
    found = sensitivities(problem, solution, time_limit_s=60)
    saved = [one.saved_s for one in found]
    assert saved == sorted(saved, reverse=True) and min(saved, default=0) >= 0
    for one in found:
        assert one.saved_s <= one.saved_at_most_s + 1e-9
        assert solution.objective_s >= one.solution.objective_s - 1e-9
    if any(device.memory_bytes < 1e9 for device in problem.devices):
        assert any("memory" in one.change for one in found)


def test_a_device_helps_a_chain_that_computes_and_bandwidth_one_that_sends() -> None:
    computes = chain_problem(12, ("gpu",) * 3, num_microbatches=12, batch_rows=12, row_s={"gpu": 1.0})
    best = sensitivities(computes, solve_inter(computes))[0]
    assert best.change == "one more device of kind gpu"
    assert best.saved_s == pytest.approx((12 + 2) * 4 * 3 - (12 + 3) * 3 * 3)
    assert "saves" in str(best)
    sends = chain_problem(3, ("gpu",) * 3, num_microbatches=12, batch_rows=12, row_s={"gpu": 1.0}, crossing=2.0)
    assert "bandwidth" in sensitivities(sends, solve_inter(sends))[0].change


def test_memory_helps_where_it_binds() -> None:
    problem = chain_problem(12, ("gpu", "gpu"), num_microbatches=12, batch_rows=12, row_s={"gpu": 1.0}, saved=1.0)
    tight = replace(problem, devices=tuple(replace(device, memory_bytes=8.0) for device in problem.devices))
    found = {one.change: one for one in sensitivities(tight, solve_inter(tight), memory_factor=1.5)}
    assert found["1.5 times the memory of every device"].saved_s > 0
    for one in found.values():
        assert one.solution.stages
    assert price_inter(problem, solve_inter(problem)).broken == ()
