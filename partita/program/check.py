"""`check`: executes all programs of a set together, abstractly, before anything runs for real.

A worker's state is its next instruction and the shapes of its registers. Sends never wait; a receive waits for its
message; a collective waits until all members of its group have come to an instruction of the same key. If no worker
can go on and one is not at its end, the programs would deadlock.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

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
    Segment,
    Send,
    Slice,
    Start,
    TensorSpec,
    Update,
)
from partita.program.order import check_order
from partita.program.uses import is_persistent, own_slices, reads, writes, written_specs

_COLLECTIVES = (AllReduce, ReduceScatter, AllGather, AllToAll)
Mailbox = dict[tuple[int, int, str], TensorSpec]  # (sender, receiver, key) -> what was sent


class _State:
    """One worker in the abstract execution."""

    def __init__(self, program: Program, segments: Mapping[str, Segment]) -> None:
        self.program = program
        self.segments = segments
        self.position = 0
        self.registers: dict[str, TensorSpec | None] = {feed.register: None for feed in program.feeds}
        self.started: dict[tuple[int, ...], list[str]] = defaultdict(list)  # group -> keys of its sums, in order
        self.in_background: dict[str, str] = {}  # register -> key of the sum that it belongs to

    @property
    def current(self) -> Instruction | None:
        done = self.position >= len(self.program.instructions)
        return None if done else self.program.instructions[self.position]

    @property
    def where(self) -> str:
        name = type(self.current).__name__ if self.current is not None else "end"
        return f"worker {self.program.worker}, instruction {self.position} ({name})"

    def require(self, register: str, spec: TensorSpec | None) -> None:
        """The register must hold a value (of that shape and dtype)."""
        if is_persistent(register):
            return
        if register not in self.registers:
            raise ProgramError(f"every register must be written before it is read, but {self.where} reads {register!r}")
        held = self.registers[register]
        if spec is not None and held is not None and held != spec:
            raise ProgramError(f"{self.where} expects {register!r} with {spec}, but it holds {held}")

    def advance(self) -> None:
        """Reads, writes and frees of the current instruction, then on to the next."""
        instruction = self.current
        assert instruction is not None
        for register, spec in _read_specs(instruction, self.segments):
            self.require(register, spec)
        if isinstance(instruction, Run):
            segment = self.segments[instruction.segment]
            for register, out in zip(instruction.outputs, segment.output_specs, strict=True):
                self.registers[register] = out
        elif isinstance(instruction, Free):
            for register in instruction.registers:
                self.require(register, None)
                self.registers.pop(register, None)
        elif isinstance(instruction, Start):
            self._start(instruction)
        else:
            for register, spec in written_specs(instruction, self.program.worker):
                if not is_persistent(register):
                    self.registers[register] = spec
        self._check_background(instruction)
        self.position += 1

    def _start(self, instruction: Start) -> None:
        """What is summed in the background is nobody else's until it is awaited."""
        collective = instruction.collective
        if collective.key in self.started[collective.group]:
            raise ProgramError(f"{self.where}: {collective.key!r} must be started once a step, but is started again")
        self.started[collective.group].append(collective.key)
        for register in collective.registers:
            self.registers.pop(register, None)
            self.in_background[register] = collective.key

    def _check_background(self, instruction: Instruction) -> None:
        if isinstance(instruction, Await):
            for register in instruction.collective.registers:
                self.in_background.pop(register, None)
        written: Iterable[str] = ()
        if not isinstance(instruction, Start):
            written = writes(instruction, self.program.worker)
        for register in written:
            if register in self.in_background:
                raise ProgramError(
                    f"{self.where} writes {register!r}, which belongs to {self.in_background[register]!r} until that "
                    "is awaited"
                )


