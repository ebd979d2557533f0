"""From the instructions of a program that sum gradients to a method's sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from partita.program.instructions import AllReduce, Slice
from partita.runtime.background import SumFn
from partita.runtime.transport import Line
from partita.training.sync.method import GradientMethod, GradientSum, Part, Peers, State
from partita.units import fingerprint


def parts_of(instruction: AllReduce, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """What an instruction sums. `shapes` are those of the parameters as the process stores them."""
    return tuple(_part(item, shapes[item.parameter]) for item in instruction.gradients)


def _part(item: Slice, shape: tuple[int, ...]) -> Part:
    whole = Part(item.parameter, shape)
    if (item.start, item.end) == (0, whole.num_elements):
        return whole
    return Part(f"{item.parameter}[{item.start}:{item.end}]", (item.num_elements,))


class Sums:
    """The sums over processes of a program's gradients, formed by a method.

    Args:
        method: forms the sums.
        shapes: as of `parts_of`.
        rank: of this process.
    """

    def __init__(self, method: GradientMethod, shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
        self._method, self._shapes, self._rank = method, shapes, rank
        self._formed: dict[str, GradientSum] = {}

    def form(self, instruction: AllReduce, processes: tuple[int, ...]) -> SumFn:
        """What forms the sum of an instruction over some processes, from values of the shapes that its slices have.
        Every process asks for its sums in the same order."""
        parts = parts_of(instruction, self._shapes)
        formed = self._method.sum_of(parts, Peers(processes, self._rank))
        self._formed[f"{len(self._formed)}-{fingerprint([parts, processes])}"] = formed
        specs = instruction.specs

        def form(values: Sequence[Tensor], line: Line) -> list[Tensor]:
            sums = formed(values, line)
            return [value.to(spec.dtype).view(spec.shape) for value, spec in zip(sums, specs, strict=True)]

        return form

    @property
    def error(self) -> float:
        """The share of what was to be sent in the last step that was not: the largest of all sums."""
        return max((formed.error for formed in self._formed.values()), default=0.0)

    def states(self) -> dict[str, State]:
        """What sums keep from step to step, by a key that equal sums of equal programs share."""
        return {key: state for key, formed in self._formed.items() if (state := formed.state())}

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from the states that belong to sums of these."""
        for key, formed in self._formed.items():
            state, own = states.get(key), formed.state()
            if state and {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in own.items()}:
                formed.load(state)
