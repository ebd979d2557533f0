"""Boxes of tensors, and which of them processes store."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.program.boxes import Boxes
from partita.program.instructions import Box

sys.path.insert(0, str(Path(__file__).parent))
from program_cases import CASES, captured, make_plan

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    edges = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
    return Box(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))


@settings(deadline=None)
@given(st.data(), SHAPES)
def test_a_box_is_a_view_of_its_entries(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes(shape))
    value = torch.arange(Box.whole(shape).num_elements).view(shape)
    index = tuple(slice(start, end) for start, end in zip(box.starts, box.ends, strict=True))
    assert torch.equal(box.of(value), value[index])
    assert box.of(value).numel() == box.num_elements
    assert box.of(value).untyped_storage().data_ptr() == value.untyped_storage().data_ptr()


@settings(deadline=None)
@given(st.data(), SHAPES)
def test_the_hull_is_the_least_box_around_two(data: st.DataObject, shape: tuple[int, ...]) -> None:
    first, second = data.draw(boxes(shape)), data.draw(boxes(shape))
    hull = first.hull(second)
    marked = torch.zeros(shape)
    first.of(marked).fill_(1)
    second.of(marked).fill_(1)
    found = marked.nonzero()
    assert hull.starts == tuple(found.min(0).values.tolist())
    assert hull.ends == tuple((found.max(0).values + 1).tolist())
    value = torch.rand(shape)
    assert torch.equal(first.within(hull).of(hull.of(value)), first.of(value))


@settings(deadline=None)
@given(st.data(), SHAPES)
def test_cuts_nest(data: st.DataObject, shape: tuple[int, ...]) -> None:
    value = torch.rand(shape)
    box, expected = Box.whole(shape), value
    for _ in range(3):
        dim = data.draw(st.integers(0, len(shape) - 1))
        start = data.draw(st.integers(0, expected.shape[dim] - 1))
        length = data.draw(st.integers(1, expected.shape[dim] - start))
        box, expected = box.cut(dim, start, length), expected.narrow(dim, start, length)
    assert torch.equal(box.of(value), expected)


def test_parts_with_a_gap_between_them_are_refused() -> None:
    _, graph, _ = captured(CASES["mlp"], 4)
    plan = make_plan(graph, tensor=3, processes=(0, 1, 0))
    cut = {"w": {worker: Box((2 * worker,), (2,)) for worker in range(3)}}
    with pytest.raises(PlanError, match="'w' in process 0 do not"):
        Boxes(plan, {"w": (6,)}, cut, {"w": {0, 1, 2}})
    found = Boxes(plan, {"w": (6,)}, cut, {"w": {0, 1}})
    assert found.storage(0, "w") == Box((0,), (2,)) and found.held()[1] == {"w": Box((2,), (2,))}
