"""The smallest change that is named is the smallest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings

from benchmarks.inter_cases import best_by_enumeration, chain_problem, problems
from partita.errors import InfeasibleError
from partita.planner.inter import InterProblem, solve_inter
from partita.planner.inter.family import family_of
from partita.planner.inter.infeasible import least_memory_factor
from partita.planner.inter.tables import Tables


def scaled(problem: InterProblem, factor: float) -> InterProblem:
    devices = tuple(replace(device, memory_bytes=factor * device.memory_bytes) for device in problem.devices)
    return replace(problem, devices=devices)


@given(problems(max_ops=4, max_devices=3))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_factor_is_the_least(problem: InterProblem) -> None:
    assume(all(device.memory_bytes < 1e9 for device in problem.devices) and "interleaved" not in problem.schedules)
    found, exact = least_memory_factor(Tables(problem, family_of(problem)))
    if found is None:
        assert best_by_enumeration(scaled(problem, 1e6)) is None
        return
    assert exact
    factor = found[0]
    assert best_by_enumeration(scaled(problem, factor * (1 + 1e-6) + 1e-9)) is not None
    if factor > 1e-6:
        assert best_by_enumeration(scaled(problem, factor * (1 - 1e-6))) is None


def test_the_message_names_device_need_and_change() -> None:
    problem = chain_problem(4, ("gpu", "gpu"), num_microbatches=2, batch_rows=2, row_s={"gpu": 1.0}, saved=10.0)
    with pytest.raises(InfeasibleError, match=r"needs 30 B on gpu\d, which has 24 B. The smallest change: 1.25 times"):
        # one op in flight twice on the first device, three on the second: 20 and 30; 20 + 20 and 20 otherwise
        solve_inter(replace(problem, devices=tuple(replace(d, memory_bytes=24.0) for d in problem.devices)))


def test_without_limits_the_options_are_named() -> None:
    problem = chain_problem(2, ("gpu",), num_microbatches=1, batch_rows=1, row_s={"gpu": 1.0})
    with pytest.raises(InfeasibleError, match="stage_sizes"):
        solve_inter(replace(problem, stage_sizes=(2,)))
