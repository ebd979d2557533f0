"""Random small program sets of every instruction, that can neither deadlock nor round.

A program set is written down move by move, in one order for all workers: a collective is appended to the programs of
all its members at once, a message is sent now and received a few moves later, a sum in the background begun now and
awaited later. That order itself is an execution to the end, so whatever stops at run time is the runtime's fault.

All values are whole numbers, and a bound of each is known while the programs are written: before a sum could pass what
its dtype holds exactly, the addends are reduced modulo `MODULUS`. So every sum is exact in any order, and a
result is right or wrong, not near.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.random_segments import EXACT, MODULUS, both, digest, make_segment, mix, same, slope, turn, wrap
from partita.graph.graph import Phase
from partita.plan import Plan, Worker
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Clip,
    Feed,
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
    SumSquares,
    TensorSpec,
    Update,
)
from partita.program.uses import SQUARE

WIDTHS = (1, 3, 5, 700)  # of dim 1: sums that every member forms itself, and sums by ranges
MAX_ELEMENTS = 20_000
SHAPES = ((7,), (4, 3), (40, 300))  # of parameters


def next_parameter(old: Tensor, gradient: Tensor) -> Tensor:
    """The optimizer of these programs: a step that another order or another gradient would not give."""
    return torch.remainder(5 * old + 3 * gradient, MODULUS)


@dataclass(frozen=True)
class Case:
    """A program set with what it starts from.

    `parameters` and `buffers` are by process; `leaves` are the batch's.
    """

    programs: ProgramSet
    parameters: dict[int, dict[str, Tensor]]
    buffers: dict[int, dict[str, Tensor]]
    leaves: list[Tensor]

    @property
    def num_instructions(self) -> int:
        return sum(len(program.instructions) for program in self.programs.programs)


def make_case(seed: int, *, num_processes: int, num_moves: int = 14) -> Case:
    """The case of a seed: the same in every process that asks for it.

    Example:
        >>> first, second = (make_case(3, num_processes=2) for _ in range(2))
        >>> [p.instructions for p in first.programs.programs] == [p.instructions for p in second.programs.programs]
        True
    """
    rng = random.Random(seed)
    num_workers = rng.randint(num_processes, 4)
    extra = [rng.randrange(num_processes) for _ in range(num_workers - num_processes)]
    author = Author(rng, sorted([*range(num_processes), *extra]))
    for _ in range(num_moves):
        author.move()
    return author.finish()


def plan_of(programs: Sequence[Program], cores: Sequence[int] | None = None) -> Plan:
    """A core for each worker; without `cores`, whatever there are: more workers than cores are part of a trial."""
    workers = tuple(
        Worker(
            index=p.worker,
            process=p.process,
            machine=0,
            cores=(cores[p.worker],) if cores else (),
            stage=0,
            data=p.worker,
        )
        for p in programs
    )
    return Plan(
        mode="graph",
        graph_fingerprint="",
        cluster_fingerprint="",
        axes={"data": len(workers)},
        workers=workers,
        threads_per_worker=1,
    )


# Moves ---------------------------------------------------------------------------------------------------------------


@dataclass
class Value:
    """What is known of a register: its spec, a bound of its entries, whether it was read, and whether it may grow."""

    spec: TensorSpec
    bound: int
    read: bool = True
    frozen: bool = False  # a collective has read it: adding to it afterwards is an error of the program


@dataclass
class Author:
    """Writes the programs of all workers, move by move. `processes[w]` is the process of worker w."""

    rng: random.Random
    processes: list[int]
    instructions: list[list[Instruction]] = field(init=False)
    registers: list[dict[str, Value]] = field(init=False)
    feeds: list[list[Feed]] = field(init=False)
    segments: dict[str, Segment] = field(default_factory=dict)
    underway: list[tuple[int, Recv, int]] = field(default_factory=list)  # receiver, instruction, bound
    begun: list[tuple[int, AllReduce, tuple[int, ...]]] = field(default_factory=list)  # member, its sum, bounds
    parameters: dict[str, TensorSpec] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)  # parameters that were updated
    num_names: int = 0

    def __post_init__(self) -> None:
        rng, workers = self.rng, self.workers
        self.instructions = [[] for _ in workers]
        self.registers = [{} for _ in workers]
        self.feeds = [[] for _ in workers]
        self.leaves: list[Tensor] = []
        self.num_microbatches = rng.choice((1, 2, 3))
        for dtype in rng.sample(list(EXACT), rng.randint(1, 3)):
            self._feed(dtype, rng.choice(WIDTHS))
        for index in range(rng.randint(1, 3)):
            dtype = rng.choice((torch.float64, torch.float32))
            self.parameters[f"w{index}"] = TensorSpec(rng.choice(SHAPES), dtype)

    @property
    def workers(self) -> range:
        return range(len(self.processes))

    def _feed(self, dtype: torch.dtype, width: int) -> None:
        """A leaf of the batch, one or more rows of it for each worker and microbatch."""
        rows = self.rng.randint(1, 3)
        leaf, row = len(self.leaves), 0
        for worker in self.workers:
            for k in range(self.num_microbatches):
                name = f"x:{leaf}@{k}"
                self.feeds[worker].append(Feed(name, leaf=leaf, dim=0, start=row, length=rows))
                self.registers[worker][name] = Value(TensorSpec((rows, width), dtype), MODULUS, read=False)
                row += rows
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        self.leaves.append(torch.randint(0, MODULUS, (row, width), generator=generator).to(dtype))

    def name(self, kind: str = "n:") -> str:
        self.num_names += 1
        return f"{kind}{self.num_names}"

    def move(self) -> None:
        """One move, and with it perhaps the arrival of messages."""
        moves = (self.run, self.run, self.accumulate, self.send, self.send, self.all_reduce, self.all_reduce,
                 self.scatter, self.gather, self.turn_around, self.free, self.train, self.begin,
                 self.begin)  # fmt: skip
        self.rng.choice(moves)()
        while self.underway and self.rng.random() < 0.4:
            self._arrive(self.rng.randrange(len(self.underway)))
        while self.begun and self.rng.random() < 0.3:
            self._await(self.rng.randrange(len(self.begun)))

    # One worker --------------------------------------------------------------------------------------------------

    def _any(self, worker: int, suits: Callable[[Value], bool] = lambda value: True) -> str | None:
        names = [name for name, value in self.registers[worker].items() if suits(value)]
        return self.rng.choice(names) if names else None

    def _take(self, worker: int, name: str, *, collective: bool = False) -> Value:
        value = self.registers[worker][name]
        value.read = True
        value.frozen = value.frozen or collective
        return value

    def _run(
        self,
        worker: int,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[str],
        outputs: Sequence[tuple[str, TensorSpec, int]],
        *,
        accumulate: bool = False,
    ) -> None:
        specs = [
            self.parameters[name[2:]] if name.startswith("p:") else self._take(worker, name).spec for name in inputs
        ]
        part = make_segment(function, specs, [spec for _, spec, _ in outputs])
        self.segments.setdefault(part.key, part)
        names = tuple(name for name, _, _ in outputs)
        microbatch = self.rng.randrange(self.num_microbatches)
        flags = (accumulate,) * len(names)
        self.instructions[worker].append(Run(part.key, tuple(inputs), names, Phase.FORWARD, microbatch, 0, flags))
        for name, spec, bound in outputs:
            self.registers[worker][name] = Value(spec, bound)

    def _shrink(self, worker: int, name: str) -> str:
        """A register with the values of `name`, small again."""
        spec = self.registers[worker][name].spec
        small = self.name()
        self._run(worker, wrap, [name], [(small, spec, MODULUS)])
        return small

    def run(self) -> None:
        worker = self.rng.choice(self.workers)
        first = self._any(worker)
        if first is None:
            return
        value = self.registers[worker][first]
        spec, bound = value.spec, value.bound
        target = self._target(worker, spec)
        kind = self.rng.choice(("mix", "same", "turn", "both"))
        if kind == "mix":
            second = self._any(worker, lambda other: other.spec == spec and other.bound + MODULUS < EXACT[spec.dtype])
            self._run(worker, mix, [first, second or self._shrink(worker, first)], [(target, spec, MODULUS)])
        elif kind == "same":
            self._run(worker, same, [first], [(target, spec, bound)])
        elif kind == "turn" and len(spec.shape) == 2:
            turned = TensorSpec(spec.shape[::-1], spec.dtype)
            self._run(worker, turn, [first], [(self._target(worker, turned), turned, bound)])
        elif kind == "both" and spec.dtype != torch.bfloat16:  # squares are too large for it
            first = self._shrink(worker, first)
            self._run(worker, both, [first], [(self.name(), spec, MODULUS + 1), (self.name(), spec, 7)])

    def _target(self, worker: int, spec: TensorSpec) -> str:
        """A new register, or one that is overwritten."""
        own = self._any(worker, lambda value: value.read and value.spec == spec)
        return own if own and own.startswith("n:") and self.rng.random() < 0.3 else self.name()

    def accumulate(self) -> None:
        """Add to a register several times, where a message may be sent in between."""
        worker = self.rng.choice(self.workers)
        source = self._any(worker)
        if source is None:
            return
        source = self._shrink(worker, source)
        spec = self.registers[worker][source].spec
        total = self._any(worker, lambda value: value.spec == spec and not value.frozen)
        name, bound = total or "", self.registers[worker][total].bound if total else 0
        if not name.startswith("n:") or name == source:
            name, bound = self.name(), 0
        for _ in range(self.num_microbatches):
            bound += MODULUS
            if bound > EXACT[spec.dtype]:
                return
            self._run(worker, same, [source], [(name, spec, bound)], accumulate=True)
            if self.rng.random() < 0.3:
                self._send(worker, name)

    def free(self) -> None:
        worker = self.rng.choice(self.workers)
        name = self._any(worker, lambda value: value.read)
        if name is not None and len(self.registers[worker]) > 1:
            self._free(worker, [name])

    def _free(self, worker: int, names: Sequence[str]) -> None:
        self.instructions[worker].append(Free(tuple(names)))
        for name in names:
            del self.registers[worker][name]

    # Messages ----------------------------------------------------------------------------------------------------

    def send(self) -> None:
        worker = self.rng.choice(self.workers)
        name = self._any(worker)
        if name is not None:
            self._send(worker, name)

    def _send(self, worker: int, name: str) -> None:
        others = [other for other in self.workers if other != worker]
        if not others:
            return
        value, peer, key = self._take(worker, name), self.rng.choice(others), self.name("m")
        self.instructions[worker].append(Send(name, peer, key, value.spec))
        self.underway.append((peer, Recv(self.name(), worker, key, value.spec), value.bound))

    def _arrive(self, index: int) -> None:
        worker, receive, bound = self.underway.pop(index)
        self.instructions[worker].append(receive)
        self.registers[worker][receive.register] = Value(receive.spec, bound, read=False)

    # Collectives -------------------------------------------------------------------------------------------------

    def _group(self) -> tuple[int, ...]:
        """Some workers, in any order."""
        return tuple(self.rng.sample(self.workers, self.rng.randint(1, len(self.workers))))

    def _alike(
        self, group: Sequence[int], alike: Callable[[TensorSpec, TensorSpec], bool] = operator.eq
    ) -> list[str] | None:
        """A register of each member such that their specs are alike."""
        first = self._any(group[0])
        if first is None:
            return None
        wanted = self.registers[group[0]][first].spec
        found = [first, *(self._any(member, lambda value: alike(value.spec, wanted)) or "" for member in group[1:])]
        return found if all(found) else None

    def _small(self, group: Sequence[int], names: list[str]) -> int:
        """The bound of a sum of the members' registers, which are replaced if it would not be exact."""
        values = [self.registers[member][name] for member, name in zip(group, names, strict=True)]
        if sum(value.bound for value in values) > EXACT[values[0].spec.dtype]:
            names[:] = [self._shrink(member, name) for member, name in zip(group, names, strict=True)]
        taken = [self._take(member, name, collective=True) for member, name in zip(group, names, strict=True)]
        return sum(value.bound for value in taken)

    def all_reduce(self) -> None:
        group, key = self._group(), self.name("c")
        columns: list[tuple[list[str], int]] = []
        for _ in range(self.rng.randint(0, 3)):
            names = self._alike(group)
            twice = names and any(
                name in pair for column, _ in columns for name, *pair in zip(names, column, strict=True)
            )
            if names and not twice:
                columns.append((names, self._small(group, names)))
        in_place = bool(columns) and all(n.startswith("n:") for names, _ in columns for n in names)
        in_place = in_place and self.rng.random() < 0.4
        fresh = [self.name() for _ in columns]
        for place, member in enumerate(group):
            names = [column[place] for column, _ in columns]
            specs = tuple(self.registers[member][name].spec for name in names)
            outputs = () if in_place else tuple(fresh)
            self.instructions[member].append(AllReduce(tuple(names), specs, group, key, outputs))
            for name, spec, (_, bound) in zip(outputs or names, specs, columns, strict=True):
                self.registers[member][name] = Value(spec, bound, frozen=in_place)

    def begin(self) -> None:
        """A sum over processes in the background, of a worker of each; every member awaits it when it likes."""
        homes = sorted(set(self.processes))
        if len(homes) < 2:
            return
        chosen = self.rng.sample(homes, self.rng.randint(2, len(homes)))
        group = tuple(self.rng.choice([w for w in self.workers if self.processes[w] == home]) for home in chosen)
        columns: list[tuple[list[str], int]] = []
        for _ in range(self.rng.randint(1, 3)):
            names = self._alike(group)
            if names is not None:  # copies, which nobody misses until they are awaited
                copies = [self._shrink(member, name) for member, name in zip(group, names, strict=True)]
                columns.append((copies, self._small(group, copies)))
        key = self.name("c")
        for place, member in enumerate(group if columns else ()):
            names = [column[place] for column, _ in columns]
            specs = tuple(self.registers[member].pop(name).spec for name in names)
            collective = AllReduce(tuple(names), specs, group, key)
            self.instructions[member].append(Start(collective))
            self.begun.append((member, collective, tuple(bound for _, bound in columns)))

    def _await(self, index: int) -> None:
        member, collective, bounds = self.begun.pop(index)
        self.instructions[member].append(Await(collective))
        for name, spec, bound in zip(collective.registers, collective.specs, bounds, strict=True):
            self.registers[member][name] = Value(spec, bound, frozen=True)

    def scatter(self) -> None:
        group, key, output = self._group(), self.name("c"), self.name()
        names = self._alike(group)
        if names is None:
            return
        spec = self.registers[group[0]][names[0]].spec
        dim = self.rng.randrange(len(spec.shape))
        sizes = self._split(spec.shape[dim], len(group))
        bound = self._small(group, names)
        for member, name, size in zip(group, names, sizes, strict=True):
            self.instructions[member].append(
                ReduceScatter((name,), (spec,), group, key, outputs=(output,), dim=dim, sizes=sizes)
            )
            self.registers[member][output] = Value(resized(spec, dim, size), bound)

    def _split(self, extent: int, num_parts: int) -> tuple[int, ...]:
        """A random composition of `extent`; parts may be empty."""
        edges = sorted(self.rng.randint(0, extent) for _ in range(num_parts - 1))
        return tuple(high - low for low, high in zip([0, *edges], [*edges, extent], strict=True))

    def _along(self, group: Sequence[int], dim: int) -> tuple[list[str], tuple[int, ...]] | None:
        """Registers that differ along `dim` only, and their extents there."""

        def fits(one: TensorSpec, other: TensorSpec) -> bool:
            return len(one.shape) == len(other.shape) > dim and resized(one, dim, 0) == resized(other, dim, 0)

        names = self._alike(group, fits)
        if names is None:
            return None
        specs = [self.registers[member][name].spec for member, name in zip(group, names, strict=True)]
        if dim >= len(specs[0].shape) or sum(spec.num_elements for spec in specs) > MAX_ELEMENTS:
            return None
        return names, tuple(spec.shape[dim] for spec in specs)

    def gather(self) -> None:
        group, key, output, dim = self._group(), self.name("c"), self.name(), self.rng.randrange(2)
        found = self._along(group, dim)
        if found is None:
            return
        taken = [self._take(member, name, collective=True) for member, name in zip(group, found[0], strict=True)]
        bound = max(value.bound for value in taken)
        for member, name, value in zip(group, found[0], taken, strict=True):
            self.instructions[member].append(AllGather(name, output, value.spec, group, key, dim, found[1]))
            self.registers[member][output] = Value(resized(value.spec, dim, sum(found[1])), bound)

    def turn_around(self) -> None:
        group, key, output, dim = self._group(), self.name("c"), self.name(), self.rng.randrange(2)
        found = self._along(group, dim)
        if found is None or len(self.registers[group[0]][found[0][0]].spec.shape) != 2:
            return
        names, sizes = found
        taken = [self._take(member, name, collective=True) for member, name in zip(group, names, strict=True)]
        new_sizes = self._split(taken[0].spec.shape[1 - dim], len(group))
        bound = max(value.bound for value in taken)
        for member, name, value, new_size in zip(group, names, taken, new_sizes, strict=True):
            self.instructions[member].append(
                AllToAll(name, output, value.spec, group, key, dim, sizes, 1 - dim, new_sizes)
            )
            result = resized(resized(value.spec, dim, sum(sizes)), 1 - dim, new_size)
            self.registers[member][output] = Value(result, bound)

    # Training ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Gradients of parameters that were not updated yet, their sums by slices, the update; perhaps the new
        parameter for a process that has none."""
        chosen = [name for name in self.parameters if name not in self.done and self.rng.random() < 0.7]
        if not chosen:
            return
        everywhere = self.rng.random() < 0.6
        homes = sorted(set(self.processes)) if everywhere else [self.rng.choice(self.processes)]
        group = tuple(worker for worker in self.workers if self.processes[worker] in homes)
        specs = tuple(self.parameters[name] for name in chosen)
        gradients = [self._gradient(group, name) for name in chosen]
        replicated = tuple(replicated for _, replicated in gradients)
        slices = self._slices(group, chosen)
        scatter = ReduceScatter(
            tuple(register for register, _ in gradients), specs, group, self.name("c"), parameters=tuple(chosen),
            slices=slices, replicated=replicated,
        )  # fmt: skip
        clips, frees_first = self.rng.random() < 0.8, self.rng.random() < 0.5  # then sums may take their place
        for member, mine in zip(group, slices, strict=True):
            self.instructions[member].append(scatter)
            if frees_first:
                self._free(member, list(scatter.registers))
            self.instructions[member] += self._clipping(group, mine, scatter.key) if clips else ()
            self.instructions[member].append(Update(mine))
            if not frees_first:
                self._free(member, list(scatter.registers))
            if mine:
                self.instructions[member].append(Free(tuple(f"g:{index}" for index in range(len(mine)))))
        self.done.update(chosen)
        if not everywhere:
            self._share(homes[0], chosen)

    def _clipping(self, group: tuple[int, ...], mine: Sequence[Slice], key: str) -> list[Instruction]:
        """A limit of the norm, which the machine sets so high that values stay whole."""
        registers, square = tuple(f"g:{index}" for index in range(len(mine))), f"q:{key}"
        found: list[Instruction] = [SumSquares(registers, (1.0,) * len(mine), square)]
        if len(group) > 1:
            found.append(AllReduce((square,), (SQUARE,), group, f"{key}:norm"))
        return [*found, Clip(registers, square), Free((square,))]

    def _gradient(self, group: Sequence[int], parameter: str) -> tuple[str, bool]:
        """A register with the members' gradients, and whether it is the same on all of them."""
        register, spec = self.name(), self.parameters[parameter]
        for member in group:
            source = self._any(member)
            assert source is not None, "a worker always has a register"
            self._run(member, slope, [source, f"p:{parameter}"], [(register, spec, MODULUS)])
        if self.rng.random() < 0.7:
            return register, False
        total, key = self.name(), self.name("c")
        for member in group:
            self.instructions[member].append(AllReduce((register,), (spec,), tuple(group), key, (total,)))
            self._free(member, [register])
            self.registers[member][total] = Value(spec, MODULUS * len(group))
        return total, True

    def _slices(self, group: Sequence[int], chosen: Sequence[str]) -> tuple[tuple[Slice, ...], ...]:
        """In each process, every parameter cut over the process's members, in any order; some get nothing."""
        slices: dict[int, list[Slice]] = {member: [] for member in group}
        for process in sorted({self.processes[member] for member in group}):
            members = [member for member in group if self.processes[member] == process]
            for name in chosen:
                start = 0
                sizes = self._split(self.parameters[name].num_elements, len(members))
                for member, size in zip(self.rng.sample(members, len(members)), sizes, strict=True):
                    if size:
                        slices[member].append(Slice(name, start, start + size))
                    start += size
        return tuple(tuple(slices[member]) for member in group)

    def _share(self, home: int, names: Sequence[str]) -> None:
        """Send new parameters to the other processes, after all have updated and nobody reads the old ones."""
        everyone, key = tuple(self.workers), self.name("c")
        for worker in everyone:
            self.instructions[worker].append(AllReduce((), (), everyone, key))
        for process in sorted(set(self.processes) - {home}):
            for name in names:
                sender = self.rng.choice([worker for worker in everyone if self.processes[worker] == home])
                receiver = self.rng.choice([worker for worker in everyone if self.processes[worker] == process])
                key, spec = self.name("m"), self.parameters[name]
                self.instructions[sender].append(Send(f"p:{name}", receiver, key, spec))
                self.instructions[receiver].append(Recv(f"p:{name}", sender, key, spec))

    # The end -----------------------------------------------------------------------------------------------------

    def finish(self) -> Case:
        """Receive what is underway, reduce a digest of everything to the loss, keep what is left as buffers."""
        while self.underway:
            self._arrive(0)
        while self.begun:
            self._await(self.rng.randrange(len(self.begun)))
        everyone, what = tuple(self.workers), TensorSpec((), torch.float64)
        for worker in everyone:
            self._run(worker, digest, list(self.registers[worker]), [("n:loss", what, 1009)])
            self.instructions[worker].append(AllReduce(("n:loss",), (what,), everyone, "loss"))
            fed = [name for name in self.registers[worker] if name.startswith("x:")]
            if fed:
                self._free(worker, fed)
        buffers: dict[int, dict[str, Tensor]] = {process: {} for process in self.processes}
        programs = []
        for worker in everyone:
            kept = {f"{worker}.{name[2:]}": name for name in self.registers[worker] if name != "n:loss"}
            for buffer, name in kept.items():
                spec = self.registers[worker][name].spec
                buffers[self.processes[worker]][buffer] = torch.zeros(spec.shape, dtype=spec.dtype)
            instructions, feeds = tuple(self.instructions[worker]), tuple(self.feeds[worker])
            process = self.processes[worker]
            programs.append(Program(worker, process, 0, instructions, feeds, loss="n:loss", buffers=kept))
        return Case(ProgramSet(tuple(programs), self.segments), self._initial(), buffers, self.leaves)

    def _initial(self) -> dict[int, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        values = {
            name: torch.randint(0, MODULUS, spec.shape, generator=generator).to(spec.dtype)
            for name, spec in self.parameters.items()
        }
        return {process: {name: value.clone() for name, value in values.items()} for process in set(self.processes)}


def resized(spec: TensorSpec, dim: int, extent: int) -> TensorSpec:
    return TensorSpec((*spec.shape[:dim], extent, *spec.shape[dim + 1 :]), spec.dtype)
