"""Models, plans and an oracle for program tests: a job in one thread, a memory per process, workers in random turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

from partita.graph.capture import capture
from partita.graph.graph import Graph, Phase
from partita.plan import Plan, Worker
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
from partita.units import split_evenly

Tensors = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Any], torch.Tensor]
COLLECTIVES = (AllReduce, ReduceScatter, AllGather, AllToAll)


# Models ------------------------------------------------------------------------------------------------------------


class TiedLanguageModel(nn.Module):
    """Embedding and head share their weight: with two stages both read it, one of them updates it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        mask = torch.triu(torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool), 1)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask)
        return self.head(hidden)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.body = cell(3, 5, 2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[0][:, -1])


class Partly(nn.Module):
    """A frozen, an unreached and a penalised parameter, and one that the forward phase reads twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
        self.first.bias.requires_grad_(False)
        self.unreached = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.full((5,), 1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x * self.scale)) * self.scale)


def classify(model: nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_token(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1])
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == 0, -100)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100)


def penalised(model: nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad and p is not model.unreached)
    return classify(model, batch) + 0.1 * penalty + 0.1 * model.scale.sum()


def denoise(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(batch)
    return (model(batch + torch.rand(batch.shape[0], 1) * noise) - noise).square().mean()


@dataclass(frozen=True)
class Case:
    """A model with its loss and batch."""

    make: Callable[[], nn.Module]
    loss: Loss
    batch: Callable[[int], Any]  # number of rows -> batch


def _labelled(width: int, classes: int) -> Callable[[int], Any]:
    return lambda rows: (torch.randn(rows, width), torch.randint(0, classes, (rows,)))


def _mlp(*between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        hidden = [layer for part in between for layer in (nn.Linear(6, 6), part())]
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *hidden, nn.Linear(6, 3))

    return make


CASES: dict[str, Case] = {
    "mlp": Case(_mlp(nn.Tanh, nn.ReLU), classify, _labelled(4, 3)),
    "dropout": Case(_mlp(lambda: nn.Dropout(0.4), lambda: nn.Dropout(0.2)), classify, _labelled(4, 3)),
    "batch_norm": Case(_mlp(lambda: nn.BatchNorm1d(6)), classify, _labelled(4, 3)),
    "conv": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
        ),
        classify,
        lambda rows: (torch.randn(rows, 2, 6, 6), torch.randint(0, 3, (rows,))),
    ),
    "gru": Case(
        lambda: Recurrent(nn.GRU), classify, lambda rows: (torch.randn(rows, 4, 3), torch.randint(0, 4, (rows,)))
    ),
    "lstm": Case(Recurrent, classify, lambda rows: (torch.randn(rows, 4, 3), torch.randint(0, 4, (rows,)))),
    "transformer": Case(TiedLanguageModel, next_token, lambda rows: torch.randint(0, 13, (rows, 6))),
    "transformer_dropout": Case(
        lambda: TiedLanguageModel(dropout=0.2),
        next_token,
        lambda rows: torch.randint(0, 13, (rows, 6)),
    ),
    "partly": Case(Partly, penalised, _labelled(5, 3)),
    "denoise": Case(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), denoise, lambda r: torch.randn(r, 4)
    ),
}


# Plans -------------------------------------------------------------------------------------------------------------


def forward_ops(graph: Graph) -> list[str]:
    """Names at which a stage may start."""
    return [node.name for node, info in graph.ops() if info.phase is Phase.FORWARD]


def stage_starts(graph: Graph, num_stages: int) -> tuple[str, ...]:
    """Cuts that give every stage about as many forward ops."""
    names = forward_ops(graph)
    return tuple(names[len(names) * stage // num_stages] for stage in range(1, num_stages))


def make_plan(
    graph: Graph,
    *,
    data: int = 1,
    pipeline: int = 1,
    tensor: int = 1,
    inputs: dict[str, dict[str, str]] | None = None,
    microbatches: int = 1,
    schedule: str = "1f1b",
    processes: Sequence[int] | None = None,
    shares: tuple[int, ...] | None = None,
    starts: tuple[str, ...] | None = None,
    local_statistics: bool = False,
    bucket_bytes: int = 0,
) -> Plan:
    """A plan whose worker ``(stage * data + d) * tensor + t`` is on process ``processes[worker]`` (default: all on
    process 0)."""
    where = tuple(processes) if processes is not None else (0,) * (data * pipeline * tensor)
    workers = tuple(
        Worker(
            index=i,
            process=where[i],
            machine=where[i],
            cores=(i,),
            stage=i // tensor // data,
            data=i // tensor % data,
            tensor=i % tensor,
        )
        for i in range(data * pipeline * tensor)
    )
    return Plan(
        mode="graph",
        graph_fingerprint=graph.fingerprint,
        cluster_fingerprint="made up",
        axes={"pipeline": pipeline, "data": data, "tensor": tensor},
        inputs=inputs or {},
        workers=workers,
        threads_per_worker=1,
        num_microbatches=microbatches,
        schedule=schedule,  # type: ignore[arg-type]
        stage_starts=starts if starts is not None else stage_starts(graph, pipeline),
        shares=shares if shares is not None else split_evenly(graph.batch_size, data),
        local_statistics=local_statistics,
        bucket_bytes=bucket_bytes,
    )


# The oracle --------------------------------------------------------------------------------------------------------


class _Turn:
    """One worker: its registers and where it is."""

    def __init__(self, program: Program, memory: Tensors) -> None:
        self.program, self.memory = program, memory
        self.registers: Tensors = {}
        self.position = 0

    @property
    def current(self) -> Instruction | None:
        done = self.position >= len(self.program.instructions)
        return None if done else self.program.instructions[self.position]

    def __getitem__(self, register: str) -> torch.Tensor:
        if register[:2] not in ("p:", "b:", "c:"):
            return self.registers[register]
        view = self.program.views.get(register[2:])
        return self.memory[register] if view is None else view.of(self.memory[register])


class Job:
    """Executes steps of plain gradient descent as the processes of a job would, each with its own memory.

    Workers take turns in random order, one instruction at a time: a program that is right only for one order of its
    workers (an update before another worker's last read) gives wrong weights here.
    """

    def __init__(self, graph: Graph, programs: ProgramSet, model: nn.Module, *, seed: int = 0) -> None:
        self.graph, self.programs, self.dice = graph, programs, random.Random(seed)
        self.memory: dict[int, Tensors] = {}
        for process in {program.process for program in programs.programs}:
            values = {f"p:{name}": value.detach().clone() for name, value in model.named_parameters()}
            values |= {f"b:{name}": value.detach().clone() for name, value in model.named_buffers()}
            values |= {f"c:{name}": value.detach().clone() for name, value in graph.constants.items()}
            for name, box in programs.held.get(process, {}).items():
                values[f"p:{name}"] = box.of(values[f"p:{name}"]).clone(memory_format=torch.contiguous_format)
            self.memory[process] = values

    def step(self, batch: Any, learning_rate: float) -> dict[int, torch.Tensor]:
        """One step on all processes; returns the loss by process."""
        leaves = pytree.tree_leaves(batch)
        drawn = {draw.name: draw.module() for draw in self.programs.draws}
        self.mail: dict[tuple[int, int, str], torch.Tensor] = {}
        self.begun: dict[str, dict[int, list[torch.Tensor]]] = {}  # sums in the background: by key and worker
        self.turns = {p.worker: _Turn(p, self.memory[p.process]) for p in self.programs.programs}
        for turn in self.turns.values():
            for feed in turn.program.feeds:
                value = leaves[feed.leaf] if feed.leaf >= 0 else drawn[feed.draw]
                piece = value if feed.dim < 0 else value.narrow(feed.dim, feed.start, feed.length)
                for dim, start, length in feed.also:
                    piece = piece.narrow(dim, start, length)
                turn.registers[feed.register] = piece
        waiting = list(self.turns.values())
        while waiting:
            self.dice.shuffle(waiting)
            assert any([self._advance(turn, learning_rate) for turn in waiting]), "deadlock"
            waiting = [turn for turn in waiting if turn.current is not None]
        return self._end()

    def _end(self) -> dict[int, torch.Tensor]:
        assert not self.mail, f"messages left: {list(self.mail)}"
        losses: dict[int, torch.Tensor] = {}
        for turn in self.turns.values():
            kept = {turn.program.loss, *turn.program.buffers.values()} - {""}
            assert set(turn.registers) == kept, f"registers left: {set(turn.registers) ^ kept}"
            if turn.program.loss:
                losses[turn.program.process] = turn[turn.program.loss].clone()
        for turn in self.turns.values():
            for name, register in turn.program.buffers.items():
                turn.memory[f"b:{name}"].copy_(turn[register])
        return losses

    def _advance(self, turn: _Turn, learning_rate: float) -> bool:
        instruction = turn.current
        if instruction is None:
            return False
        if isinstance(instruction, COLLECTIVES):
            members = [self.turns[index] for index in instruction.group]
            if any(getattr(member.current, "key", None) != instruction.key for member in members):
                return False
            self._meet(instruction, members)
            return True
        if isinstance(instruction, Await):
            brought = self.begun.get(instruction.key, {})
            if len(brought) < len(instruction.collective.group):
                return False
            members = [brought[index] for index in instruction.collective.group]
            for register, parts in zip(instruction.collective.registers, zip(*members, strict=True), strict=True):
                turn.registers[register] = torch.stack(parts).sum(0)
            turn.position += 1
            return True
        if isinstance(instruction, Recv):
            sent = self.mail.pop((instruction.peer, turn.program.worker, instruction.key), None)
            if sent is None:
                return False
            self._receive(turn, instruction, sent)
        else:
            self._alone(turn, instruction, learning_rate)
        turn.position += 1
        return True

    def _receive(self, turn: _Turn, instruction: Recv, value: torch.Tensor) -> None:
        assert (tuple(value.shape), value.dtype) == (instruction.spec.shape, instruction.spec.dtype), instruction
        if instruction.register.startswith("p:"):
            turn[instruction.register].copy_(value)
        else:
            turn.registers[instruction.register] = value

    def _alone(self, turn: _Turn, instruction: Instruction, learning_rate: float) -> None:
        if isinstance(instruction, Run):
            segment = self.programs.segments[instruction.segment]
            inputs = [turn[register] for register in instruction.inputs]
            assert [(tuple(v.shape), v.dtype) for v in inputs] == [(s.shape, s.dtype) for s in segment.input_specs]
            with torch.no_grad():
                results = segment.module(*inputs)
            assert [(tuple(v.shape), v.dtype) for v in results] == [(s.shape, s.dtype) for s in segment.output_specs]
            for register, value, add in zip(instruction.outputs, results, instruction.accumulate, strict=True):
                summed = add and register in turn.registers
                turn.registers[register] = turn.registers[register] + value if summed else value
        elif isinstance(instruction, Start):
            registers = instruction.collective.registers
            # Nobody may read them before they are awaited.
            brought = [turn.registers.pop(register).clone() for register in registers]
            self.begun.setdefault(instruction.key, {})[turn.program.worker] = brought
        elif isinstance(instruction, Send):
            value = turn[instruction.register]
            same = self.turns[instruction.peer].program.process == turn.program.process
            self.mail[turn.program.worker, instruction.peer, instruction.key] = value if same else value.clone()
        elif isinstance(instruction, Update):
            for index, part in enumerate(instruction.slices):
                weight = turn.memory[f"p:{part.parameter}"].view(-1)[part.start : part.end]
                weight.sub_(turn[f"g:{instruction.first + index}"].reshape(-1), alpha=learning_rate)
        elif isinstance(instruction, Free):
            for register in instruction.registers:
                del turn.registers[register]

    def _meet(self, first: Any, members: Sequence[_Turn]) -> None:
        results: list[dict[str, torch.Tensor]] = [{} for _ in members]
        if isinstance(first, AllReduce):
            for place in range(len(first.registers)):
                total = _total([m[m.current.registers[place]] for m in members])
                for member, found in zip(members, results, strict=True):
                    names = member.current.outputs or member.current.registers
                    found[names[place]] = total.clone()
        elif isinstance(first, ReduceScatter) and first.parts:
            for member, found in zip(members, results, strict=True):
                found.update(_reduced(member, members))
        elif isinstance(first, ReduceScatter) and first.slices:
            for place, name in enumerate(first.parameters):
                values = [m[m.current.registers[place]].reshape(-1) for m in members]
                total = values[0] if first.replicated[place] else _total(values)
                for parts, member, found in zip(first.slices, members, results, strict=True):
                    for index, part in enumerate(parts, start=member.current.first):
                        if part.parameter == name:
                            found[f"g:{index}"] = total[part.start : part.end].clone()
        elif isinstance(first, ReduceScatter):
            for place in range(len(first.registers)):
                total = _total([m[m.current.registers[place]] for m in members])
                for member, found, piece in zip(members, results, total.split(first.sizes, first.dim), strict=True):
                    found[member.current.outputs[place]] = piece.clone()
        else:
            parts = [m[m.current.register] for m in members]
            assert [part.shape[first.dim] for part in parts] == list(first.sizes)
            whole = torch.cat(parts, first.dim)
            pieces = (
                [whole] * len(members) if isinstance(first, AllGather) else whole.split(first.new_sizes, first.new_dim)
            )
            for member, found, piece in zip(members, results, pieces, strict=True):
                found[member.current.output] = piece.clone()
        for member, found in zip(members, results, strict=True):
            assert member.current.group == first.group
            member.registers.update(found)
            member.position += 1


def _reduced(reader: _Turn, members: Sequence[_Turn]) -> dict[str, torch.Tensor]:
    """The slices of one worker, from what every member has of each gradient."""
    mine = reader.current
    assert isinstance(mine, ReduceScatter)
    sums: dict[str, torch.Tensor] = {}
    for place, name in enumerate(mine.parameters):
        total = torch.zeros(mine.storages[place], dtype=mine.specs[place].dtype)
        for member, box in zip(members, mine.parts[place], strict=True):
            if box is not None:
                assert isinstance(member.current, ReduceScatter)
                box.of(total).add_(member[member.current.registers[place]])
        sums[name] = total.reshape(-1)
    own = mine.slices[mine.group.index(reader.program.worker)]
    places = enumerate(own, start=mine.first)
    return {f"g:{index}": sums[part.parameter][part.start : part.end].clone() for index, part in places}


def _total(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(values[1:], values[0]).to(values[0].dtype)


def plain_steps(model: nn.Module, loss: Loss, batches: Sequence[Any], learning_rate: float) -> list[float]:
    """The same steps by plain PyTorch, in place on `model`; returns the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def captured(case: Case, rows: int) -> tuple[nn.Module, Graph, list[Any]]:
    """A model, its graph, and two batches."""
    torch.manual_seed(3)
    model = case.make()
    batches = [case.batch(rows), case.batch(rows)]
    return model, capture(model, case.loss, batches[0]), batches


def read_parameters(programs: ProgramSet, process: int) -> set[str]:
    """Parameters and buffers that a worker of the process reads."""
    return {
        register[2:]
        for program in programs.programs
        if program.process == process
        for instruction in program.instructions
        if isinstance(instruction, Run)
        for register in instruction.inputs
        if register[:2] in ("p:", "b:")
    }
