"""Registers of one worker as storages: what each instruction makes, keeps alive and lets go of, as the runtime does.

Many registers show the same storage, and workers of one process share those that they hand to each other. A storage
lives from the instruction that makes it until the last register, message or worker that refers to it has let go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from partita.cost.collectives import SMALL_BYTES
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Clip,
    Draw,
    Free,
    Instruction,
    Program,
    Recv,
    ReduceScatter,
    Run,
    Segment,
    Send,
    Start,
    SumSquares,
    TensorSpec,
    Update,
)
from partita.program.uses import SQUARE, is_persistent, overwritable, written_specs

Address = tuple[int, int, str]  # sender, receiver and key of what is handed over


class Storage:
    """A block of memory that lives while someone holds it."""

    __slots__ = ("last_s", "num_bytes", "num_holders")

    def __init__(self, num_bytes: int, start_s: float) -> None:
        self.num_bytes, self.num_holders, self.last_s = num_bytes, 0, start_s


class ProcessMemory:
    """The storages of one process over time. Calls need not come in the order of time: a storage ends at the latest
    time at which one of its holders lets go."""

    def __init__(self) -> None:
        self.sent: dict[Address, Value] = {}  # handed to a worker that has not taken it yet
        self.draws: dict[str, Storage] = {}
        self.taken: dict[tuple[tuple[int, ...], str], dict[str, Storage]] = {}  # of gradients, by group and key
        self._shared: dict[object, Storage] = {}
        self._changes: list[tuple[float, int]] = []

    def new(self, num_bytes: int, start_s: float) -> Storage:
        self._changes.append((start_s, num_bytes))
        return Storage(num_bytes, start_s)

    def shared(self, key: object, num_bytes: int, start_s: float) -> Storage:
        """The storage that all members of a collective get; the first one makes it."""
        if key not in self._shared:
            self._shared[key] = self.new(num_bytes, start_s)
        return self._shared[key]

    def draw(self, draws: Iterable[Draw], start_s: float) -> list[Storage]:
        """Make all random draws; the caller lets go of them once the workers have been fed."""
        self.draws = {draw.name: self.new(draw.spec.num_bytes, start_s) for draw in draws}
        for storage in self.draws.values():
            self.hold(storage)
        return list(self.draws.values())

    def hand_over(self, address: Address, value: Value) -> None:
        """Keep a value until ``sent.pop(address)`` takes it over."""
        if value.storage is not None:
            self.hold(value.storage)
        self.sent[address] = value

    def hold(self, storage: Storage) -> None:
        storage.num_holders += 1

    def release(self, storage: Storage, time_s: float) -> None:
        storage.num_holders -= 1
        storage.last_s = max(storage.last_s, time_s)
        if storage.num_holders == 0:
            self._changes.append((storage.last_s, -storage.num_bytes))

    @property
    def peak_bytes(self) -> int:
        now = peak = 0
        for _, change in sorted(self._changes, key=lambda item: item[0]):  # stable: at equal times as they were told
            now += change
            peak = max(peak, now)
        return peak


@dataclass(frozen=True)
class Value:
    """What a register holds. Without `storage` it is memory that outlives the step: parameters, the user's batch.

    `is_dense`: its elements lie in order without gaps; `was_moved`: its strides may not be those it was made with.
    """

    storage: Storage | None
    is_dense: bool = True
    was_moved: bool = False


_OUTLIVING = Value(None)


class WorkerMemory:
    """The registers of one worker; `peak_bytes` counts every storage that it refers to once."""

    def __init__(
        self,
        program: Program,
        segments: Mapping[str, Segment],
        process_of: Mapping[int, int],
        process: ProcessMemory,
        update_values: int = 0,
    ) -> None:
        self.program, self.process, self.peak_bytes = program, process, 0
        self._segments, self._process_of, self._update_values = segments, process_of, update_values
        self._largest_slice_bytes = 0
        self._overwritable = overwritable(program.instructions)
        self._registers: dict[str, Value] = {}
        self._summed: set[str] = set()  # registers with a sum that later results are added to in place
        self._sending: list[Storage] = []  # messages to other processes are kept until the step ends
        self._background: dict[str, Storage] = {}  # sums over processes that were started
        self._held: Counter[Storage] = Counter()
        self._now = 0

    def begin(self, start_s: float) -> None:
        """Set what is fed: pieces of draws, and of the batch, which outlives the step."""
        for feed in self.program.feeds:
            if feed.draw:
                self._put(feed.register, Value(self.process.draws[feed.draw]), start_s)

    def execute(self, instruction: Instruction, start_s: float, end_s: float) -> None:
        """Account for one instruction, in the program's order."""
        if isinstance(instruction, Run):
            self._run(instruction, start_s, end_s)
        elif isinstance(instruction, Update):
            self._while(self._update_values * self._largest_slice_bytes, start_s, end_s)
        elif isinstance(instruction, Free):
            for register in instruction.registers:
                self._drop(register, end_s)
        elif isinstance(instruction, Send):
            self._send(instruction, end_s)
        elif isinstance(instruction, Recv):
            self._recv(instruction, start_s, end_s)
        elif isinstance(instruction, AllReduce):
            self._all_reduce(instruction, start_s, end_s)
        elif isinstance(instruction, Start):
            self._begin(instruction.collective, start_s, end_s)
        elif isinstance(instruction, Await):
            self._await(instruction.collective, end_s)
        elif isinstance(instruction, ReduceScatter) and instruction.slices:
            self._reduce_gradients(instruction, start_s, end_s)
        elif isinstance(instruction, SumSquares):
            self._put_new(instruction.output, SQUARE.num_bytes, start_s, end_s)
        elif isinstance(instruction, Clip):  # one after the other, into new memory
            largest = self._largest_slice_bytes if instruction.registers else 0
            self._while(largest, start_s, end_s)
        elif isinstance(instruction, (ReduceScatter, AllGather, AllToAll)):
            self._exchange(instruction, start_s, end_s)

    def end(self, end_s: float) -> None:
        """Let go of what is left."""
        for register in list(self._registers):
            self._drop(register, end_s)
        for storage in self._sending:
            self._release(storage, end_s)

    # Storages --------------------------------------------------------------------------------------------------------

    def _hold(self, storage: Storage) -> None:
        self.process.hold(storage)
        if not self._held[storage]:
            self._now += storage.num_bytes
            self.peak_bytes = max(self.peak_bytes, self._now)
        self._held[storage] += 1

    def _release(self, storage: Storage, time_s: float) -> None:
        self._held[storage] -= 1
        if not self._held[storage]:
            del self._held[storage]
            self._now -= storage.num_bytes
        self.process.release(storage, time_s)

    def _take(self, num_bytes: int, start_s: float) -> Storage:
        storage = self.process.new(num_bytes, start_s)
        self._hold(storage)
        return storage

    def _while(self, num_bytes: int, start_s: float, end_s: float) -> None:
        """Memory that is needed during an instruction only."""
        if num_bytes:
            self._release(self._take(num_bytes, start_s), end_s)

    def _put(self, register: str, value: Value, time_s: float) -> None:
        if value.storage is not None:
            self._hold(value.storage)
        self._drop(register, time_s)
        self._registers[register] = value

    def _put_new(self, register: str, num_bytes: int, start_s: float, end_s: float) -> None:
        self._put(register, Value(self.process.new(num_bytes, start_s), was_moved=True), end_s)

    def _drop(self, register: str, time_s: float) -> None:
        old = self._registers.pop(register, _OUTLIVING)
        self._summed.discard(register)
        if old.storage is not None:
            self._release(old.storage, time_s)

    def _value(self, register: str) -> Value:
        return self._registers.get(register, _OUTLIVING)

    # Instructions ----------------------------------------------------------------------------------------------------

    def _run(self, run: Run, start_s: float, end_s: float) -> None:
        segment = self._segments[run.segment]
        memory, inputs = segment.memory, [self._value(name) for name in run.inputs]
        copies = sum(
            spec.num_bytes
            for value, spec, is_dense in zip(inputs, segment.input_specs, memory.takes_dense, strict=False)
            if value.was_moved and value.is_dense != is_dense
        )
        self._while(memory.peak_bytes + copies, start_s, end_s)
        made = [self._take(num_bytes, end_s) for num_bytes in memory.storages]
        results = [
            Value(made[place] if place >= 0 else inputs[-1 - place].storage, is_dense)
            for place, is_dense in zip(memory.shown, memory.is_dense, strict=True)
        ]
        for register, value, adds, spec in zip(run.outputs, results, run.accumulate, segment.output_specs, strict=True):
            if not adds or register not in self._registers:
                self._put(register, value, end_s)
            elif register not in self._summed:  # its value may be shared: the sum is a new one
                total = self.process.new(spec.num_bytes, end_s)
                self._put(register, Value(total, value.is_dense), end_s)
                self._summed.add(register)
        for storage in made:
            self._release(storage, end_s)

    def _send(self, send: Send, end_s: float) -> None:
        value, process = self._value(send.register), self._process_of[send.peer]
        if process == self.program.process:
            self.process.hand_over((self.program.worker, send.peer, send.key), value)
        elif value.storage is not None and value.is_dense:
            self._hold(value.storage)
            self._sending.append(value.storage)
        elif not value.is_dense:
            self._sending.append(self._take(send.spec.num_bytes, end_s))

    def _recv(self, recv: Recv, start_s: float, end_s: float) -> None:
        if self._process_of[recv.peer] == self.program.process:
            value = self.process.sent.pop((recv.peer, self.program.worker, recv.key))
            if not is_persistent(recv.register):
                self._put(recv.register, value, end_s)
            if value.storage is not None:
                self.process.release(value.storage, end_s)
        elif is_persistent(recv.register):
            self._while(recv.spec.num_bytes, start_s, end_s)
        else:
            self._put_new(recv.register, recv.spec.num_bytes, start_s, end_s)

    def _all_reduce(self, instruction: AllReduce, start_s: float, end_s: float) -> None:
        outputs = instruction.outputs or instruction.registers
        by_dtype: dict[torch.dtype, list[tuple[str, str, TensorSpec]]] = {}
        for register, output, spec in zip(instruction.registers, outputs, instruction.specs, strict=True):
            by_dtype.setdefault(spec.dtype, []).append((register, output, spec))
        for dtype, items in by_dtype.items():
            total = sum(spec.num_bytes for *_, spec in items)
            if total <= SMALL_BYTES and self._num_local(instruction.group) == len(instruction.group):
                for _, output, spec in items:
                    self._put_new(output, spec.num_bytes, start_s, end_s)
                continue
            flattened = sum(spec.num_bytes for register, _, spec in items if not self._value(register).is_dense)
            shared = self.process.shared((instruction.group, instruction.key, dtype), total, start_s)
            self._hold(shared)
            self._while(flattened, start_s, end_s)
            for _, output, _ in items:
                self._put(output, Value(shared, was_moved=True), end_s)
            self._release(shared, end_s)

    def _begin(self, collective: AllReduce, start_s: float, end_s: float) -> None:
        """The values are put into one storage, which is sent, and let go of."""
        storage = self._take(sum(spec.num_bytes for spec in collective.specs), start_s)
        self._background[collective.key] = storage
        for register in collective.registers:
            self._drop(register, end_s)

    def _await(self, collective: AllReduce, end_s: float) -> None:
        storage = self._background.pop(collective.key)
        for register in collective.registers:
            self._put(register, Value(storage, was_moved=True), end_s)
        self._release(storage, end_s)

    def _reduce_gradients(self, instruction: ReduceScatter, start_s: float, end_s: float) -> None:
        """Alone, a worker's slices are views of the gradients. Several workers leave sums of large gradients in the
        first one's memory and make new ones of others. A gradient that is not dense is copied for every slice that is
        cut out of it."""
        taken = self._taken_by_sums(instruction)
        place = {name: index for index, name in enumerate(instruction.parameters)}
        num_local, copied = self._num_local(instruction.group), []
        one_by_one = _sums_one_by_one(instruction, self.program.worker)
        for index, part in enumerate(instruction.slices[instruction.group.index(self.program.worker)]):
            spec = instruction.specs[place[part.parameter]]
            value = self._value(instruction.registers[place[part.parameter]])
            num_bytes = part.num_elements * spec.dtype.itemsize
            self._largest_slice_bytes = max(self._largest_slice_bytes, num_bytes)
            if part.parameter in taken and not one_by_one:
                self._put(f"g:{instruction.first + index}", Value(taken[part.parameter]), end_s)
            elif len(instruction.group) > 1:
                copied.append(0 if value.is_dense else spec.num_bytes * num_local)
                self._put_new(f"g:{instruction.first + index}", num_bytes, start_s, end_s)
            elif value.is_dense:
                self._put(f"g:{instruction.first + index}", value, end_s)
            else:
                self._put_new(f"g:{instruction.first + index}", spec.num_bytes, start_s, end_s)
        self._while(max(copied, default=0) if one_by_one else sum(copied), start_s, end_s)

    def _taken_by_sums(self, instruction: ReduceScatter) -> dict[str, Storage]:
        """By parameter, the first worker's gradient where nobody else holds it. The members come one right after the
        other; who is looked at without the first counts sums of his own."""
        group = instruction.group
        if len(group) < 2 or self._num_local(group) < len(group) or instruction.parts:
            return {}
        if self.program.worker == group[0]:
            chosen = {}
            for place in self._overwritable[instruction.key]:
                value = self._value(instruction.registers[place])
                if value.storage is not None and value.is_dense and value.storage.num_holders == 1:
                    chosen[instruction.parameters[place]] = value.storage
            self.process.taken[group, instruction.key] = chosen
        known = self.process.taken.get((group, instruction.key), {})
        return {name: storage for name, storage in known.items() if storage.num_holders}

    def _exchange(self, instruction: ReduceScatter | AllGather | AllToAll, start_s: float, end_s: float) -> None:
        """The result; buffers of messages between processes are the transport's and not counted."""
        for register, spec in written_specs(instruction, self.program.worker):
            if isinstance(instruction, AllGather):
                shared = self.process.shared((instruction.group, instruction.key), spec.num_bytes, start_s)
                self._put(register, Value(shared, was_moved=True), end_s)
            else:
                self._put_new(register, spec.num_bytes, start_s, end_s)

    def _num_local(self, group: tuple[int, ...]) -> int:
        return sum(self._process_of[member] == self.program.process for member in group)


def _sums_one_by_one(instruction: ReduceScatter, worker: int) -> bool:
    """Whether the slices are filled one after the other, as where not all of them are sums; else one call makes all."""
    if len(instruction.group) == 1 or not instruction.replicated:
        return False
    if instruction.parts:
        return True
    whole = dict(zip(instruction.parameters, instruction.replicated, strict=True))
    return any(whole[part.parameter] for part in instruction.slices[instruction.group.index(worker)])
