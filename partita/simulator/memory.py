"""Memory of programs: registers and workspaces of each worker, and what the workers of a process share."""

from __future__ import annotations

from collections.abc import Mapping

from partita.graph.graph import Graph, InputKind
from partita.program.instructions import Free, Instruction, Program, ProgramSet, ReduceScatter, Run, Segment
from partita.program.uses import is_persistent, written_specs


class MemoryMeter:
    """Follows one worker's registers through its program; pieces of the batch count nothing, the user holds them.

    Gradient slices are sums of new memory; values handed over within a process are counted where they were made.
    """

    def __init__(self, program: Program, segments: Mapping[str, Segment]) -> None:
        self._worker = program.worker
        self._segments = segments
        self._held: dict[str, int] = {}
        self._now = 0
        self.peak_bytes = 0

    def execute(self, instruction: Instruction) -> None:
        """Accounts for one instruction, in the program's order."""
        if isinstance(instruction, Run):
            segment = self._segments[instruction.segment]
            for register, spec in zip(instruction.outputs, segment.output_specs, strict=True):
                self._hold(register, spec.num_bytes)
            self.peak_bytes = max(self.peak_bytes, self._now + segment.workspace_bytes)
        elif isinstance(instruction, Free):
            for register in instruction.registers:
                self._now -= self._held.pop(register, 0)
        else:
            alone = isinstance(instruction, ReduceScatter) and len(instruction.group) == 1
            for register, spec in written_specs(instruction, self._worker):
                if not is_persistent(register) and not alone:
                    self._hold(register, spec.num_bytes)
        self.peak_bytes = max(self.peak_bytes, self._now)

    def _hold(self, register: str, num_bytes: int) -> None:
        self._now += num_bytes - self._held.get(register, 0)
        self._held[register] = num_bytes


def shared_bytes(graph: Graph, programs: ProgramSet, *, optimizer_state_bytes_per_element: float) -> dict[int, int]:
    """Bytes by process that its workers share: parameters and buffers (every process holds the whole model), and the
    optimizer's state for the elements that its workers update."""
    weights = sum(
        _num_bytes(item.shape, item.dtype.itemsize)
        for kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)
        for item in graph.inputs_of(kind)
    )
    found: dict[int, int] = {}
    for program in programs.programs:
        found.setdefault(program.process, weights)
        for instruction in program.instructions:
            if isinstance(instruction, ReduceScatter) and instruction.slices:
                mine = instruction.slices[instruction.group.index(program.worker)]
                elements = sum(part.num_elements for part in mine)
                found[program.process] += int(elements * optimizer_state_bytes_per_element)
    return found


def memory_bytes(
    graph: Graph, programs: ProgramSet, *, optimizer_state_bytes_per_element: float = 0.0
) -> dict[int, int]:
    """Peak bytes by process: what its workers share plus the sum of its workers' own peaks.

    Example:
        >>> memory_bytes(graph, programs, optimizer_state_bytes_per_element=8.0)   # AdamW in float32
        {0: 123456789}
    """
    found = shared_bytes(graph, programs, optimizer_state_bytes_per_element=optimizer_state_bytes_per_element)
    for program in programs.programs:
        meter = MemoryMeter(program, programs.segments)
        for instruction in program.instructions:
            meter.execute(instruction)
        found[program.process] += meter.peak_bytes
    return found


def _num_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    count = itemsize
    for extent in shape:
        count *= extent
    return count
