"""Even stages: the least largest stage."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.inter_cases import chain_problem, long_pipelines
from partita.planner.inter.family import family_of
from partita.planner.inter.incumbent import even_pipelines, fits_memory
from partita.planner.inter.pipeline import Setting
from partita.planner.inter.tables import Tables


@given(long_pipelines(), st.integers(1, 2))
@settings(max_examples=50, deadline=None)
def test_the_largest_stage_is_as_short_as_can_be(problem, chunks: int) -> None:  # type: ignore[no-untyped-def]
    tables = Tables(problem, family_of(problem))
    groups = len(problem.devices)
    m, count = problem.microbatch_counts[0] * groups, groups * chunks
    if problem.batch_rows % m or count > problem.num_ops:
        return
    setting = Setting(
        order=problem.orders[0],
        schedule="interleaved" if chunks > 1 else "1f1b",
        num_microbatches=m,
        num_stages=groups,
        num_chunks=chunks,
    )
    for choices in even_pipelines(tables, setting, groups):
        if chunks > 1:
            assert fits_memory(tables, setting, choices)
            continue

        def largest(cuts: tuple[int, ...]) -> float:
            edges = (0, *cuts, problem.num_ops)
            return max(
                tables.passes(setting.order[q : q + 1], m, min(m, groups - q))[0][low, high]
                for q, (low, high) in enumerate(pairwise(edges))
            )

        every = [largest(cuts) for cuts in combinations(range(1, problem.num_ops), count - 1)]
        assert largest(tuple(c.high for c in choices[:-1])) == pytest.approx(min(every))


def test_equal_ops_give_equal_stages() -> None:
    problem = chain_problem(12, ("gpu",) * 4, num_microbatches=8, batch_rows=8, row_s={"gpu": 1.0})
    setting = Setting(order=(0, 1, 2, 3), schedule="1f1b", num_microbatches=8)
    (choices,) = even_pipelines(Tables(problem, family_of(problem)), setting, 4)
    assert [c.high - c.low for c in choices] == [3, 3, 3, 3]
