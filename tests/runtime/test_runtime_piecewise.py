"""Sums of gradients in parts: random boxes, members and slices against sums of whole tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.program.instructions import Box, ReduceScatter, Slice, TensorSpec
from partita.runtime.collectives import Seat
from partita.runtime.failure import Failure, Waiter
from partita.runtime.local import Meeting, Party
from partita.runtime.piecewise import PiecewiseReduceOp


@st.composite
def reductions(draw: st.DrawFn) -> tuple[tuple[int, int], list[Box], list[tuple[int, ...]]]:
    """A storage, the box of every member (a grid over one dim, each box held by one or two members), row cuts."""
    shape = (draw(st.integers(2, 6)), draw(st.integers(2, 5)))
    dim = draw(st.integers(0, 1))
    edge = draw(st.integers(1, shape[dim] - 1))
    low, high = Box.whole(shape).cut(dim, 0, edge), Box.whole(shape).cut(dim, edge, shape[dim] - edge)
    members = draw(st.sampled_from([[low, high], [low, high, low, high], [low, low, high, high]]))
    cuts = sorted(draw(st.lists(st.integers(0, shape[0]), min_size=len(members) - 1, max_size=len(members) - 1)))
    edges = [0, *cuts, shape[0]]
    return shape, members, [(edges[i] * shape[1], edges[i + 1] * shape[1]) for i in range(len(members))]


def run(instructions: Sequence[ReduceScatter], values: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    failure = Failure()
    parties = [Party(index, Waiter(failure), 20.0) for index in range(len(values))]
    meeting = Meeting(parties)
    results: list[list[torch.Tensor]] = [[] for _ in values]

    def work(member: int) -> None:
        seat = Seat(meeting, member, 0, {0: tuple(range(len(values)))}, None)
        results[member] = PiecewiseReduceOp(seat, instructions[member], torch.device("cpu"))([values[member]])

    threads = [threading.Thread(target=work, args=(member,)) for member in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@settings(max_examples=40, deadline=None)
@given(reductions(), st.integers(0, 1000))
def test_slices_are_sums_over_the_members_with_their_boxes(
    case: tuple[tuple[int, int], list[Box], list[tuple[int, ...]]], seed: int
) -> None:
    shape, boxes, ranges = case
    torch.manual_seed(seed)
    values = [torch.randn(box.lengths) for box in boxes]
    whole = torch.zeros(shape)
    for box, value in zip(boxes, values, strict=True):
        box.of(whole).add_(value)
    slices = tuple((Slice("w", start, end),) if end > start else () for start, end in ranges)
    instructions = [
        ReduceScatter(
            ("n:g",), (TensorSpec(box.lengths, torch.float32),), tuple(range(len(boxes))), "k", parameters=("w",),
            slices=slices, replicated=(False,), storages=(shape,), parts=(tuple(boxes),),
        )
        for box in boxes
    ]  # fmt: skip
    for (start, end), found in zip(ranges, run(instructions, values), strict=True):
        assert len(found) == (end > start)
        for piece in found:
            torch.testing.assert_close(piece, whole.reshape(-1)[start:end])


def test_only_what_counts_is_summed() -> None:
    """Members of one tensor group hold the same gradient: each adds up its own row of the grid."""
    shape = (2, 3)
    values = [torch.full(shape, float(10**member)) for member in range(4)]  # (data, tensor): 00, 01, 10, 11
    whole = Box.whole(shape)
    slices = tuple((Slice("w", start, start + 2),) if start < 6 else () for start in (0, 2, 4, 6))
    instructions = [
        ReduceScatter(
            ("n:g",), (TensorSpec(shape, torch.float32),), (0, 1, 2, 3), "k", parameters=("w",), slices=slices,
            replicated=(False,), storages=(shape,),
            parts=(tuple(whole if other % 2 == member % 2 else None for other in range(4)),),
        )
        for member in range(4)
    ]  # fmt: skip
    found = run(instructions, values)
    assert [piece.unique().tolist() for pieces in found for piece in pieces] == [[101.0], [1010.0], [101.0]]
