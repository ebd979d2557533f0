"""Down-sets and what crosses them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given

from benchmarks.inter_cases import chain_problem, problems
from partita.errors import InputError
from partita.planner.inter import InterProblem
from partita.planner.inter.family import family_of


@given(problems())
def test_all_down_sets_and_their_bytes(problem: InterProblem) -> None:
    family = family_of(problem)
    pairs = problem.precedence()
    expected = {
        chosen
        for chosen in product([False, True], repeat=problem.num_ops)
        if all(chosen[first] or not chosen[second] for first, second in pairs)
    }
    rows = [tuple(row) for row in family.sets.tolist()]
    assert set(rows) == expected and len(rows) == len(expected) and family.complete
    assert not any(rows[0]) and all(rows[-1])
    for i, low in enumerate(rows):
        crossing = [v for v in problem.values if low[v.producer] and not all(low[c] for c in v.consumers)]
        assert family.forward_bytes[i] == sum(v.forward_bytes_per_row for v in crossing)
        assert family.backward_bytes[i] == sum(v.backward_bytes_per_row for v in crossing)
        for j, high in enumerate(rows):
            assert family.inside[i, j] == (low != high and all(h or not x for x, h in zip(low, high, strict=True)))


def test_wide_problems_fall_back_to_topological_orders() -> None:
    problem = chain_problem(12, ("gpu",), num_microbatches=1, batch_rows=1, row_s={"gpu": 1.0})
    wide = replace(problem, values=(), max_down_sets=100)
    family = family_of(wide)
    assert not family.complete and 13 <= len(family) <= 100


def test_a_cycle_is_refused() -> None:
    problem = chain_problem(3, ("gpu",), num_microbatches=1, batch_rows=1, row_s={"gpu": 1.0})
    with pytest.raises(InputError, match="must have no cycle"):
        family_of(replace(problem, before=((2, 0),)))
