"""`lower`: from a captured graph and a plan to one instruction list per worker.

Pure and deterministic: every process of a job lowers the same plan to the same programs.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from torch import fx

from partita.errors import PlanError
from partita.graph.graph import Graph, InputKind, OutputKind, Phase
from partita.plan import Plan, Worker
from partita.program.boxes import Boxes
from partita.program.exchange import StepEnd
from partita.program.gradients import Result
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Box,
    Feed,
    Free,
    Instruction,
    Program,
    ProgramSet,
    Recv,
    ReduceScatter,
    Run,
    Send,
    TensorSpec,
)
from partita.program.ownership import UpdateCosts
from partita.program.schedule import Task, tasks_of_stage
from partita.program.segments import Level, SegmentStore, cut_task, spec_of
from partita.program.split import TENSOR, Local, Split, forget_splits, split
from partita.program.stages import StageCuts
from partita.program.tasks import LocalTasks, build_tasks, with_plain_results
from partita.program.uses import reads, writes
from partita.sharding import communication
from partita.sharding.placement import dim_of
from partita.units import split_evenly

_PERSISTENT = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT: "c"}


def lower(
    graph: Graph,
    plan: Plan,
    *,
    whole_parameters: bool = False,
    clips: bool = False,
    costs: UpdateCosts = UpdateCosts(),  # noqa: B008 - a frozen value
) -> ProgramSet:
    """One program per worker of `plan`, for one training step on a batch of the graph's shape.

    Args:
        graph: the captured step.
        plan: a plan of mode "graph" for this graph.
        whole_parameters: every parameter is updated by one worker of each process, for optimizers that are not
            element-wise; otherwise parameters are cut anywhere.
        clips: gradients are clipped by the norm of all of them before any parameter is updated.
        costs: of the updates of whole parameters, by which these are shared out.

    Raises:
        PlanError: the plan does not fit the graph, or its microbatches would change the result.
    """
    if plan.mode != "graph":
        raise PlanError(f'only plans of mode "graph" have programs, but got mode {plan.mode!r}')
    kept = _LOWERED.setdefault(graph.module, {})
    key = (msgspec.structs.replace(plan, compiled=False).hash, whole_parameters, clips, costs)
    if key not in kept:
        if len(kept) >= NUM_KEPT:
            del kept[next(iter(kept))]
        kept[key] = _Lowering(graph, plan, whole_parameters, clips, costs).build()
    return kept[key]


# A plan is lowered to be predicted and again to be run, and compiled or not it has the same programs.
_LOWERED: WeakKeyDictionary[fx.GraphModule, dict[object, ProgramSet]] = WeakKeyDictionary()
NUM_KEPT = 16


def forget(graph: Graph, *, keep_programs: bool = False) -> None:
    """Lets go of how the graph was cut, and of the programs that plans were lowered to: of a large model these are tens
    of thousands of nodes. Who runs a program holds it; whoever lowers another plan of the graph later cuts it anew.

    Example:
        >>> programs = lower(graph, plan)
        >>> forget(graph)
    """
    forget_splits(graph)
    if not keep_programs:
        _LOWERED.pop(graph.module, None)


@dataclass(frozen=True)
class _Release:
    """Stands where a bucket of gradients is reduced and applied, until it is known how."""

    bucket: int


class _Lowering:
    def __init__(self, graph: Graph, plan: Plan, whole_parameters: bool, clips: bool, costs: UpdateCosts) -> None:
        self.graph = graph
        self.plan = plan
        self.whole_parameters, self.clips, self.costs = whole_parameters, clips, costs
        self.num_stages = plan.axes.get("pipeline", 1)
        self.num_data = plan.axes.get("data", 1)
        shares = plan.shares or split_evenly(max(graph.batch_size, self.num_data), self.num_data)
        self.cuts = StageCuts(graph, plan.stage_starts)
        if self.cuts.num_stages != self.num_stages:
            raise PlanError(
                f"the pipeline axis must have one stage more than stage_starts has names, but got "
                f"pipeline={self.num_stages} and {len(plan.stage_starts)} names"
            )
        if len(shares) != self.num_data or (graph.batch_size and sum(shares) != graph.batch_size and self.num_data > 1):
            raise PlanError(
                f"shares must give the rows of each of {self.num_data} data coordinates and add up to the "
                f"{graph.batch_size} rows of the batch, but got {shares}"
            )
        self.inputs = {item.node: item for item in graph.inputs}
        self.split: Split = split(
            graph,
            num_microbatches=plan.num_microbatches,
            shares=shares,
            num_tensor=plan.axes.get("tensor", 1),
            seeds=seeds_of(graph, plan),
            rules=plan.rules,
            local_statistics=plan.local_statistics,
        )
        self.store = SegmentStore()
        self.draw_shape = {draw.name: draw.spec.shape for draw in self.split.draws}
        self.tasks: dict[int, LocalTasks] = {}
        self.schedules = [
            tasks_of_stage(plan.schedule, stage, self.num_stages, plan.num_microbatches)
            for stage in range(self.num_stages)
        ]
        self.instructions: dict[int, list[Instruction | _Release]] = {worker.index: [] for worker in plan.workers}
        self.feeds: dict[int, dict[str, Feed]] = {worker.index: {} for worker in plan.workers}
        self.readers: dict[str, list[int]] = defaultdict(list)

    def build(self) -> ProgramSet:
        for worker in self.plan.workers:
            self._prologue(worker)
            for task in self.schedules[worker.stage]:
                self._task(worker, task)
        results = self._results()
        boxes = self._boxes(results)
        _, tasks = self._local(self.plan.workers[0], 0)
        end = StepEnd(
            self.graph,
            self.plan,
            results,
            self.readers,
            boxes,
            whole_parameters=self.whole_parameters,
            costs=self.costs,
            clips=self.clips,
            buckets=tasks.buckets,
        )
        end.build()
        programs = []
        for worker in self.plan.workers:
            instructions: list[Instruction] = []
            for item in self.instructions[worker.index]:
                instructions += end.released[item.bucket][worker.index] if isinstance(item, _Release) else [item]
            instructions += end.programs[worker.index]
            loss, buffers = end.loss.get(worker.index, ""), end.buffers[worker.index]
            kept = {loss, end.square, *buffers.values()}
            programs.append(
                Program(
                    worker=worker.index,
                    process=worker.process,
                    stage=worker.stage,
                    instructions=_with_frees(instructions, self.feeds[worker.index], kept),
                    feeds=tuple(self.feeds[worker.index].values()),
                    loss=loss,
                    buffers=buffers,
                    views=boxes.views(worker),
                    square=end.square,
                )
            )
        result = ProgramSet(tuple(programs), self.store.segments, self.split.draws, held=boxes.held())
        _check_streams(result)
        return result

    def _local(self, worker: Worker, microbatch: int) -> tuple[Local, LocalTasks]:
        if not self.tasks:
            merged = [len(schedule[0].phases) == 2 for schedule in self.schedules]
            modules = list({id(local.module): local.module for local in self.split.locals.values()}.values())
            # Sums over microbatches are there at the end only; and whole parameters are better shared out together.
            # The norm of all gradients is known at the end as well: only their exchange can come before.
            in_buckets = self.plan.num_microbatches == 1 and not self.whole_parameters
            in_buckets &= not self.clips or self.plan.bucket_bytes > 0
            built = build_tasks(
                self.graph,
                modules,
                self.cuts,
                merged,
                self.store,
                in_buckets=in_buckets,
                bucket_bytes=self.plan.bucket_bytes,
            )
            self.tasks = {id(module): tasks for module, tasks in zip(modules, built, strict=True)}
        local = self.split.locals[microbatch, worker.data, worker.tensor]
        return local, self.tasks[id(local.module)]

    def _results(self) -> list[Result]:
        _, tasks = self._local(self.plan.workers[0], 0)
        found = []
        inputs = {item.name: item for item in self.graph.inputs}
        for index, (output, node) in enumerate(zip(self.graph.outputs, tasks.results, strict=True)):
            spec = spec_of(node)
            if output.kind is OutputKind.GRADIENT:  # of the whole parameter, whatever part of it a worker has
                spec = TensorSpec(inputs[output.target].shape, spec.dtype)
            found.append(
                Result(
                    output.kind,
                    output.target,
                    _result_register(index),
                    spec,
                    tasks.result_stage[index],
                    self.split.output_placements[index],
                    self.split.tensor_placements[index],
                )
            )
        return found

    def _boxes(self, results: Sequence[Result]) -> Boxes:
        """Which part of each parameter a worker reads and updates."""
        parameters = {item.node: item for item in self.graph.inputs_of(InputKind.PARAMETER)}
        found: dict[str, dict[int, Box]] = {}
        for worker in self.plan.workers:
            local = self.split.locals[0, worker.data, worker.tensor]
            for node, box in local.boxes.items():
                if node in parameters:
                    found.setdefault(parameters[node].name, {})[worker.index] = box
        shapes = {item.name: item.shape for item in parameters.values()}
        users = {name: set(self.readers[f"p:{name}"]) for name in found}
        for result in results:
            if result.kind is OutputKind.GRADIENT and result.target in users:
                users[result.target] |= {w.index for w in self.plan.workers if w.stage == result.stage}
        return Boxes(self.plan, shapes, found, users)

    # Registers -------------------------------------------------------------------------------------------------

    def _register(self, worker: Worker, local: Local, tasks: LocalTasks, name: str) -> str:
        """The register of a node of a local graph; placeholders get their feed on first use."""
        if tasks.nodes[name].op != "placeholder":
            return f"n:{name}@{local.microbatch}"
        return self._placeholder(worker, local, name)

    def _placeholder(self, worker: Worker, local: Local, name: str) -> str:
        known = self.inputs.get(name)
        if known is not None and known.kind in _PERSISTENT:
            register = f"{_PERSISTENT[known.kind]}:{known.name}"
            if worker.index not in self.readers[register]:
                self.readers[register].append(worker.index)
            return register
        box = local.boxes.get(name)
        if known is not None and known.kind is InputKind.BATCH:
            cuts = _cuts(box, known.shape)
            return self._feed(worker, f"x:{known.leaf}", cuts, local.microbatch, leaf=known.leaf)
        draw = self.split.draw_of.get(name)
        if draw is not None:
            cuts = _cuts(box, self.draw_shape[draw])
            return self._feed(worker, f"d:{draw}", cuts, local.microbatch, draw=draw)
        return f"n:{name}"  # hoisted: computed by the prologue

    def _feed(
        self, worker: Worker, base: str, cuts: Sequence[tuple[int, int, int]], microbatch: int, **source: Any
    ) -> str:
        register = f"{base}@{microbatch}"
        (dim, start, length), *also = cuts
        options = {"dim": dim, "start": start, "length": length, "also": tuple(also), **source}
        feed = Feed(register, **options)
        feeds = self.feeds[worker.index]
        if feeds.setdefault(register, feed) != feed:  # the prologue reads other rows of the same leaf
            register = f"{base}@{microbatch}.{start}"
            feeds[register] = Feed(register, **options)
        return register

    # Tasks -----------------------------------------------------------------------------------------------------

    def _prologue(self, worker: Worker) -> None:
        """Values of the whole batch that every microbatch reads, on the stages that need one of them."""
        if not self.split.prologues or not self._reads_hoisted(worker):
            return
        local = self.split.prologues[worker.data]
        module = with_plain_results(local.module)
        nodes = {node.name: node for node in module.graph.nodes}
        results: Sequence[fx.Node] = module.graph.output_node().args[0]  # type: ignore[assignment]
        name_of = {node.name: f"n:{name}" for name, node in zip(self.split.hoisted, results, strict=True)}

        def register(name: str) -> str:
            return self._placeholder(worker, local, name) if nodes[name].op == "placeholder" else f"n:{name}@p"

        ops = [node for node in module.graph.nodes if node.op == "call_function"]
        for level in cut_task(ops, {}, results, self.store):
            outputs = [register(name) for name in level.outputs] + [name_of[name] for name in level.results]
            self._level(worker, level, register, outputs, Phase.FORWARD, "p")

    def _reads_hoisted(self, worker: Worker) -> bool:
        _, tasks = self._local(worker, 0)
        levels = (levels for (stage, _), levels in tasks.levels.items() if stage == worker.stage)
        read = {name for group in levels for level in group for name in level.inputs}
        return any(name in read for name in self.split.hoisted)

    def _task(self, worker: Worker, task: Task) -> None:
        local, tasks = self._local(worker, task.microbatch)
        key = (worker.stage, task.phases)
        out = self.instructions[worker.index]

        def register(name: str) -> str:
            return self._register(worker, local, tasks, name)

        for transfer in tasks.receives.get(key, ()):
            name = transfer.node.name
            peer = self._peer(transfer.source, worker)
            out.append(Recv(register(name), peer, f"{register(name)}:{worker.stage}", spec_of(transfer.node)))
        sends = tasks.sends.get(key, ())
        for level in tasks.levels[key]:
            indices = [self._index_of_result(tasks, name) for name in level.results]
            outputs = [register(name) for name in level.outputs] + [_result_register(index) for index in indices]
            self._level(worker, level, register, outputs, task.phases[0], str(task.microbatch))
            made = {*level.outputs, *(node.name for node in level.exchanges)}
            for transfer in sends:
                if transfer.node.name in made:
                    name = register(transfer.node.name)
                    peer = self._peer(transfer.target, worker)
                    out.append(Send(name, peer, f"{name}:{transfer.target}", spec_of(transfer.node)))
            out += [_Release(bucket) for bucket in level.releases]

    def _index_of_result(self, tasks: LocalTasks, name: str) -> int:
        return next(index for index, node in enumerate(tasks.results) if node.name == name)

    def _peer(self, stage: int, worker: Worker) -> int:
        """The worker of another stage at the same coordinates of the other axes."""
        return next(
            other.index
            for other in self.plan.workers
            if (other.stage, other.data, other.tensor) == (stage, worker.data, worker.tensor)
        )

    def _group(self, worker: Worker, axis: str) -> tuple[int, ...]:
        """The workers along an axis, of the worker's stage and of its coordinate on the other axis."""
        mates = (other for other in self.plan.workers if other.stage == worker.stage)
        if axis == TENSOR:
            return tuple(other.index for other in mates if other.data == worker.data)
        return tuple(other.index for other in mates if other.tensor == worker.tensor)

    def _level(
        self,
        worker: Worker,
        level: Level,
        register: Callable[[str], str],
        outputs: Sequence[str],
        phase: Phase,
        suffix: str,
    ) -> None:
        out = self.instructions[worker.index]
        if level.segment:
            several = self.plan.num_microbatches > 1
            out.append(
                Run(
                    segment=level.segment,
                    inputs=tuple(register(name) for name in level.inputs),
                    outputs=tuple(outputs),
                    phase=phase,
                    microbatch=0 if suffix == "p" else int(suffix),
                    stage=worker.stage,
                    accumulate=tuple(several and name.startswith(_RESULT) for name in outputs),
                )
            )
        for node in level.exchanges:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            axis = str(node.kwargs["axis"])
            group = self._group(worker, axis)
            key = f"{node.name}@{suffix}:{worker.stage}:{axis}{worker.data if axis == TENSOR else worker.tensor}"
            out.append(_exchange(node, source, register(source.name), register(node.name), group, key))


