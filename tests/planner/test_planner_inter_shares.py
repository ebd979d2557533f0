"""Shares of rows: the best ones are among the candidates."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from partita.planner.inter.shares import share_candidates


@given(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(1, 7), st.lists(st.integers(1, 9), min_size=3))
def test_the_fastest_shares_are_candidates(classes: list[int], rows: int, slowness: list[int]) -> None:
    candidates = share_candidates(classes, [1 / slowness[c] for c in classes], rows, 1000)
    assert len(set(candidates)) == len(candidates)
    for share in candidates:
        assert sum(share) == rows and min(share) >= 0 and len(share) == len(classes)

    def time(share: tuple[int, ...]) -> tuple[int, int]:
        """Two unlike costs, so that shares proportional to either are not the only ones."""
        first = max(r * slowness[c] for r, c in zip(share, classes, strict=True))
        return first, max(r * (10 - slowness[c]) for r, c in zip(share, classes, strict=True))

    every = [share for share in product(range(rows + 1), repeat=len(classes)) if sum(share) == rows]
    for weight in (0, 1, 3):
        best = min(time(share)[0] + weight * time(share)[1] for share in every)
        assert min(time(share)[0] + weight * time(share)[1] for share in candidates) == best


def test_few_candidates_are_those_near_the_speeds() -> None:
    shares = share_candidates(["a", "a", "b"], [2.0, 2.0, 1.0], 5000, 3)
    assert len(shares) == 3 and (2000, 2000, 1000) in shares


def test_many_classes_stay_few_candidates() -> None:
    shares = share_candidates(list(range(6)), [1.0 + i for i in range(6)], 2100, 8)
    assert 1 <= len(shares) <= 8
    assert all(abs(r - 100 * (1 + i)) <= 3 for share in shares for i, r in enumerate(share))
