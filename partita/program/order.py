"""`check_order`: what `check` cannot see - values that are there, of the right shape, but too early or incomplete.

All programs are executed together once more, and every worker keeps a *vector clock* (Mattern 1989, Fidge 1988): for
each worker the number of its instructions that are known to be over. An event comes before another, in every execution,
if the other's clock counts it. Four rules follow, whatever the order in which workers take turns:

(1) Every feed, every received value and every value that a segment leaves for later is read (else a `Run` is missing).
(2) No gradient changes after it was reduced.
(3) The gradient of an `Update` is the sum over all workers that have a part of it, each counted once; all workers that
    end with the loss or a buffer have the same workers' parts in it.
(4) A parameter is written only after every `Run` of the process that reads it, and sent only after all its updates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from partita.errors import ProgramError
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Free,
    Instruction,
    Program,
    ProgramSet,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Start,
    Update,
)
from partita.program.uses import is_persistent, own_slices, reads, writes

Clock = dict[int, int]  # worker -> number of its instructions that are over
Workers = frozenset[int]
Collective = AllReduce | ReduceScatter | AllGather | AllToAll


def check_order(programs: ProgramSet) -> None:
    """Raises ProgramError where an execution exists that reads a wrong value; `programs` must have passed `check`.

    Example:
        >>> check(programs)          # it runs to its end ...                          # doctest: +SKIP
        >>> check_order(programs)    # ... and never with half a gradient or an old weight   # doctest: +SKIP
    """
    _Execution(programs).run()


@dataclass
class _Worker:
    program: Program
    position: int = 0
    clock: Clock = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)  # register -> instruction that wrote it
    parts: dict[str, Workers] = field(default_factory=dict)  # register -> workers whose parts are in it
    reduced: set[str] = field(default_factory=set)
    begun: dict[str, tuple[Clock, tuple[Workers, ...]]] = field(default_factory=dict)  # by key of a `Start`

    @property
    def current(self) -> Instruction | None:
        done = self.position >= len(self.program.instructions)
        return None if done else self.program.instructions[self.position]

    @property
    def where(self) -> str:
        return f"worker {self.program.worker}, instruction {self.position} ({type(self.current).__name__})"

    def learn(self, other: Mapping[int, int]) -> None:
        for worker, count in other.items():
            if self.clock.get(worker, 0) < count:
                self.clock[worker] = count


@dataclass(frozen=True)
class _Write:
    """A write of a parameter in one process."""

    worker: int
    index: int
    clock: Mapping[int, int]


class _Execution:
    def __init__(self, programs: ProgramSet) -> None:
        self.workers = {program.worker: _Worker(program) for program in programs.programs}
        self.mail: dict[tuple[int, int, str], tuple[Clock, Workers]] = {}
        self.read_at: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)  # (process, p:) -> worker -> last Run
        self.written: dict[tuple[int, str], list[_Write]] = defaultdict(list)
        self.sent: list[tuple[int, str, Clock, str]] = []
        self.owners = _owners(programs.programs)
        for worker in self.workers.values():
            worker.unread.update({feed.register: -1 for feed in worker.program.feeds})

    def run(self) -> None:
        waiting = list(self.workers.values())
        while waiting:
            if not any([self._advance(worker) for worker in waiting]):
                raise ProgramError("the programs would deadlock; partita.program.check names who waits for whom")
            waiting = [worker for worker in waiting if worker.current is not None]
        self._compare_ends()
        self._check_parameters()

    # One instruction -----------------------------------------------------------------------------------------------

    def _advance(self, worker: _Worker) -> bool:
        moved = False
        while (instruction := worker.current) is not None:
            if isinstance(instruction, Collective):
                members = [self.workers[index] for index in instruction.group]
                if any(getattr(member.current, "key", None) != instruction.key for member in members):
                    return moved
                self._meet(members)
            elif isinstance(instruction, Recv):
                sent = self.mail.pop((instruction.peer, worker.program.worker, instruction.key), None)
                if sent is None:
                    return moved
                self._receive(worker, instruction, *sent)
            elif isinstance(instruction, Await):
                members = [self.workers[index] for index in instruction.collective.group]
                if any(instruction.key not in member.begun for member in members):
                    return moved
                self._await(worker, instruction, members)
            else:
                self._alone(worker, instruction)
            moved = True
        return moved

    def _alone(self, worker: _Worker, instruction: Instruction) -> None:
        me = worker.program.worker
        self._read(worker, instruction)
        if isinstance(instruction, Run):
            self._run(worker, instruction)
        elif isinstance(instruction, Send):
            address = (me, instruction.peer, instruction.key)
            self.mail[address] = ({**worker.clock, me: worker.position + 1}, self._parts(worker, instruction.register))
            if instruction.register.startswith("p:"):
                self.sent.append((worker.program.process, instruction.register, dict(worker.clock), worker.where))
        elif isinstance(instruction, Start):
            parts = tuple(self._parts(worker, register) for register in instruction.collective.registers)
            worker.begun[instruction.key] = ({**worker.clock, me: worker.position + 1}, parts)
        elif isinstance(instruction, Update):
            self._update(worker, instruction)
        elif isinstance(instruction, Free):
            for register in instruction.registers:
                self._let_go(worker, register)
        self._over(worker)

    def _read(self, worker: _Worker, instruction: Instruction) -> None:
        for register in reads(instruction):
            worker.unread.pop(register, None)

    def _over(self, worker: _Worker) -> None:
        worker.position += 1
        worker.clock[worker.program.worker] = worker.position

    def _run(self, worker: _Worker, instruction: Run) -> None:
        place = worker.program.process
        for register in instruction.inputs:
            if register.startswith("p:"):
                self.read_at[place, register][worker.program.worker] = worker.position + 1
                if any(write.worker == worker.program.worker for write in self.written[place, register]):
                    raise ProgramError(f"{worker.where} reads {register!r} after this worker has changed it")
        for register, adds in zip(instruction.outputs, instruction.accumulate, strict=True):
            if adds and register in worker.reduced:
                raise ProgramError(f"{worker.where} adds to {register!r}, which was reduced already")
            if not adds and "@" in register:  # results of the whole step may be for other workers only
                worker.unread[register] = worker.position
            worker.parts[register] = frozenset({worker.program.worker})

    def _receive(self, worker: _Worker, instruction: Recv, clock: Clock, parts: Workers) -> None:
        worker.learn(clock)
        register = instruction.register
        if register.startswith("p:"):
            self._note_write(worker, register)
        else:
            worker.unread[register] = worker.position
            worker.parts[register] = parts
        self._over(worker)

    def _meet(self, members: list[_Worker]) -> None:
        merged: Clock = {}
        for member in members:
            for index, count in member.clock.items():
                merged[index] = max(merged.get(index, 0), count)
        found = [self._combined(member, place, members) for place, member in enumerate(members)]
        for member, parts in zip(members, found, strict=True):
            assert member.current is not None
            self._read(member, member.current)
            member.reduced.update(reads(member.current))
            for register in writes(member.current, member.program.worker):
                member.reduced.discard(register)
            member.parts.update(parts)
            member.learn(merged)
        for member in members:
            self._over(member)
        for member in members:
            member.learn({other.program.worker: other.position for other in members})

    def _await(self, worker: _Worker, instruction: Await, members: list[_Worker]) -> None:
        """A sum is over once all have started theirs: what they had then is in it, and what they did before is over."""
        for place, register in enumerate(writes(instruction)):
            total: Workers = frozenset()
            for member in members:
                parts = member.begun[instruction.key][1][place]
                if total & parts:
                    raise ProgramError(f"{worker.where} adds the parts of workers {sorted(total & parts)} twice")
                total |= parts
            worker.parts[register] = total
        for member in members:
            worker.learn(member.begun[instruction.key][0])
        self._over(worker)

    def _combined(self, member: _Worker, place: int, members: list[_Worker]) -> dict[str, Workers]:
        """The parts in the registers that `member` gets from a collective."""
        mine = member.current
        if isinstance(mine, AllReduce):
            names = mine.outputs or mine.registers
            return {
                name: self._union(member, [(m, m.current.registers[i]) for m in members])  # type: ignore[union-attr]
                for i, name in enumerate(names)
            }
        if isinstance(mine, ReduceScatter) and mine.slices:
            at = {name: i for i, name in enumerate(mine.parameters)}
            found: dict[str, Workers] = {}
            for index, part in enumerate(mine.slices[place]):
                i = at[part.parameter]
                whole = bool(mine.replicated and mine.replicated[i]) and not mine.parts
                boxes = mine.parts[i] if mine.parts else (True,) * len(members)
                held = [(m, m.current.registers[i]) for m, box in zip(members, boxes, strict=True) if box]  # type: ignore[union-attr]
                wanted = self.owners[member.program.worker, part.parameter]
                found[f"g:{mine.first + index}"] = wanted if whole else self._union(member, held)
            return found
        assert mine is not None
        return {name: frozenset({member.program.worker}) for name in writes(mine, member.program.worker)}

    def _union(self, member: _Worker, held: Iterable[tuple[_Worker, str]]) -> Workers:
        total: Workers = frozenset()
        for worker, register in held:
            parts = self._parts(worker, register)
            if total & parts and register.startswith("g:"):
                raise ProgramError(f"{member.where} adds the parts of workers {sorted(total & parts)} twice")
            total |= parts
        return total

    def _parts(self, worker: _Worker, register: str) -> Workers:
        return worker.parts.get(register, frozenset({worker.program.worker}))

    def _update(self, worker: _Worker, instruction: Update) -> None:
        for index, part in enumerate(instruction.slices, start=instruction.first):
            have, want = self._parts(worker, f"g:{index}"), self.owners[worker.program.worker, part.parameter]
            if have != want:
                raise ProgramError(
                    f"{worker.where} must update {part.parameter!r} with the sum over workers {sorted(want)}, but "
                    f"g:{index} has only the parts of {sorted(have)}"
                )
            self._note_write(worker, f"p:{part.parameter}")

    def _note_write(self, worker: _Worker, register: str) -> None:
        write = _Write(worker.program.worker, worker.position + 1, dict(worker.clock))
        self.written[worker.program.process, register].append(write)

    def _let_go(self, worker: _Worker, register: str) -> None:
        wrote = worker.unread.pop(register, None)
        if wrote is not None:
            source = "fed" if wrote < 0 else f"written by its instruction {wrote}"
            raise ProgramError(f"{worker.where} frees {register!r}, {source}, which nothing has read")
        worker.parts.pop(register, None)

    # The whole -----------------------------------------------------------------------------------------------------

    def _compare_ends(self) -> None:
        ends: dict[str, dict[int, Workers]] = defaultdict(dict)
        for index, worker in self.workers.items():
            kept = worker.program.kept
            left = [register for register in worker.unread if register not in kept and not is_persistent(register)]
            if left:
                raise ProgramError(f"every value must be read, but worker {index} never reads {left}")
            if worker.program.square:
                ends["the norm of the gradients"][index] = self._parts(worker, worker.program.square)
            if worker.program.loss:
                ends["the loss"][index] = self._parts(worker, worker.program.loss)
            for name, register in worker.program.buffers.items():
                ends[f"buffer {name!r}"][index] = self._parts(worker, register)
        for what, found in ends.items():
            sums = {index: parts for index, parts in found.items() if len(parts) > 1}
            # Workers of a tensor axis have the same values, each from the workers at its own coordinate.
            sets = set(sums.values())
            alike = len({len(parts) for parts in sets}) <= 1 and sum(map(len, sets)) == len(frozenset().union(*sets))
            if sums and (len(sums) < len(found) or not alike):
                told = {index: sorted(parts) for index, parts in found.items()}
                raise ProgramError(f"all workers must end with the same parts of {what}, but they have {told}")

    def _check_parameters(self) -> None:
        for (process, register), writes_here in self.written.items():
            for reader, index in self.read_at[process, register].items():
                for write in writes_here:
                    if write.worker != reader and write.clock.get(reader, 0) < index:
                        raise ProgramError(
                            f"worker {write.worker}, instruction {write.index - 1} may change {register!r} while "
                            f"worker {reader} of the same process still reads it in instruction {index - 1}"
                        )
        for process, register, clock, where in self.sent:
            for write in self.written[process, register]:
                if clock.get(write.worker, 0) < write.index:
                    raise ProgramError(
                        f"{where} may send {register!r} before worker {write.worker} has updated its part "
                        f"(instruction {write.index - 1})"
                    )


def _owners(programs: Iterable[Program]) -> dict[tuple[int, str], Workers]:
    """(Worker, parameter) -> the workers whose registers make up the gradient that it updates the parameter by: as its
    reduction says, else all that reduce the parameter."""
    told: dict[tuple[int, str], Workers] = {}
    reducing: dict[str, set[int]] = defaultdict(set)
    for program in programs:
        for instruction in program.instructions:
            if isinstance(instruction, ReduceScatter) and own_slices(instruction, program.worker) >= 0:
                for index, name in enumerate(instruction.parameters):
                    reducing[name].add(program.worker)
                    if instruction.sums_over:
                        told[program.worker, name] = frozenset(instruction.sums_over[index])
    every = {(worker, name): frozenset(workers) for name, workers in reducing.items() for worker in workers}
    return every | told
