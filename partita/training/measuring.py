"""Measures the parts of a plan on this machine: its segments, as many at a time as it has workers, and its updates.

Nothing of the step is run as a whole, and nothing of the user's is changed: segments are functional, and updates run on
tensors made for the purpose. Segments get the model's own weights and rows of the batch where these are real tensors,
because some kernels are slower on some values; everything in between is made up.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from partita.cost.measure_ops import make_tensor, measure_together, on_pinned_threads, placeholder_bound
from partita.cost.table import CostTable
from partita.graph.graph import Graph, InputKind
from partita.plan import Plan, Worker
from partita.program.instructions import Feed, Program, ProgramSet, Run, Segment, Slice
from partita.runtime.segments import Code, build, fits, with_strides
from partita.training.optimizers import Layout, OptimizerFacts, OptimizerShards
from partita.training.torch_adapter import clone_optimizer

BUDGET_S = 0.9  # for all segments of a plan and its update
TOGETHER_BYTES = 2**30  # of inputs of segments that are kept at the same time
LONGEST_S = 3.0  # a segment estimated to take longer is left to the sum of its ops, whose error is small then
LARGEST_UPDATE_BYTES = 2**28  # parameters of more are not copied to measure their update
NOT_ON_MADE_UP_VALUES = (RuntimeError, IndexError, NotImplementedError)  # then the times of the ops stand for a part
WEIGHT_SCALE = 0.02  # standard deviation of made-up weights: that of common initialisations


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """Real tensors of a step, as far as they are there: by name parameters, buffers and constants; by index the leaves
    of the batch."""

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    leaves: Mapping[int, Tensor] = field(default_factory=dict)

    def of(self, register: str, feeds: Mapping[str, Feed]) -> Tensor | None:
        """The value of a register at the start of the step; None if it is made later or is not there."""
        sources = {"p:": self.parameters, "b:": self.buffers, "c:": self.constants}
        if register[:2] in sources:
            value = sources[register[:2]].get(register[2:])
        else:
            feed = feeds.get(register)
            value = self.leaves.get(feed.leaf) if feed is not None and feed.leaf >= 0 else None
            if value is not None and feed is not None and feed.dim >= 0:
                if feed.start + feed.length > value.shape[feed.dim]:
                    return None
                value = value.narrow(feed.dim, feed.start, feed.length)
                for dim, start, length in feed.also:
                    value = value.narrow(dim, start, length)
        return None if value is None or value.device.type != "cpu" else value.detach()


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One piece of a step: a call for each of the workers that run it, and where its time goes."""

    workers: Sequence[Worker]
    calls: Sequence[Callable[[], object]]
    keep: Callable[..., None]  # takes `time_s`
    num_bytes: int  # of its inputs


