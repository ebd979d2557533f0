"""The arithmetic of stencils against the definition."""

from __future__ import annotations

import bisect
import itertools

from hypothesis import assume, given
from hypothesis import strategies as st

from partita.sharding.stencils import Stencil


@st.composite
def stencils(draw: st.DrawFn) -> Stencil:
    kernel, stride, dilation = (draw(st.integers(1, 4)) for _ in range(3))
    padding, image = draw(st.integers(0, 4)), draw(st.integers(2, 24))
    result = (image + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    assume(result >= 2)
    return Stencil(2, image, result, kernel, stride, dilation, padding)


def rows_read(stencil: Stencil, row: int) -> list[int]:
    return [row * stencil.stride - stencil.padding + stencil.dilation * tap for tap in range(stencil.kernel)]


@given(stencils(), st.data())
def test_a_window_is_what_its_rows_read(stencil: Stencil, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, stencil.result - 1))
    last = data.draw(st.integers(first + 1, stencil.result))
    read = [place for row in range(first, last) for place in rows_read(stencil, row)]
    assert (min(read), max(read) + 1) == (stencil.first_read(first), stencil.end_read(last))


@given(stencils())
def test_every_block_has_rows_of_image_and_result(stencil: Stencil) -> None:
    for bounds, extent in ((stencil.image_bounds, stencil.image), (stencil.result_bounds, stencil.result)):
        assert bounds[0] == 0 and bounds[-1] == extent and len(bounds) == stencil.num_blocks + 1
        assert all(start < end for start, end in itertools.pairwise(bounds))


@given(stencils())
def test_who_owns_the_middle_owns_the_row(stencil: Stencil) -> None:
    for row in range(stencil.result):
        read = rows_read(stencil, row)
        middle = min(max((read[0] + read[-1]) // 2, 0), stencil.image - 1)
        block = bisect.bisect_right(stencil.image_bounds, middle) - 1
        assert stencil.result_bounds[block] <= row < stencil.result_bounds[block + 1]


def test_same_convolution_keeps_the_cut() -> None:
    stencil = Stencil(2, 6, 6, 3, 1, 1, 1)
    assert stencil.result_bounds == stencil.image_bounds == tuple(range(7))