def _read_specs(instruction: Instruction, segments: Mapping[str, Segment]) -> list[tuple[str, TensorSpec | None]]:
    if isinstance(instruction, Run):
        if instruction.segment not in segments:
            raise ProgramError(f"every Run must name a segment of the set, but got {instruction.segment!r}")
        segment = segments[instruction.segment]
        lengths = (len(instruction.inputs), len(instruction.outputs), len(instruction.accumulate))
        expected = (len(segment.input_specs), len(segment.output_specs), len(segment.output_specs))
        if lengths != expected:
            raise ProgramError(
                f"a Run must have as many inputs, outputs and accumulate flags as its segment {expected}, got {lengths}"
            )
        return list(zip(instruction.inputs, segment.input_specs, strict=True))
    if isinstance(instruction, (AllReduce, ReduceScatter)):
        if len(instruction.registers) != len(instruction.specs):
            raise ProgramError(f"a collective must have a spec per register, but {instruction.key!r} has not")
        return list(zip(instruction.registers, instruction.specs, strict=True))
    if isinstance(instruction, Start):
        return _read_specs(instruction.collective, segments)
    if isinstance(instruction, (Send, AllGather, AllToAll)):
        return [(instruction.register, instruction.spec)]
    return [(register, None) for register in reads(instruction)]


def check(programs: ProgramSet) -> None:
    """Raises ProgramError unless the programs flow to their end (`check_flow`) and, in every order of the workers, read
    each value complete and in time (`partita.program.order.check_order`)."""
    check_flow(programs)
    check_order(programs)


def check_flow(programs: ProgramSet) -> None:
    """Raises ProgramError unless all programs together run to their end, with every value where it is read.

    Checked: no deadlock; no read of a register without a value; shapes and dtypes where both sides state them; no
    register left over at the end; no message without a receiver; every element of an updated parameter updated
    exactly once in each process, or its new value received.
    """
    states = {program.worker: _State(program, programs.segments) for program in programs.programs}
    mailbox: Mailbox = {}
    while any(state.current is not None for state in states.values()):
        if not any([_step(state, states, mailbox) for state in states.values()]):
            raise ProgramError(_deadlock(states))
    if mailbox:
        sender, receiver, key = next(iter(mailbox))
        raise ProgramError(
            f"every message must be received, but {key!r} from worker {sender} to worker {receiver} is not"
        )
    for state in states.values():
        _check_end(state)
        _check_background_order(state, states)
    _check_updates(programs)


def _step(state: _State, states: Mapping[int, _State], mailbox: Mailbox) -> bool:
    """Lets one worker go as far as it can; whether it moved."""
    moved = False
    while (instruction := state.current) is not None:
        worker = state.program.worker
        if isinstance(instruction, Send):
            address = (worker, instruction.peer, instruction.key)
            if instruction.peer not in states or address in mailbox:
                raise ProgramError(
                    f"{state.where}: a message must have an existing receiver and its own key: {address}"
                )
            mailbox[address] = instruction.spec
        elif isinstance(instruction, Recv):
            sent = mailbox.get((instruction.peer, worker, instruction.key))
            if sent is None:
                return moved
            if sent != instruction.spec:
                raise ProgramError(
                    f"{state.where} expects {instruction.spec}, but worker {instruction.peer} sent {sent}"
                )
            del mailbox[instruction.peer, worker, instruction.key]
        elif isinstance(instruction, Await):
            if _missing(instruction, states):
                return moved
        elif isinstance(instruction, _COLLECTIVES) and len(instruction.group) > 1:
            if not _meet(instruction, state, states):
                return moved
            for member in instruction.group:
                states[member].advance()
            moved = True
            continue
        state.advance()
        moved = True
    return moved


def _meet(
    instruction: AllReduce | ReduceScatter | AllGather | AllToAll, state: _State, states: Mapping[int, _State]
) -> bool:
    """Whether all members of the group are at this collective."""
    if state.program.worker not in instruction.group or not set(instruction.group) <= set(states):
        raise ProgramError(
            f"{state.where}: the group {instruction.group} must hold the worker and only existing workers"
        )
    for member in instruction.group:
        other = states[member].current
        if type(other) is not type(instruction) or getattr(other, "key", None) != instruction.key:
            return False
        assert isinstance(other, _COLLECTIVES)
        if other.group != instruction.group:
            raise ProgramError(
                f"members of a collective must agree on the group, but {instruction.key!r} has {instruction.group} "
                f"on worker {state.program.worker} and {other.group} on worker {member}"
            )
    return True


