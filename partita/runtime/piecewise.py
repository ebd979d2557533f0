"""Sums of gradients whose parts lie on different workers of a process: each member sums its own slices.

A slice of a parameter that is cut over the members is a run of whole rows (entries of dim 0 of what the process
stores). Every member whose part overlaps these rows adds the overlap, in the order of positions, so that all sums are
formed in one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.program.instructions import Box, ReduceScatter, Slice
from partita.runtime.collectives import Seat


@dataclass(frozen=True)
class _Addend:
    """What one member brings to one slice: `source` of its register goes to `target` of the slice's rows. `first`: it
    is the first one there, so it is copied. `flat`: both are runs of flattened tensors."""

    member: int
    source: Box
    target: Box
    first: bool
    flat: bool


@dataclass(frozen=True)
class _Sum:
    """One slice: the register that it is summed from, its rows' shape (flat ones: its length), and its addends."""

    register: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    addends: tuple[_Addend, ...]


class PiecewiseReduceOp:
    """The sums of this worker's slices over the members of its process."""

    def __init__(self, seat: Seat, instruction: ReduceScatter, device: torch.device) -> None:
        self.seat = seat
        place = {name: index for index, name in enumerate(instruction.parameters)}
        mine = instruction.slices[seat.position]
        self.sums = [_sum_of(instruction, place[part.parameter], part) for part in mine]
        self.device = device

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        brought = self.seat.meeting.gather(self.seat.member, values)
        results = [torch.empty(math.prod(item.shape), dtype=item.dtype, device=self.device) for item in self.sums]
        for item, result in zip(self.sums, results, strict=True):
            whole = result.view(item.shape)
            for addend in item.addends:
                target = addend.target.of(whole)
                value = brought[addend.member][item.register]
                source = addend.source.of(value.reshape(-1) if addend.flat else value)
                if addend.first:
                    target.copy_(source)
                else:
                    target.add_(source)
        return results


def _sum_of(instruction: ReduceScatter, index: int, part: Slice) -> _Sum:
    storage, boxes = instruction.storages[index], instruction.parts[index]
    dtype = instruction.specs[index].dtype
    if all(box is None or box.is_whole(storage) for box in boxes):
        run = Box((part.start,), (part.num_elements,))
        target = Box((0,), (part.num_elements,))
        counted = [member for member, box in enumerate(boxes) if box is not None]
        addends = [_Addend(member, run, target, member == counted[0], True) for member in counted]
        return _Sum(index, (part.num_elements,), dtype, tuple(addends))
    width = math.prod(storage[1:])
    assert part.start % width == 0 and part.end % width == 0, f"{part} must be whole rows of {width}"
    first, last = part.start // width, part.end // width
    rows = Box((first, *(0 for _ in storage[1:])), (last - first, *storage[1:]))
    addends, seen = [], set()
    for member, box in enumerate(boxes):
        if box is None:
            continue
        start, end = max(first, box.starts[0]), min(last, box.ends[0])
        if start >= end:
            continue
        overlap = Box((start, *box.starts[1:]), (end - start, *box.lengths[1:]))
        addends.append(_Addend(member, overlap.within(box), overlap.within(rows), overlap not in seen, False))
        seen.add(overlap)
    return _Sum(index, rows.lengths, dtype, tuple(addends))
