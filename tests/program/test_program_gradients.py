"""Slices: every element has one owner, and owners have equally much."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from partita.program.gradients import cut_slices
from partita.program.instructions import Slice

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(
    lambda found: [(f"w{i}", n) for i, n in enumerate(found)]
)


@given(SIZES, st.integers(1, 6))
def test_every_element_has_one_owner(sizes: list[tuple[str, int]], num_owners: int) -> None:
    owned = cut_slices(sizes, num_owners)
    assert len(owned) == num_owners
    elements = [(part.parameter, index) for parts in owned for part in parts for index in range(part.start, part.end)]
    assert sorted(elements) == sorted((name, index) for name, size in sizes for index in range(size))


@given(SIZES, st.integers(1, 6))
def test_cut_anywhere_owners_differ_by_one_element_at_most(sizes: list[tuple[str, int]], num_owners: int) -> None:
    loads = [sum(part.num_elements for part in parts) for parts in cut_slices(sizes, num_owners)]
    assert max(loads) - min(loads) <= 1


def test_a_parameter_is_cut_where_a_share_ends() -> None:
    expected = ((Slice("w", 0, 2),), (Slice("w", 2, 3), Slice("b", 0, 1)))
    assert cut_slices([("w", 3), ("b", 1)], 2) == expected


def test_more_owners_than_elements_leaves_some_without() -> None:
    owned = cut_slices([("b", 2)], 4)
    assert sum(map(bool, owned)) == 2
