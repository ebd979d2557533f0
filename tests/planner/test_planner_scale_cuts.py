"""Cuts of a chain against all cuts."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from partita.planner.scale.cuts import cut_chain


@given(st.data())
def test_no_cut_is_better(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    chunks = data.draw(st.integers(1, size))
    kinds = data.draw(st.sampled_from([1, chunks]))
    row = st.lists(st.integers(1, 9).map(float), min_size=size, max_size=size)
    times = data.draw(st.lists(row, min_size=kinds, max_size=kinds))

    def largest(begins: tuple[int, ...]) -> float:
        ends = [*begins[1:], size]
        return max(sum(times[i % kinds][b:e]) for i, (b, e) in enumerate(zip(begins, ends, strict=True)))

    best = min(largest((0, *rest)) for rest in itertools.combinations(range(1, size), chunks - 1))
    for from_end in (False, True):
        begins = cut_chain(times, chunks, from_end=from_end)
        assert len(begins) == chunks and abs(largest(begins) - best) < 1e-6 * best
