"""Dims as products and sums of widths, against tensors of indices that go through the same views."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partita.search.structure.widths import (
    Uneven,
    Width,
    equate,
    factored,
    indices,
    parted,
    positions,
    product,
    resolved,
    size_of,
    total,
    widths_of,
)  # fmt: skip

SIZES = st.lists(st.integers(2, 4), min_size=1, max_size=3)


def some_units(data: st.DataObject, size: int) -> torch.Tensor:
    return torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))


@given(SIZES, st.data())
def test_units_of_a_product_are_those_of_the_view(sizes: list[int], data: st.DataObject) -> None:
    width = Width(math.prod(sizes))
    factors = [extent for extent in factored(width, sizes) if isinstance(extent, Width)]
    chosen = {factor: some_units(data, factor.size) for factor in factors}
    whole = torch.arange(width.size).view(sizes)
    for dim, factor in enumerate(factors):
        whole = whole.index_select(dim, chosen[factor])
    assert torch.equal(indices(width, chosen), whole.flatten())
    assert size_of(width, {factor: len(kept) for factor, kept in chosen.items()}) == whole.numel()


@given(SIZES, st.data())
def test_units_of_a_sum_are_those_of_the_parts(sizes: list[int], data: st.DataObject) -> None:
    width = Width(sum(sizes))
    parts = list(widths_of(total(parted(width, sizes))))
    chosen = {part: some_units(data, part.size) for part in parts}
    pieces = torch.arange(width.size).split(sizes)
    expected = torch.cat([piece[chosen[part]] for piece, part in zip(pieces, parts, strict=True)])
    assert torch.equal(indices(width, chosen), expected)


@given(SIZES)
def test_positions_are_coordinates(sizes: list[int]) -> None:
    width = Width(math.prod(sizes))
    factors = factored(width, sizes)
    coordinates = torch.unravel_index(torch.arange(width.size), sizes)
    for factor, expected in zip(factors, coordinates, strict=True):
        assert isinstance(factor, Width)
        assert torch.equal(positions(width, factor), expected)


def test_two_divisions_meet_in_their_common_refinement() -> None:
    a, b = Width(24), Width(24)
    factored(a, [2, 12])
    factored(b, [8, 3])
    equate(a, b)
    assert [width.size for width in widths_of(a)] == [2, 4, 3]
    assert list(widths_of(a)) == list(widths_of(b))
    assert not any(width.fixed for width in widths_of(a))


def test_divisions_that_have_none_are_fixed() -> None:
    a, b = Width(6), Width(6)
    factored(a, [2, 3])
    factored(b, [3, 2])
    equate(a, b)
    assert {width.fixed for extent in (a, b) for width in widths_of(extent)} == {"it is divided in two ways"}


def test_equal_parts_become_a_product() -> None:
    """What was joined from equal parts can be viewed as so many rows; the parts are one then."""
    parts = [Width(5) for _ in range(3)]
    rows, each = factored(total(parts), [3, 5])
    assert isinstance(rows, Width)
    assert rows.fixed
    assert all(resolved(part) is each for part in parts)


def test_rows_are_not_torn_and_a_width_is_no_part_of_itself() -> None:
    with pytest.raises(Uneven):
        parted(product([Width(2), Width(3)]), [1, 5])
    a, one = Width(4), Width(1)
    equate(product([a, one]), a)
    assert resolved(a) is a


def test_fixing_one_fixes_what_equals_it() -> None:
    a, b = Width(4), Width(4, fixed="the result has it")
    equate(a, b)
    assert [width.fixed for width in widths_of(a)] == ["the result has it"]
