"""A reference interpreter: executes a program set in one thread, all workers in lockstep, with plain torch ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.utils._pytree as pytree

from partita.graph.graph import Graph
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Free,
    Program,
    ProgramSet,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Update,
)

Tensors = dict[str, torch.Tensor]


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the values' own dtype; of truth values, whether any is true."""
    return sum(values[1:], values[0]).to(values[0].dtype)


class _Worker:
    def __init__(self, program: Program, persistent: Mapping[str, torch.Tensor]) -> None:
        self.program = program
        self.persistent = persistent
        self.registers: Tensors = {}
        self.position = 0

    def get(self, register: str) -> torch.Tensor:
        return self.persistent[register] if register[:2] in ("p:", "b:", "c:") else self.registers[register]

    @property
    def current(self):
        instructions = self.program.instructions
        return instructions[self.position] if self.position < len(instructions) else None


class Reference:
    """Runs one step; `gradients` collects, per process, what every `Update` got, assembled to whole parameters."""

    def __init__(self, graph: Graph, programs: ProgramSet, parameters: Tensors, buffers: Tensors, batch) -> None:
        self.programs = programs
        self.shapes = {item.name: item.shape for item in graph.inputs}
        self.gradients: dict[int, Tensors] = {}
        self.mail: dict[tuple[int, int, str], torch.Tensor] = {}
        persistent = {f"p:{name}": value.detach() for name, value in parameters.items()}
        persistent |= {f"b:{name}": value for name, value in buffers.items()}
        persistent |= {f"c:{name}": value for name, value in graph.constants.items()}
        self.workers = {p.worker: _Worker(p, persistent) for p in programs.programs}
        leaves = pytree.tree_leaves(batch)
        drawn = {draw.name: draw.module() for draw in programs.draws}
        for worker in self.workers.values():
            for feed in worker.program.feeds:
                value = leaves[feed.leaf] if feed.leaf >= 0 else drawn[feed.draw]
                if feed.dim >= 0:
                    value = value.narrow(feed.dim, feed.start, feed.length)
                worker.registers[feed.register] = value

    def run(self) -> tuple[dict[int, torch.Tensor], dict[int, Tensors], dict[int, Tensors]]:
        """Returns (loss by process, gradients by process, new buffers by process)."""
        while any(worker.current is not None for worker in self.workers.values()):
            assert any([self._advance(worker) for worker in self.workers.values()]), "deadlock"
        losses: dict[int, torch.Tensor] = {}
        buffers: dict[int, Tensors] = {}
        for worker in self.workers.values():
            if worker.program.loss:
                losses[worker.program.process] = worker.registers[worker.program.loss]
            for name, register in worker.program.buffers.items():
                buffers.setdefault(worker.program.process, {})[name] = worker.registers[register]
        return losses, self.gradients, buffers

    def _advance(self, worker: _Worker) -> bool:
        instruction = worker.current
        if instruction is None:
            return False
        if isinstance(instruction, Recv):
            key = (instruction.peer, worker.program.worker, instruction.key)
            if key not in self.mail:
                return False
            if instruction.register[:2] != "p:":
                worker.registers[instruction.register] = self.mail.pop(key)
        elif isinstance(instruction, (AllReduce, ReduceScatter, AllGather, AllToAll)):
            members = [self.workers[index] for index in instruction.group]
            if any(getattr(member.current, "key", None) != instruction.key for member in members):
                return False
            self._collective(members)
            return True
        else:
            self._local(worker, instruction)
        worker.position += 1
        return True

    def _local(self, worker: _Worker, instruction) -> None:
        if isinstance(instruction, Run):
            segment = self.programs.segments[instruction.segment]
            with torch.no_grad():
                results = segment.module(*(worker.get(register) for register in instruction.inputs))
            for register, value, add in zip(instruction.outputs, results, instruction.accumulate, strict=True):
                worker.registers[register] = (
                    worker.registers[register] + value if add and register in worker.registers else value
                )
        elif isinstance(instruction, Send):
            self.mail[worker.program.worker, instruction.peer, instruction.key] = worker.get(instruction.register)
        elif isinstance(instruction, Free):
            for register in instruction.registers:
                worker.registers.pop(register, None)
        elif isinstance(instruction, Update):
            found = self.gradients.setdefault(worker.program.process, {})
            for index, part in enumerate(instruction.slices):
                whole = found.setdefault(part.parameter, torch.full(self.shapes[part.parameter], float("nan")))
                whole.view(-1)[part.start : part.end] = worker.registers[f"g:{index}"]

    def _collective(self, members: Sequence[_Worker]) -> None:
        first = members[0].current
        group = len(members)
        if isinstance(first, AllReduce):
            for index in range(len(first.registers)):
                total = _sum([member.get(member.current.registers[index]) for member in members])
                for member in members:
                    member.registers[(member.current.outputs or member.current.registers)[index]] = total
        elif isinstance(first, AllGather):
            whole = torch.cat([member.get(member.current.register) for member in members], first.dim)
            for member in members:
                member.registers[first.output] = whole
        elif isinstance(first, AllToAll):
            whole = torch.cat([member.get(member.current.register) for member in members], first.dim)
            for member, part in zip(members, whole.split(first.new_sizes, first.new_dim), strict=True):
                member.registers[first.output] = part
        elif first.slices:
            for index, name in enumerate(first.parameters):
                values = [member.get(first.registers[index]).reshape(-1) for member in members]
                total = values[0] if first.replicated[index] else sum(values)
                for member, slices in zip(members, first.slices, strict=True):
                    for place, part in enumerate(slices):
                        if part.parameter == name:
                            member.registers[f"g:{place}"] = total[part.start : part.end]
        else:
            for index in range(len(first.registers)):
                total = _sum([member.get(first.registers[index]) for member in members])
                for member, part in zip(members, total.split(first.sizes, first.dim), strict=True):
                    member.registers[first.outputs[index]] = part
        assert group == len(first.group)
        for member in members:
            member.position += 1