class PartMeasurer:
    """Fills a `CostTable` with the times of a plan's segments and updates.

    Args:
        graph: the captured step.
        cost: where the times go.
        values: real tensors of the step.
        facts: of the user's optimizer; without the optimizer itself, updates are left to the formula.
    """

    def __init__(
        self,
        graph: Graph,
        cost: CostTable,
        values: StepValues,
        facts: OptimizerFacts,
    ) -> None:
        self.graph, self.cost, self.values, self.facts = graph, cost, values, facts

    def measure(self, programs: ProgramSet, plan: Plan) -> None:
        """Measure what the table does not know of process 0's part of the plan, in the order of a step: what ran before
        has filled the caches."""
        local = [program for program in programs.programs if program.process == plan.workers[0].process]
        workers = [plan.workers[program.worker] for program in local]
        if any(worker.gpu is not None for worker in workers):
            return
        # Stages of a pipeline are busy in turns: they are measured alone as well.
        counts = sorted({1, len(workers)} if plan.axes.get("pipeline", 1) > 1 else {len(workers)})
        for count in counts:
            parts = self._segments(programs, local, workers[:count], plan)
            if count == len(workers):
                parts = itertools.chain(parts, self._updates(local, workers))
            for group in _groups(filter(_can_run, parts)):
                _measure_group(group, BUDGET_S / len(counts))

    # Segments ----------------------------------------------------------------------------------------------------

    def _segments(
        self, programs: ProgramSet, local: list[Program], workers: list[Worker], plan: Plan
    ) -> Iterator[_Part]:
        """The segments that the table does not know with so many workers at a time."""
        runs = {
            item.segment: (item, program) for program in local for item in program.instructions if isinstance(item, Run)
        }
        for key, (run, program) in runs.items():
            segment = programs.segments[key]
            if self._knows(key, plan, len(workers)) or self._estimate_s(segment, workers[0], plan.compiled) > LONGEST_S:
                continue
            code = build(
                segment, compiled=plan.compiled, device=torch.device("cpu"), num_threads=plan.threads_per_worker
            )
            inputs = [self._inputs(segment, code, run, program) for _ in workers]
            calls = [functools.partial(code.bind(torch.Generator()), *values) for values in inputs]
            keep = functools.partial(
                self.cost.keep_segment_time,
                key,
                num_threads=plan.threads_per_worker,
                compiled=plan.compiled,
                num_active=len(workers),
            )
            num_bytes = sum(value.nbytes for values in inputs for value in values)
            yield _Part(workers=workers, calls=calls, keep=keep, num_bytes=num_bytes)

    def _knows(self, key: str, plan: Plan, count: int) -> bool:
        return self.cost.knows_segment(
            key, num_threads=plan.threads_per_worker, compiled=plan.compiled, num_active=count
        )

    def _estimate_s(self, segment: Segment, worker: Worker, compiled: bool) -> float:
        return self.cost.segment_time_s(segment.module, segment.key, worker, compiled=compiled)

    def _inputs(self, segment: Segment, code: Code, run: Run, program: Program) -> list[Tensor]:
        feeds = {feed.register: feed for feed in program.feeds}
        nodes = [node for node in segment.module.graph.nodes if node.op == "placeholder"]
        inputs = []
        for node, name, strides in zip(nodes, run.inputs, code.strides, strict=True):
            value = self.values.of(name, feeds)
            if value is None or value.shape != node.meta["val"].shape or value.dtype != node.meta["val"].dtype:
                value = made_up(node, is_weight=name.startswith("p:"))
            inputs.append(value if strides is None or fits(value, strides) else with_strides(value, strides))
        return inputs

    # Updates -----------------------------------------------------------------------------------------------------

    def _updates(self, local: list[Program], workers: list[Worker]) -> Iterator[_Part]:
        """The updates of the workers' slices, unless the optimizer is not here or copies would be too large."""
        optimizer = self.facts.optimizer
        layout = {program.worker: program.updates for program in local}
        inputs = {item.name: item for item in self.graph.inputs_of(InputKind.PARAMETER)}
        slices = [part for updates in layout.values() for slices in updates for part in slices]
        names = dict.fromkeys(part.parameter for part in slices)
        num_bytes = sum(torch.Size(inputs[name].shape).numel() * inputs[name].dtype.itemsize for name in names)
        if optimizer is None or self.facts.kind == "coupled" or not slices or num_bytes > LARGEST_UPDATE_BYTES:
            return
        parameters = {
            name: torch.nn.Parameter(torch.zeros(inputs[name].shape, dtype=inputs[name].dtype)) for name in names
        }
        shards = self._shards(optimizer, parameters, layout)
        if shards is None:
            return
        for number in range(max(map(len, layout.values()))):  # the workers make theirs at the same time
            busy = [worker for worker in workers if number < len(layout[worker.index])]
            part = self._update(shards, busy, [layout[worker.index][number] for worker in busy], parameters)
            if part is not None:
                yield part

    def _update(
        self,
        shards: OptimizerShards,
        busy: Sequence[Worker],
        own: Sequence[tuple[Slice, ...]],
        parameters: Mapping[str, torch.nn.Parameter],
    ) -> _Part | None:
        """The update of each busy worker's own slices; None if the table knows it."""
        sizes = [tuple(part.num_elements for part in slices) for slices in own]
        threads = len(busy[0].cores) or 1

        def knows(sizes: tuple[int, ...]) -> bool:
            return self.cost.knows_update(sizes, self.facts.name, num_threads=threads, num_active=len(busy))

        def keep(time_s: float) -> None:
            for item in sizes:
                self.cost.keep_update_time(item, self.facts.name, time_s, num_threads=threads, num_active=len(busy))

        if all(map(knows, sizes)):
            return None
        calls = [_update_call(shards, w.index, slices, parameters) for w, slices in zip(busy, own, strict=True)]
        num_bytes = 4 * sum(map(sum, sizes))
        return _Part(workers=busy, calls=calls, keep=keep, num_bytes=num_bytes)

    def _shards(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, torch.nn.Parameter],
        layout: Layout,
    ) -> OptimizerShards | None:
        """The user's optimizer over other parameters of the same names; None if it does not know all of them."""
        name_of = {id(value): name for name, value in self.values.parameters.items()}
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            names = [name_of.get(id(item), "") for item in group["params"]]
            mine = [parameters[name] for name in names if name in parameters]
            groups.append({**group, "params": mine})
        if sum(len(group["params"]) for group in groups) != len(parameters):
            return None
        clone = clone_optimizer(optimizer, groups)
        whole, masters = self.facts.kind == "parameter", self.facts.masters
        return OptimizerShards(clone, parameters, layout, whole=whole, masters=masters)


def _groups(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Parts one after the other, in groups of the same workers whose inputs fit `TOGETHER_BYTES`."""
    group: list[_Part] = []
    for part in parts:
        is_too_large = sum(item.num_bytes for item in [*group, part]) > TOGETHER_BYTES
        if group and (is_too_large or group[0].workers != part.workers):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _can_run(part: _Part) -> bool:
    """Whether the part runs on its made-up values: one that does not would take its whole group along."""
    try:
        on_pinned_threads([worker.cores for worker in part.workers], part.calls)
    except NOT_ON_MADE_UP_VALUES:
        return False
    return True


def _measure_group(group: Sequence[_Part], budget_s: float) -> None:
    calls = list(zip(*(part.calls for part in group), strict=True))  # by worker
    try:
        times_s = measure_together(calls, [worker.cores for worker in group[0].workers], budget_s=budget_s)
    except NOT_ON_MADE_UP_VALUES:  # other random draws than those of `_can_run`
        return
    for part, time_s in zip(group, times_s, strict=True):
        part.keep(time_s=time_s)


def _update_call(
    shards: OptimizerShards, worker: int, slices: Sequence[Slice], parameters: Mapping[str, torch.nn.Parameter]
) -> Callable[[], object]:
    gradients = [torch.full((part.num_elements,), 1e-3, dtype=parameters[part.parameter].dtype) for part in slices]
    return lambda: shards.update(worker, slices, gradients)


def made_up(node: fx.Node, *, is_weight: bool) -> Tensor:
    """A real tensor for a segment's input, from the FakeTensor in its ``meta["val"]``."""
    spec = node.meta["val"]
    value = make_tensor(spec, placeholder_bound(node))
    return value.mul_(WEIGHT_SCALE) if is_weight and value.is_floating_point() else value
