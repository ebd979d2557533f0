"""Bucket sizes against brute force over the formula that they follow from."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.plan import Plan, Prediction, Worker
from partita.planner.overlap import LEAST_BUCKET_BYTES, LEAST_SHARE, MOST_BUCKETS, best_buckets, bucket_sizes


def plan_of(processes: tuple[int, ...], step_time_s: float = 1.0, **options: Any) -> Plan:
    workers = tuple(Worker(index=i, process=p, machine=p, cores=(0,), stage=0, data=i) for i, p in enumerate(processes))
    return Plan(
        mode="graph",
        graph_fingerprint="",
        cluster_fingerprint="",
        axes={"data": len(processes), "pipeline": 1},
        workers=workers,
        threads_per_worker=1,
        prediction=Prediction(step_time_s=step_time_s, lower_bound_s=0.0, uncertainty=0.1, memory_bytes={}),
        **options,
    )


def cost_of(latency_s: float, bytes_per_s: float, taken_s: float = 0.0) -> Any:
    return SimpleNamespace(
        gradient_sum_time_s=lambda num_bytes, group: latency_s + num_bytes / bytes_per_s,
        interruption_s=lambda num_bytes, place, num_processes, num_busy: taken_s,
    )


@given(st.floats(1e-5, 1e-2), st.floats(0.05, 2.0), st.floats(0.1, 1.0))
def test_twice_or_half_the_best_number_is_among_the_sizes(
    latency_s: float, backward_s: float, exchange_s: float
) -> None:
    num_bytes = 100_000_000
    cost = cost_of(latency_s, num_bytes / exchange_s)
    sizes = bucket_sizes(plan_of((0, 1)), 1.5 * backward_s + exchange_s, num_bytes, cost)

    def exposed_s(count: int) -> float:
        """The step beyond the forward phase: equal buckets, made one after the other, sent one after the other."""
        sent_s = 0.0
        for number in range(1, count + 1):
            sent_s = max(sent_s, backward_s * number / count) + latency_s + exchange_s / count
        return sent_s

    if not sizes:  # so little that hiding all of it would not pay
        assert exchange_s < LEAST_SHARE * (1.5 * backward_s + exchange_s)
        return
    best_s = min(exposed_s(count) for count in range(1, MOST_BUCKETS + 1))
    found_s = min(exposed_s(round(num_bytes / size)) for size in sizes)
    assert found_s <= 1.1 * best_s


def test_no_sizes_where_nothing_can_be_hidden() -> None:
    slow = cost_of(1e-4, 1e7)
    assert bucket_sizes(plan_of((0, 1)), 1.0, 4_000_000, slow)
    assert not bucket_sizes(plan_of((0, 0)), 1.0, 4_000_000, slow)  # one process
    assert not bucket_sizes(plan_of((0, 1)), 1.0, 0, slow)
    assert not bucket_sizes(plan_of((0, 1)), 1.0, 4_000_000, cost_of(1e-4, 1e9))  # next to no time
    assert not bucket_sizes(plan_of((0, 1)), 1.0, LEAST_BUCKET_BYTES, cost_of(1e-4, 1e5))  # less than two buckets


def test_buckets_that_take_time_of_the_workers_are_larger() -> None:
    free, taken = (bucket_sizes(plan_of((0, 1)), 1.0, 4_000_000, cost_of(1e-3, 1e7, s)) for s in (0.0, 3e-3))
    assert min(taken) == pytest.approx(2 * min(free), rel=0.1)


@pytest.mark.parametrize("factor", [0.5, 0.99, 2.0])
def test_buckets_are_taken_only_for_a_gain(factor: float) -> None:
    def evaluate(plan: Plan) -> Plan | None:
        assert plan.prediction is not None
        time_s = factor * (1.0 + 1e-9 * plan.bucket_bytes)
        return msgspec.structs.replace(plan, prediction=msgspec.structs.replace(plan.prediction, step_time_s=time_s))

    plain, cost = plan_of((0, 1)), cost_of(1e-4, 1e7)
    best = best_buckets(plain, 4_000_000, cost, evaluate)
    if factor > 0.5:
        assert best == plain
    else:
        assert best.bucket_bytes == min(bucket_sizes(plain, 1.0, 4_000_000, cost))
        assert best.prediction is not None and math.isclose(best.prediction.step_time_s, 0.5, rel_tol=1e-2)
        assert "in the background" in best.reasons[-1]
    assert best_buckets(plain, 4_000_000, cost, lambda plan: None) == plain
    several = plan_of((0, 1), num_microbatches=4)
    assert best_buckets(several, 4_000_000, cost, evaluate, keeps_microbatches=True) == several
    assert best_buckets(several, 4_000_000, cost, evaluate).num_microbatches == (4 if factor > 0.5 else 1)
