"""From the instructions of a program that sum gradients to a method's sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from partita.program.instructions import AllReduce, Slice
from partita.runtime.background import SumFn
from partita.runtime.transport import Line
from partita.training.sync.method import GradientMethod, Part, Peers


def parts_of(instruction: AllReduce, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """What an instruction sums. `shapes` are those of the parameters as the process stores them."""
    return tuple(_part(item, shapes[item.parameter]) for item in instruction.gradients)


def _part(item: Slice, shape: tuple[int, ...]) -> Part:
    whole = Part(item.parameter, shape)
    if (item.start, item.end) == (0, whole.num_elements):
        return whole
    return Part(f"{item.parameter}[{item.start}:{item.end}]", (item.num_elements,))


def form_sum(
    method: GradientMethod,
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    instruction: AllReduce,
    processes: tuple[int, ...],
) -> SumFn:
    """What forms the sum of an instruction over some processes, of which this is `rank`, from values of the shapes that
    its slices have. `shapes` as of `parts_of`."""
    formed = method.sum_of(parts_of(instruction, shapes), Peers(processes, rank))
    specs = instruction.specs

    def form(values: Sequence[Tensor], line: Line) -> list[Tensor]:
        sums = formed(values, line)
        return [value.to(spec.dtype).view(spec.shape) for value, spec in zip(sums, specs, strict=True)]

    return form