def _check_streams(programs: ProgramSet) -> None:
    """Every process makes the hoisted draws of the next step itself, so all must know where the last step's stream of
    random numbers ended: each needs a worker on the stage that draws."""
    drawing = {
        program.process
        for program in programs.programs
        for item in program.instructions
        if isinstance(item, Run) and programs.segments[item.segment].random
    }
    idle = {program.process for program in programs.programs} - drawing
    if programs.draws and drawing and idle:
        raise PlanError(
            f"every process must take part in draws of random numbers that depend on data, since others follow them, "
            f"but process {min(idle)} has no worker on the stage that draws; use pipeline=1, or one process"
        )


def seeds_of(graph: Graph, plan: Plan) -> dict[str, dict[str, int]]:
    """The inputs that the plan cuts, by axis and placeholder. Raises `PlanError` where the plan names no input."""
    node_of = {item.name: item.node for item in graph.inputs}
    seeds: dict[str, dict[str, int]] = {}
    for name, by_axis in plan.inputs.items():
        if name not in node_of:
            near = difflib.get_close_matches(name, node_of, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"the plan's inputs must be inputs of the graph, but there is no {name!r}.{hint}")
        for axis, text in by_axis.items():
            dim = dim_of(text)
            if dim is not None and plan.axes.get(axis, 1) > 1:
                seeds.setdefault(axis, {})[node_of[name]] = dim
    return seeds


