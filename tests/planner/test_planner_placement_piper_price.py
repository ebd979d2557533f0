"""Times, memory and broken constraints of stages, checked by hand."""

from __future__ import annotations

import pytest

from partita.planner.placement import Stage, price_pipeline, read_piper
from tests.planner.test_planner_placement_piper_problem import FILE


def stage(*layers: int, d: int = 1, t: int = 1, way: int = 0) -> Stage:
    return Stage(layers=layers, data_degree=d, tensor_degree=t, ways=(way,) * len(layers))


def test_edges_cost_both_ends_and_data_parallelism_its_weights() -> None:
    priced = price_pipeline(read_piper(FILE), [stage(0, d=2), stage(1)])
    weights = 4 * 1 * 2 / (2 * 4)
    assert priced.stage_time_s == pytest.approx((1 / 2 + (2 * (9 + 6) / 2 + weights) / 5, 1 + 2 * (9 + 5) / 5))
    assert priced.stage_memory_bytes == (3 * 2 + 4, 3 + 4)  # ceil(3 / 2) microbatches in flight, then 1
    assert priced.objective_s == max(priced.stage_time_s)


def test_inside_a_stage_edges_are_free() -> None:
    priced = price_pipeline(read_piper(FILE, {"maxMemoryPerDevice": 14}), [stage(0, 1)])
    assert priced.stage_time_s == (2.0,)
    assert priced.stage_memory_bytes == (14.0,)
    assert priced.broken == ()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage(0)], "must be in one stage each"),
        ([stage(1), stage(0)], "earlier stage"),
        ([stage(0, d=2), stage(1)], "use 3 devices of 2"),
        ([stage(0, 1)], "needs 14 bytes"),
        ([stage(0, d=3), stage(1)], "does not divide 4"),
        ([stage(0, d=4), stage(1)], "more than the 4 microbatches"),
    ],
)
def test_broken_constraints_are_named(stages: list[Stage], message: str) -> None:
    assert any(message in sentence for sentence in price_pipeline(read_piper(FILE), stages).broken)
