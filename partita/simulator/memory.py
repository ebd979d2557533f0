"""Memory of programs, per worker and per process.

What outlives a step is counted by `shared_bytes`. What a step adds is followed storage by storage
(`partita.simulator.storages`): `JobMemory` is told the instructions with their times, worker by worker in any order
that the programs allow, and knows each process' peak from the changes in the order of time. `memory_bytes` needs no
times and gives an upper bound for every order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from partita.cost.memory import state_bytes, weight_bytes
from partita.graph.graph import Graph, InputKind
from partita.program.instructions import Instruction, Program, ProgramSet, Recv, TensorSpec
from partita.program.uses import is_persistent
from partita.simulator.storages import Address, ProcessMemory, Value, WorkerMemory


class JobMemory:
    """The memory of all workers and processes of a job in one step. `update_values`: how many temporary values of a
    slice's size the optimizer's update makes.

    Example:
        >>> memory = JobMemory(programs, start_s=0.0)
        >>> memory.execute(0, programs.programs[0].instructions[0], 0.0, 1.5)
        >>> memory.end(1.5)
        >>> memory.process_peak_bytes
        {0: 1234567}
    """

    def __init__(self, programs: ProgramSet, start_s: float, update_values: int = 0) -> None:
        process_of = {program.worker: program.process for program in programs.programs}
        self._processes = {process: ProcessMemory() for process in process_of.values()}
        self._workers = {
            program.worker: WorkerMemory(
                program, programs.segments, process_of, self._processes[program.process], update_values
            )
            for program in programs.programs
        }
        drawn = {process: memory.draw(programs.draws, start_s) for process, memory in self._processes.items()}
        for worker in self._workers.values():
            worker.begin(start_s)
        for process, storages in drawn.items():
            for storage in storages:
                self._processes[process].release(storage, start_s)

    def execute(self, worker: int, instruction: Instruction, start_s: float, end_s: float) -> None:
        """Account for an instruction; those of one worker come in order, of several in one that the programs allow."""
        self._workers[worker].execute(instruction, start_s, end_s)

    def end(self, end_s: float) -> None:
        for worker in self._workers.values():
            worker.end(end_s)

    @property
    def worker_peak_bytes(self) -> dict[int, int]:
        """By worker, the peak of all that its own registers and segments need."""
        return {index: worker.peak_bytes for index, worker in self._workers.items()}

    @property
    def process_peak_bytes(self) -> dict[int, int]:
        """By process, the peak of what all its workers need at one time, shared storages once."""
        return {process: memory.peak_bytes for process, memory in self._processes.items()}


def shared_bytes(graph: Graph, programs: ProgramSet, *, optimizer_state_bytes_per_element: float) -> dict[int, int]:
    """Bytes by process that outlive a step: parameters and buffers (every process holds the whole model), the rows of
    the batch that its workers read, and the optimizer's state (in bytes per float32 element) of what they update."""
    weights = weight_bytes(graph)
    found = {process: weights + num_bytes for process, num_bytes in _batch_bytes(graph, programs).items()}
    itemsize_of = {item.name: item.dtype.itemsize for item in graph.inputs}
    for process, held in programs.held.items():  # beside the user's own whole ones
        found[process] += sum(box.num_elements * itemsize_of[name] for name, box in held.items())
    for program in programs.programs:
        for part in (part for slices in program.updates for part in slices):
            num_bytes = part.num_elements * itemsize_of[part.parameter]
            found[program.process] += state_bytes(num_bytes, optimizer_state_bytes_per_element)
    return found


def _batch_bytes(graph: Graph, programs: ProgramSet) -> dict[int, int]:
    """By process, the bytes of the batch's rows that its workers read."""
    leaves = {item.leaf: TensorSpec(item.shape, item.dtype) for item in graph.inputs_of(InputKind.BATCH)}
    read: dict[int, dict[int, set[tuple[int, int]]]] = {program.process: {} for program in programs.programs}
    for program in programs.programs:
        for feed in program.feeds:
            if feed.leaf in leaves:
                extent = leaves[feed.leaf].shape[0] if leaves[feed.leaf].shape else 1
                rows = (feed.start, feed.start + feed.length) if feed.dim == 0 else (0, extent)
                read[program.process].setdefault(feed.leaf, set()).add(rows)
    found = {}
    for process, by_leaf in read.items():
        found[process] = 0
        for leaf, pieces in by_leaf.items():
            spec = leaves[leaf]
            extent = spec.shape[0] if spec.shape else 1
            found[process] += spec.num_bytes * _covered(pieces) // max(extent, 1)
    return found


def _covered(pieces: Iterable[tuple[int, int]]) -> int:
    """How many whole numbers lie in at least one of the pieces (start, end)."""
    count = reached = 0
    for start, end in sorted(pieces):
        count += max(0, end - max(start, reached))
        reached = max(reached, end)
    return count


def memory_bytes(
    graph: Graph, programs: ProgramSet, *, optimizer_state_bytes_per_element: float = 0.0, update_values: int = 0
) -> dict[int, int]:
    """Upper bound of the peak bytes by process, whatever the order in which its workers take turns: what outlives the
    step plus the sum of its workers' own peaks. What a worker of the process hands to another counts for the receiver
    from the step's start, as the sender may be early.

    Example:
        >>> memory_bytes(graph, programs, optimizer_state_bytes_per_element=8.0)   # AdamW in float32
        {0: 123456789}
    """
    found = shared_bytes(graph, programs, optimizer_state_bytes_per_element=optimizer_state_bytes_per_element)
    process_of = {program.worker: program.process for program in programs.programs}
    sizes: dict[Address, int] = {}
    while True:
        alone = [_Alone(program, programs, process_of, sizes, update_values) for program in programs.programs]
        told = {address: num_bytes for worker in alone for address, num_bytes in worker.sent_bytes.items()}
        if told == sizes:
            break
        sizes = told  # a view keeps a larger storage alive than its own shape tells
    for program, worker in zip(programs.programs, alone, strict=True):
        found[program.process] += worker.peak_bytes
    return found


class _Alone:
    """One worker without the others, with everything that it will be handed there from the start.

    `sizes` are the bytes of the storages that are handed over, as far as known; `sent_bytes` those of this worker's.
    """

    def __init__(
        self,
        program: Program,
        programs: ProgramSet,
        process_of: Mapping[int, int],
        sizes: Mapping[Address, int],
        update_values: int,
    ) -> None:
        process = ProcessMemory()
        worker = WorkerMemory(program, programs.segments, process_of, process, update_values)
        drawn = process.draw(programs.draws, 0.0)
        for item in program.instructions:
            if isinstance(item, Recv) and process_of[item.peer] == program.process:
                address = (item.peer, program.worker, item.key)
                num_bytes = sizes.get(address, item.spec.num_bytes)
                storage = None if is_persistent(item.register) else process.new(num_bytes, 0.0)
                process.hand_over(address, Value(storage))
        worker.begin(0.0)
        for storage in drawn:
            process.release(storage, 0.0)
        for index, item in enumerate(program.instructions):
            worker.execute(item, index, index + 1)
        self.peak_bytes = process.peak_bytes
        self.sent_bytes = {
            address: value.storage.num_bytes for address, value in process.sent.items() if value.storage is not None
        }
