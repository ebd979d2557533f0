"""The sums of gradients of one process: for every instruction of its programs that forms one, a method's sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from partita.program.instructions import AllReduce, Slice
from partita.runtime.transport import Line
from partita.training.sync.method import GradientMethod, GradientSum, Part, Peers, State

SumFn = Callable[[Sequence[Tensor], Line], list[Tensor]]


def parts_of(instruction: AllReduce, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """What an instruction sums. `shapes` are those of the parameters as the process stores them."""
    return tuple(_part(item, shapes[item.parameter]) for item in instruction.gradients)


def _part(item: Slice, shape: tuple[int, ...]) -> Part:
    whole = Part(item.parameter, shape)
    if (item.start, item.end) == (0, whole.num_elements):
        return whole
    return Part(f"{item.parameter}[{item.start}:{item.end}]", (item.num_elements,))


class GradientSums:
    """Makes and keeps the sums of one engine.

    Args:
        method: how they are formed.
        shapes: of the parameters, as this process stores them.
        rank: of this process.
    """

    def __init__(self, method: GradientMethod, shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
        self._method, self._shapes, self._rank = method, shapes, rank
        self._sums: dict[str, GradientSum] = {}  # by the instruction's key

    def make(self, instruction: AllReduce, processes: tuple[int, ...]) -> SumFn:
        """What forms the sum of an instruction, from values of the shapes that its slices have."""
        peers = Peers(processes, self._rank)
        formed = self._method.sum_of(parts_of(instruction, self._shapes), peers)
        self._sums[instruction.key] = formed
        dtypes = [spec.dtype for spec in instruction.specs]
        extents = [spec.shape for spec in instruction.specs]

        def form(values: Sequence[Tensor], line: Line) -> list[Tensor]:
            sums = formed(values, line)
            return [value.to(dtype).view(shape) for value, dtype, shape in zip(sums, dtypes, extents, strict=True)]

        return form

    @property
    def error(self) -> float:
        """The share of the last step's gradients that was not sent: root mean square over the sums."""
        found = [one.error for one in self._sums.values()]
        return math.sqrt(sum(error**2 for error in found) / len(found)) if found else 0.0

    def state(self) -> dict[str, State]:
        """What the sums keep between steps, by the keys of their instructions; the tensors in use."""
        return {key: one.state() for key, one in self._sums.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Goes on from a state of the same instructions; whether it was one."""
        fits = all(
            key in state and {n: v.shape for n, v in one.state().items()} == {n: v.shape for n, v in state[key].items()}
            for key, one in self._sums.items()
        )
        if fits:
            for key, one in self._sums.items():
                one.load(state[key])
        return fits
