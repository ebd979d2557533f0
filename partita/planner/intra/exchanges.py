"""Conversions between placements on a mesh: one axis at a time, in the cheapest order.

A conversion along one axis exchanges what a worker has of the value, so its bytes are those that the other axes leave.
Cuts of one dim by several axes are nested, the earlier axis outside: before an outer cut is made or undone, cuts
inside it are gathered, and made again afterwards. The cheapest of all orders of the axes is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from partita.planner.intra.problem import Conversion
from partita.planner.intra.ways import MeshPlacement, share_of
from partita.sharding.placement import Placement, Shard
from partita.sharding.rules import REPLICATE

AxisTime = Callable[[Placement, Placement, int, int], float]
"""``(source, target, num_bytes, axis) -> seconds``; ``num_bytes`` of the value as it is without this axis' cut."""


def is_considered(source: MeshPlacement, target: MeshPlacement) -> bool:
    """Whether the planner looks at a conversion: it changes one axis, or it makes whole along all axes that it changes,
    or it starts from whole or summands along all of them. (Others are two of these.)"""
    pairs = [(old, new) for old, new in zip(source, target, strict=True) if old != new]
    if len(pairs) <= 1:
        return True
    return all(new == REPLICATE for _, new in pairs) or not any(isinstance(old, Shard) for old, _ in pairs)


class Exchanges:
    """Prices conversions; equal ones once."""

    def __init__(self, axis_time_s: AxisTime) -> None:
        self._axis_time_s = axis_time_s
        self._known: dict[tuple[int, MeshPlacement, MeshPlacement], Conversion] = {}

    def price(self, num_bytes: int, source: MeshPlacement, target: MeshPlacement) -> Conversion:
        """Turning a value of `num_bytes` in all from one placement into another."""
        key = (num_bytes, source, target)
        if key not in self._known:
            changed = [axis for axis, pair in enumerate(zip(source, target, strict=True)) if pair[0] != pair[1]]
            options = (self._in_order(num_bytes, source, target, order) for order in itertools.permutations(changed))
            self._known[key] = min(options, key=lambda item: (item.time_s, item.temporary_bytes))
        return self._known[key]

    def _in_order(
        self, num_bytes: int, source: MeshPlacement, target: MeshPlacement, order: tuple[int, ...]
    ) -> Conversion:
        state, time_s, largest = list(source), 0.0, 0
        ends = max(share_of(source), share_of(target)) * num_bytes

        def step(axis: int, new: Placement) -> None:
            nonlocal time_s, largest
            rest = share_of(tuple(REPLICATE if other == axis else item for other, item in enumerate(state)))
            time_s += self._axis_time_s(state[axis], new, round(num_bytes * rest), axis)
            state[axis] = new
            largest = max(largest, round(num_bytes * share_of(tuple(state))))

        for axis in order:
            dims = {item.dim for item in (state[axis], target[axis]) if isinstance(item, Shard)}
            for inner in range(axis + 1, len(state)):
                item = state[inner]
                if isinstance(item, Shard) and item.dim in dims:
                    step(inner, REPLICATE)
            if state[axis] != target[axis]:
                step(axis, target[axis])
        for axis, wanted in enumerate(target):
            if state[axis] != wanted:
                step(axis, wanted)
        return Conversion(time_s, max(0, largest - round(ends)))
