"""What program sets mean: a plain sequential interpreter, which shares nothing with the runtime.

One instruction of one worker at a time, every value a copy of its own, sums formed in float64 of whole tensors. It is
slow, and right by looking at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Clip,
    Free,
    Instruction,
    Program,
    ProgramSet,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Start,
    SumSquares,
    Update,
)

Registers = dict[str, Tensor]
Collective = AllReduce | ReduceScatter | AllGather | AllToAll


@dataclass
class _Worker:
    program: Program
    registers: Registers
    position: int = 0

    @property
    def current(self) -> Instruction | None:
        instructions = self.program.instructions
        return instructions[self.position] if self.position < len(instructions) else None


@dataclass
class PlainMachine:
    """All processes of a job in one.

    Args:
        programs: what they run; draws, views and parts of parameters are not supported.
        parameters: by process and name; changed in place by updates.
        update: ``(old, gradient) -> new``, element-wise.

    Example:
        >>> PlainMachine(programs, parameters, lambda old, gradient: old - gradient).step(leaves)  # doctest: +SKIP
    """

    programs: ProgramSet
    parameters: Mapping[int, dict[str, Tensor]]
    update: Callable[[Tensor, Tensor], Tensor]
    losses: dict[int, Tensor] = field(default_factory=dict)  # by worker
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def step(self, leaves: Sequence[Tensor]) -> None:
        """Run all programs to their end; afterwards `losses` and `buffers` hold the step's."""
        self._mail: dict[tuple[int, int, str], Tensor] = {}
        self._begun: dict[str, dict[int, list[Tensor]]] = {}  # key of a sum in the background -> worker -> values
        self._workers = {p.worker: _Worker(p, self._start(p, leaves)) for p in self.programs.programs}
        while any(worker.current is not None for worker in self._workers.values()):
            moved = [self._advance(worker) for worker in self._workers.values()]
            assert any(moved), "the programs deadlock"
        self.losses = {index: worker.registers[worker.program.loss] for index, worker in self._workers.items()}
        self.buffers = {
            name: worker.registers[register]
            for worker in self._workers.values()
            for name, register in worker.program.buffers.items()
        }

    def _start(self, program: Program, leaves: Sequence[Tensor]) -> Registers:
        return {
            feed.register: leaves[feed.leaf].narrow(feed.dim, feed.start, feed.length).clone() for feed in program.feeds
        }

    def _read(self, worker: _Worker, name: str) -> Tensor:
        if name.startswith("p:"):
            return self.parameters[worker.program.process][name[2:]].clone()
        return worker.registers[name].clone()

    def _advance(self, worker: _Worker) -> bool:
        instruction = worker.current
        if instruction is None:
            return False
        if isinstance(instruction, Collective):
            return self._meet(instruction)
        if isinstance(instruction, Recv):
            address = (instruction.peer, worker.program.worker, instruction.key)
            if address not in self._mail:
                return False
            self._write(worker, instruction.register, self._mail.pop(address))
        elif isinstance(instruction, Await):
            brought = self._begun[instruction.key]
            if len(brought) < len(instruction.collective.group):
                return False
            sums = [total(parts) for parts in zip(*brought.values(), strict=True)]
            worker.registers.update(zip(instruction.collective.registers, sums, strict=True))
        else:
            self._alone(worker, instruction)
        worker.position += 1
        return True

    def _write(self, worker: _Worker, name: str, value: Tensor) -> None:
        if name.startswith("p:"):
            self.parameters[worker.program.process][name[2:]].copy_(value)
        else:
            worker.registers[name] = value

    def _alone(self, worker: _Worker, instruction: Instruction) -> None:
        if isinstance(instruction, Run):
            self._run(worker, instruction)
        elif isinstance(instruction, Send):
            address = (worker.program.worker, instruction.peer, instruction.key)
            self._mail[address] = self._read(worker, instruction.register)
        elif isinstance(instruction, Update):
            for index, part in enumerate(instruction.slices):
                flat = self.parameters[worker.program.process][part.parameter].view(-1)
                flat[part.start : part.end] = self.update(flat[part.start : part.end], worker.registers[f"g:{index}"])
        elif isinstance(instruction, SumSquares):
            weighted = zip(instruction.registers, instruction.weights, strict=True)
            parts = [weight * self._read(worker, name).double().square().sum() for name, weight in weighted]
            worker.registers[instruction.output] = torch.stack([*parts, torch.zeros(()).double()]).sum().view(1)
        elif isinstance(instruction, Clip):
            return  # these programs have no limit
        elif isinstance(instruction, Start):
            values = [worker.registers.pop(name) for name in instruction.collective.registers]
            self._begun.setdefault(instruction.key, {})[worker.program.worker] = values
        elif isinstance(instruction, Free):
            for name in instruction.registers:
                del worker.registers[name]
        else:
            raise NotImplementedError(type(instruction).__name__)

    def _run(self, worker: _Worker, run: Run) -> None:
        module = self.programs.segments[run.segment].module
        results = module(*(self._read(worker, name) for name in run.inputs))
        for name, result, adds in zip(run.outputs, results, run.accumulate, strict=True):
            before = worker.registers.get(name) if adds else None
            worker.registers[name] = result.clone() if before is None else before + result

    # Collectives -------------------------------------------------------------------------------------------------

    def _meet(self, instruction: Collective) -> bool:
        members = [self._workers[index] for index in instruction.group]
        calls = [member.current for member in members]
        if any(getattr(call, "key", None) != instruction.key for call in calls):
            return False
        results = self._together(members, calls)  # type: ignore[arg-type]
        for member, registers in zip(members, results, strict=True):
            member.registers.update(registers)
            member.position += 1
        return True

    def _together(self, members: Sequence[_Worker], calls: Sequence[Collective]) -> list[Registers]:
        """What each member gets."""
        first = calls[0]
        if isinstance(first, (AllReduce, ReduceScatter)):
            brought = [[self._read(m, name) for name in call.registers] for m, call in zip(members, calls, strict=True)]  # type: ignore[union-attr]
            sums = [total(parts) for parts in zip(*brought, strict=True)]
            if isinstance(first, AllReduce):
                names = [call.outputs or call.registers for call in calls]  # type: ignore[union-attr]
                return [dict(zip(own, (value.clone() for value in sums), strict=True)) for own in names]
            if not first.slices:
                pieces = [value.split(list(first.sizes), first.dim) for value in sums]
                return [
                    dict(zip(call.outputs, (piece[place].clone() for piece in pieces), strict=True))  # type: ignore[union-attr]
                    for place, call in enumerate(calls)
                ]
            return [self._gradients(first, place, sums, own) for place, own in enumerate(brought)]
        values = [self._read(member, call.register) for member, call in zip(members, calls, strict=True)]  # type: ignore[union-attr]
        whole = torch.cat(values, first.dim)
        if isinstance(first, AllGather):
            return [{call.output: whole.clone()} for call in calls]  # type: ignore[union-attr]
        parts = whole.split(list(first.new_sizes), first.new_dim)
        return [{call.output: part.clone()} for call, part in zip(calls, parts, strict=True)]  # type: ignore[union-attr]

    def _gradients(self, call: ReduceScatter, place: int, sums: Sequence[Tensor], own: Sequence[Tensor]) -> Registers:
        result = {}
        for index, part in enumerate(call.slices[place]):
            at = call.parameters.index(part.parameter)
            source = own[at] if call.replicated and call.replicated[at] else sums[at]
            result[f"g:{index}"] = source.reshape(-1)[part.start : part.end].clone()
        return result


def total(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one dtype, formed in float64."""
    return torch.stack([part.double() for part in parts]).sum(0).to(parts[0].dtype)