def _cuts(box: Box | None, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(dim, start, length) of every dim that a box cuts; (-1, 0, 0) if it is the whole."""
    if box is None:
        return [(-1, 0, 0)]
    triples = zip(range(len(shape)), box.starts, box.lengths, strict=True)
    return [(dim, start, length) for dim, start, length in triples if length != shape[dim]] or [(-1, 0, 0)]


_RESULT = "n:result"


def _result_register(index: int) -> str:
    return f"{_RESULT}{index}"


def _exchange(
    node: fx.Node, source: fx.Node, register: str, output: str, group: tuple[int, ...], key: str
) -> Instruction:
    spec, options = spec_of(source), node.kwargs
    if node.target is communication.all_reduce:
        return AllReduce((register,), (spec,), group, key, outputs=(output,))
    if node.target is communication.reduce_scatter:
        return ReduceScatter(
            (register,), (spec,), group, key, outputs=(output,), dim=_int(options["dim"]), sizes=_ints(options["sizes"])
        )
    if node.target is communication.all_gather:
        return AllGather(register, output, spec, group, key, _int(options["dim"]), _ints(options["sizes"]))
    return AllToAll(
        register,
        output,
        spec,
        group,
        key,
        _int(options["dim"]),
        _ints(options["sizes"]),
        _int(options["new_dim"]),
        _ints(options["new_sizes"]),
    )


def _int(value: Any) -> int:
    return int(value)


def _ints(value: Any) -> tuple[int, ...]:
    return tuple(int(item) for item in value)


def _with_frees(
    instructions: Sequence[Instruction], feeds: Mapping[str, Feed], kept: set[str]
) -> tuple[Instruction, ...]:
    """Adds a `Free` after the last use of every register that is not persistent and not in `kept`."""
    last: dict[str, int] = {}
    for index, instruction in enumerate(instructions):
        for register in (*reads(instruction), *writes(instruction)):
            last[register] = index
    frees: dict[int, list[str]] = defaultdict(list)
    for register, index in last.items():
        if register[:2] not in ("p:", "b:", "c:") and register not in kept:
            frees[index].append(register)
    result: list[Instruction] = []
    for index, instruction in enumerate(instructions):
        result.append(instruction)
        if frees[index]:
            result.append(Free(tuple(frees[index])))
    return tuple(result)