def _missing(instruction: Await, states: Mapping[int, _State]) -> list[int]:
    """The members that have not started the awaited sum yet."""
    collective = instruction.collective
    return [m for m in collective.group if collective.key not in states[m].started[collective.group]]


def _deadlock(states: Mapping[int, _State]) -> str:
    waits = []
    for state in states.values():
        instruction = state.current
        if isinstance(instruction, Recv):
            waits.append(f"{state.where} waits for message {instruction.key!r} from worker {instruction.peer}")
        elif isinstance(instruction, Await):
            late = _missing(instruction, states)
            waits.append(f"{state.where} awaits {instruction.key!r}, which worker(s) {late} do not start")
        elif isinstance(instruction, _COLLECTIVES):
            missing = [
                member
                for member in instruction.group
                if getattr(states[member].current, "key", None) != instruction.key
            ]
            waits.append(f"{state.where} waits in {instruction.key!r} for worker(s) {missing}")
    return "the programs would deadlock: " + "; ".join(waits)


def _check_end(state: _State) -> None:
    kept = state.program.kept
    left = [register for register in state.registers if register not in kept]
    if left:
        raise ProgramError(
            f"every register must be freed by the end of the step, but worker {state.program.worker} still holds {left}"
        )
    for register in kept:
        if register not in state.registers:
            raise ProgramError(f"worker {state.program.worker} must end with {register!r}, but it does not hold it")


def _check_background_order(state: _State, states: Mapping[int, _State]) -> None:
    """One thread carries out the sums of a group, one after the other: all members must start them in one order."""
    if state.in_background:
        register, key = next(iter(state.in_background.items()))
        raise ProgramError(f"worker {state.program.worker} must await {key!r}, which {register!r} belongs to")
    for group, keys in state.started.items():
        for member in group:
            if states[member].started[group] != keys:
                raise ProgramError(
                    f"the members of a group must start its sums in one order, but worker {state.program.worker} "
                    f"starts {keys} and worker {member} {states[member].started[group]}"
                )


def _check_updates(programs: ProgramSet) -> None:
    reduced: dict[int, dict[str, int]] = defaultdict(dict)
    updated: dict[int, list[Slice]] = defaultdict(list)
    given: dict[int, set[str]] = defaultdict(set)  # what other processes send instead
    for program in programs.programs:
        received: dict[int, tuple[Slice, ...]] = {}  # by the number of the first
        for instruction in program.instructions:
            if isinstance(instruction, ReduceScatter) and instruction.slices:
                shapes = instruction.storages or tuple(spec.shape for spec in instruction.specs)
                for name, shape in zip(instruction.parameters, shapes, strict=True):
                    reduced[program.process][name] = math.prod(shape)
                received[instruction.first] = instruction.slices[instruction.group.index(program.worker)]
                assert len(received[instruction.first]) == own_slices(instruction, program.worker)
            elif isinstance(instruction, Update):
                if instruction.slices != received.get(instruction.first, ())[: len(instruction.slices)]:
                    raise ProgramError(f"worker {program.worker} must update the slices that it reduced")
                updated[program.process] += instruction.slices
            elif isinstance(instruction, Recv) and instruction.register.startswith("p:"):
                given[program.process].add(instruction.register[2:])
    for process, sizes in reduced.items():
        for name, size in sizes.items():
            parts = sorted((part.start, part.end) for part in updated[process] if part.parameter == name)
            position = 0
            for start, end in parts:
                if start != position:
                    break
                position = end
            if not parts and name in given[process]:
                continue
            if position != size or sum(end - start for start, end in parts) != size:
                raise ProgramError(
                    f"every element of parameter {name!r} must be updated exactly once in process {process}, but the "
                    f"updates cover {parts} of {size} elements"
                )
