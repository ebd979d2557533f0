"""The inter-stage solver against plain enumeration, its prices, and what a limit of the search does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.inter_cases import best_by_enumeration, chain_problem, long_pipelines, problems
from partita.errors import InfeasibleError
from partita.planner.inter import InterDevice, InterProblem, Links, solve_inter
from partita.planner.inter.price import price_inter

SLOW = list(HealthCheck)


def check(problem: InterProblem) -> None:
    best = best_by_enumeration(problem)
    if best is None:
        with pytest.raises(InfeasibleError, match=r"[Nn]o pipeline"):
            solve_inter(problem)
        return
    solution = solve_inter(problem, time_limit_s=600)
    assert solution.objective_s == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solution.lower_bound_s == pytest.approx(best, rel=1e-9, abs=1e-9)
    priced = price_inter(problem, solution)
    assert priced.broken == ()
    assert priced.objective_s == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert priced.memory_bytes == pytest.approx(solution.memory_bytes)


@given(problems())
@settings(max_examples=400, deadline=None, suppress_health_check=SLOW)
def test_equals_enumeration(problem: InterProblem) -> None:
    check(problem)


@given(long_pipelines())
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
def test_equals_enumeration_where_pipelines_pay(problem: InterProblem) -> None:
    check(problem)


@given(long_pipelines())
@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
def test_a_search_that_is_cut_short_still_tells_the_truth(problem: InterProblem) -> None:
    try:
        exact = solve_inter(problem)
    except InfeasibleError:
        return
    for max_nodes in (1, 3, 10):
        early = solve_inter(problem, max_nodes=max_nodes)
        assert early.lower_bound_s <= exact.objective_s * (1 + 1e-9)
        assert early.objective_s >= exact.objective_s * (1 - 1e-9)
        assert 0 <= early.gap < 1


@given(long_pipelines())
@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
def test_a_gap_may_be_left(problem: InterProblem) -> None:
    try:
        solution = solve_inter(problem, gap=0.1)
    except InfeasibleError:
        return
    assert solution.gap <= 0.1 + 1e-9
    others = [other.objective_s for other in solution.alternatives]
    assert others == sorted(others) and all(other >= solution.objective_s for other in others)


def test_a_slow_device_gets_fewer_ops_and_fewer_rows() -> None:
    problem = chain_problem(12, ("fast", "slow"), num_microbatches=12, batch_rows=12, row_s={"fast": 1.0, "slow": 2.0})
    staged = solve_inter(problem)
    assert [len(stage.ops) for stage in staged.stages] == [8, 4]
    shared = solve_inter(replace(problem, stage_sizes=(2,), microbatch_counts=(1,)))
    assert shared.stages[0].option.rows == (8, 4)
    assert shared.objective_s == pytest.approx(12 * 8 * 3.0)


def test_memory_in_flight_moves_ops_from_the_first_stage() -> None:
    """Under 1F1B the first of two stages holds two microbatches, the last one: a tight limit shifts ops back, and
    zero-bubble, where both hold two, no longer fits."""
    free = chain_problem(12, ("gpu", "gpu"), num_microbatches=12, batch_rows=12, row_s={"gpu": 1.0}, saved=1.0)
    assert [len(s.ops) for s in solve_inter(free).stages] == [6, 6]
    devices = tuple(replace(device, memory_bytes=8.0) for device in free.devices)
    assert [len(s.ops) for s in solve_inter(replace(free, devices=devices)).stages] == [4, 8]
    with pytest.raises(InfeasibleError, match="smallest change"):
        solve_inter(replace(free, devices=devices, schedules=("zero_bubble",)))


def test_schedules_are_chosen_jointly() -> None:
    problem = chain_problem(8, ("gpu",) * 4, num_microbatches=8, batch_rows=8, row_s={"gpu": 1.0})
    both = replace(problem, schedules=("gpipe", "1f1b", "zero_bubble", "interleaved"))
    assert solve_inter(both).schedule == "zero_bubble"
    # weight gradients that cannot be put off make interleaving the best
    late = chain_problem(8, ("gpu",) * 4, num_microbatches=8, batch_rows=8, row_s={"gpu": 1.0}, weight=0.0)
    assert solve_inter(replace(late, schedules=both.schedules)).schedule == "interleaved"


def test_an_order_is_chosen_on_an_irregular_network() -> None:
    """Devices 0-2 and 1-3 have fast links; the order that crosses the slow ones once wins."""
    speed = np.full((4, 4), 1.0)
    for a, b in ((0, 2), (1, 3), (2, 3)):
        speed[a, b] = speed[b, a] = 1e6
    problem = chain_problem(8, ("gpu",) * 4, num_microbatches=8, batch_rows=8, row_s={"gpu": 1.0}, crossing=3.0)
    problem = replace(problem, links=Links(latency_s=np.zeros((4, 4)), bytes_per_s=speed))
    given_order = solve_inter(replace(problem, orders=((0, 1, 2, 3),)))
    best = solve_inter(replace(problem, orders=((0, 1, 2, 3), (0, 2, 3, 1))))
    assert best.order == (0, 2, 3, 1) and best.objective_s < given_order.objective_s


def test_a_chain_of_many_ops_on_many_devices_has_a_small_gap() -> None:
    problem = chain_problem(120, ("gpu",) * 16, num_microbatches=64, batch_rows=64, row_s={"gpu": 1.0}, crossing=0.01)
    solution = solve_inter(problem, max_nodes=40)
    assert solution.gap < 0.05
    assert price_inter(problem, solution).objective_s == pytest.approx(solution.objective_s)


def test_idle_devices_are_allowed() -> None:
    problem = chain_problem(2, ("gpu", "gpu"), num_microbatches=1, batch_rows=1, row_s={"gpu": 1.0}, crossing=50.0)
    assert len(solve_inter(problem).stages) == 1


def test_a_device_of_its_own_name_is_named_where_memory_binds() -> None:
    problem = chain_problem(4, ("gpu", "gpu"), num_microbatches=2, batch_rows=2, row_s={"gpu": 1.0}, saved=10.0)
    devices = (
        InterDevice(name="left", kind="gpu", memory_bytes=1e9),
        InterDevice(name="right", kind="gpu", memory_bytes=5.0),
    )
    with pytest.raises(InfeasibleError, match="needs .* on right"):
        solve_inter(replace(problem, devices=devices, orders=((1, 0),)))
