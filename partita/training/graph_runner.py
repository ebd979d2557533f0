"""`GraphRunner` executes the programs of a plan."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from partita.errors import InputError, PlanError
from partita.graph.graph import Graph, InputKind
from partita.plan import Plan
from partita.program import ProgramSet, Timeline, check, lower
from partita.program.instructions import Box, Slice
from partita.program.ownership import UpdateCosts
from partita.runtime.allocator import give_back_freed_memory
from partita.runtime.engine import Engine, State
from partita.runtime.transport import Transport
from partita.training.averages import average_updated
from partita.training.block_form import BlockForm
from partita.training.connecting import Connecting, GradientFilter
from partita.training.inputs import BatchLeaves
from partita.training.job import Team
from partita.training.masters import WholeMasters
from partita.training.optimizers import Kind, OptimizerShards, kind_of
from partita.training.runner import Due, Outcome, Runner, apply_due
from partita.training.scaling import LossScale
from partita.training.sync.method import GradientMethod
from partita.training.sync.sums import Sums
from partita.units import fingerprint


def named_state(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """Parameters and buffers by their first names; parameters are made contiguous, so that they can be cut."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    return parameters, dict(model.named_buffers())


class GraphRunner:
    """Executes a plan's programs on this process' workers. Where the plan has workers in one process of the job only,
    the others are told the loss once it has made the step.

    Args:
        graph: the captured step for the batch shape that will be given.
        plan: a plan of mode "graph".
        model, optimizer: their own tensors are the storage that the workers share.
        process: rank of this process.
        transport: connection to the other processes of the job; None if there are none.
        timeout_s: limit of every wait.
        compiled: overrides the plan's choice.
        sync: how gradients are summed over processes; None: exactly.
        due: what the optimizer is to apply instead of a step's gradients, one after the other, by parameter's name.
        clip_norm: limit of the norm of all gradients; None: they are not clipped.
        decay: of the average of the weights; None: there is none.
        costs: of updates of whole parameters.
        masters: half-precision parameters are updated by float32 masters; the graph has wide gradients.
        scale: what the graph's loss is multiplied by; None: by nothing.
        connecting: says which elements of weights are there; None: all.
        blocks: has the weights of the graph that are in blocks; None: none is.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        process: int = 0,
        transport: Transport | None = None,
        timeout_s: float = 120.0,
        compiled: bool | None = None,
        sync: GradientMethod | None = None,
        due: Due | None = None,
        clip_norm: float | None = None,
        decay: float | None = None,
        costs: UpdateCosts = UpdateCosts(),  # noqa: B008 - a frozen value
        masters: bool = False,
        scale: LossScale | None = None,
        connecting: Connecting | None = None,
        blocks: BlockForm | None = None,
    ) -> None:
        self.graph, self.plan, self.process, self._blocks = graph, plan, process, blocks
        if blocks is not None:
            blocks.check(graph)
            blocks.refresh_groups()
            optimizer = blocks.optimizer
        with contextlib.nullcontext() if blocks is None else blocks.in_place():
            self.parameters, self.buffers = named_state(model)
        for item in graph.inputs_of(InputKind.BUFFER):  # a frozen parameter that the step changes is one as well
            if item.name not in self.buffers:
                self.buffers[item.name] = self.parameters[item.name].detach()
        self.optimizer = optimizer
        self._settled = False  # whether there was an update
        self._due, self._clip_norm, self._decay, self._scale = due, clip_norm, decay, scale
        self.kind: Kind = kind_of(optimizer) if due is None else "coupled"
        needs_whole = self.kind != "element" or (sync is not None and sync.needs_whole_parameters)
        if self.kind == "coupled":  # steps once in every process
            costs = UpdateCosts(time_s=costs.time_s)
        clips = clip_norm is not None or scale is not None
        self.programs: ProgramSet = lower(graph, plan, whole_parameters=needs_whole, clips=clips, costs=costs)
        check(self.programs)
        self.held = dict(self.programs.held.get(process, {}))
        self.users_parts()  # raises if it cannot be
        self._stored = {
            name: nn.Parameter(self.held[name].of(value.detach()).clone(memory_format=torch.contiguous_format))
            if name in self.held
            else value
            for name, value in self.parameters.items()
        }
        if transport is not None:  # rules found by search may differ where caches do: never run unequal programs
            Team(transport).require_equal(digest(self.programs), "programs")
        self._check_coupled()
        layout = updated_slices(self.programs, process)
        self._shards = (
            None
            if self.kind == "coupled"
            else OptimizerShards(
                optimizer,
                self._stored,
                layout,
                whole=self.kind == "parameter",
                parts={name: (self.parameters[name], box) for name, box in self.held.items()},
                decay=decay,
                masters=masters,
            )
        )
        self._whole_masters = WholeMasters(optimizer, decay) if masters and self.kind == "coupled" else None
        self._gradients: dict[int, torch.Tensor] = {}  # of a step, by identity of the parameter, for these
        in_blocks = frozenset() if blocks is None else blocks.names
        self._filter = None if connecting is None else GradientFilter(connecting, self.held, without=in_blocks)
        constants = {item.name: graph.constants[item.name] for item in graph.inputs_of(InputKind.CONSTANT)}
        values = {name: value.detach() for name, value in self._stored.items()}
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        self.sums = None if sync is None else Sums(sync, shapes, process)
        processes = sorted({program.process for program in self.programs.programs})
        self._first = processes[0]
        self._others = transport if transport is not None and len(processes) < transport.num_processes else None
        if self._others is not None and len(processes) > 1:
            raise PlanError(
                f"a plan must have workers in one process or in all {self._others.num_processes}, but it has some in "
                f"{processes}. Start as many processes as the plan has."
            )
        state = State(parameters=values, buffers=dict(self.buffers), constants=constants)
        is_idle = self._others is not None and process != self._first
        self._engine: Engine | None = (
            None
            if is_idle
            else Engine(
                self.programs,
                plan,
                process=process,
                state=state,
                update=self._update,
                transport=transport if self._others is None else None,
                timeout_s=timeout_s,
                compiled=compiled,
                sum_gradients=None if self.sums is None else self.sums.form,
                filter_gradients=self._filter,
            )
        )

    def step(
        self,
        batch: Any,
        leaves: BatchLeaves,
        *,
        update: bool = True,
        accumulate_only: bool = False,
        continues: bool = True,
        record: bool = False,
        finite_only: bool = False,
    ) -> Outcome:
        if self._blocks is not None:
            self._blocks.refresh_groups()
            if self._blocks.is_stale:
                self.take_weights()
        if self._shards is not None:
            self._shards.refresh_options()
        if self._filter is not None:
            self._filter.before_step()
        outcome = Outcome(math.nan)
        if self._engine is not None:
            done = self._engine.step(
                leaves.tensors,
                row_offsets=leaves.offsets,
                update=update,
                commit_buffers=update,
                accumulate_only=accumulate_only,
                continues=continues,
                record=record,
                finite_only=finite_only,
                most_norm=math.inf if self._clip_norm is None else self._clip_norm,
                loss_scale=1.0 if self._scale is None else self._scale.value,
            )
            outcome = Outcome(
                float(done.loss),
                done.bytes_sent,
                done.timeline,
                None if accumulate_only else done.norm,
                0.0 if self.sums is None else self.sums.error,
                done.sent_to,
            )
        if self._others is not None:
            self._tell(self._others, outcome, record)
        if self._engine is None:
            return outcome
        applies = update and not accumulate_only and (outcome.is_finite() or not finite_only)
        if update and not self._settled:
            # The first update made the optimizer's state in the places of tensors of the step, which now find none.
            give_back_freed_memory()
            self._settled = True
        if applies and self.kind == "coupled":
            self._apply(outcome.loss)
        if applies and self._blocks is not None:
            self._blocks.show()
        if self._filter is not None:
            self._filter.after_step()
        return outcome

    def _tell(self, transport: Transport, outcome: Outcome, record: bool) -> None:
        """What the process that computes has found, on all."""
        start_s = time.perf_counter()
        told = torch.tensor([outcome.loss, outcome.norm or 0.0, outcome.norm is not None], dtype=torch.float64)
        Team(transport).tell(told, source=self._first)
        if self._engine is None:
            outcome.loss, norm, knows_norm = told.tolist()
            outcome.norm = norm if knows_norm else None
            if record:
                outcome.timeline = Timeline(events=(), step_time_s=time.perf_counter() - start_s)

    def _apply(self, loss: float) -> None:
        """The step of an optimizer that couples parameters, once all of its gradients are there."""
        if self._whole_masters is not None:
            self._whole_masters.step(self._gradients)
            self._gradients.clear()
        elif self._due is not None:
            apply_due(self._due, self.optimizer, self.parameters, loss, self._decay)
        else:
            self.optimizer.step()
            if self._decay is not None:
                average_updated(self.optimizer, self._decay)
            self.optimizer.zero_grad(set_to_none=True)

    def rows_needed(self) -> tuple[int, int]:
        """First and last (excluded) row of the global batch that this process' workers read."""
        cuts = [
            (feed.start, feed.start + feed.length) if feed.dim == 0 else (0, self.graph.batch_size)
            for program in self.programs.programs
            if program.process == self.process
            for feed in program.feeds
            if feed.leaf >= 0
        ]
        return (min(start for start, _ in cuts), max(end for _, end in cuts)) if cuts else (0, 1)

    def users_parts(self) -> Mapping[int, Mapping[str, Box]]:
        """By process, the parts of the user's parameters that are all it stores of them."""
        if self._blocks is None:
            return self.programs.held
        return {
            process: {name: self._blocks.users_box(name, box) for name, box in held.items()}
            for process, held in self.programs.held.items()
        }

    def buffer_owner(self, name: str) -> int:
        """A process that has the buffer's current value."""
        holders = [program.process for program in self.programs.programs if name in program.buffers]
        return min(holders, default=0)

    def collect(self) -> None:
        """Brings the optimizer's state into the user's optimizer, and parts of weights into the user's model."""
        if self._shards is not None:
            self._shards.collect()
        with torch.no_grad():
            for name, box in self.held.items():
                box.of(self.parameters[name]).copy_(self._stored[name])
        if self._blocks is not None:
            self._blocks.collect()

    def take_weights(self) -> None:
        """Takes what this process stores of its own from the user's model: parts, and blocks."""
        if self._blocks is not None:
            self._blocks.take_weights()
        with torch.no_grad():
            for name, box in self.held.items():
                self._stored[name].copy_(box.of(self.parameters[name]))

    def load_state(self) -> None:
        """Takes the state from the user's optimizer."""
        if self._blocks is not None:
            self._blocks.load_state()
        for held in (self._shards, self._whole_masters):
            if held is not None:
                held.load()

    def sync_states(self) -> dict[str, dict[str, torch.Tensor]]:
        return self.sums.states() if self.sums is not None else {}

    def load_sync(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        if self.sums is not None:
            self.sums.load(states)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _update(self, worker: int, slices: Sequence[Slice], gradients: Sequence[torch.Tensor]) -> None:
        if self._shards is not None:
            self._shards.update(worker, slices, gradients)
            return
        for part, gradient in zip(slices, gradients, strict=True):
            parameter = self.parameters[part.parameter]
            if self._whole_masters is not None:
                self._gradients[id(parameter)] = gradient.view(parameter.shape).clone()
            else:
                parameter.grad = gradient.view(parameter.shape).to(parameter.dtype, copy=True)

    def _check_coupled(self) -> None:
        if self.kind != "element" and any(self.programs.held.values()):
            raise InputError(
                f"{type(self.optimizer).__name__} needs whole parameters, so every process must store them whole, but "
                "the plan cuts some over processes; keep the tensor axis inside a process, drop fully_sharded, or use "
                "an element-wise optimizer"
            )
        processes = {program.process for program in self.programs.programs}
        if self.kind == "coupled" and len(processes) > 1 and self.plan.axes.get("pipeline", 1) > 1:
            raise InputError(
                f"{type(self.optimizer).__name__} couples parameters, so every process must have all gradients, but "
                "the plan spreads stages over processes; use Constraints(pipeline=1) or an element-wise optimizer"
            )


def digest(programs: ProgramSet) -> str:
    """A hash of all instructions and segments, equal on two processes if their programs are."""
    return fingerprint([programs.programs, sorted(programs.segments)])


def updated_slices(programs: ProgramSet, process: int) -> dict[int, tuple[tuple[Slice, ...], ...]]:
    """The slices of each update of the workers of a process."""
    return {program.worker: program.updates for program in programs.programs if program.process == process}


def owners_of(programs: ProgramSet) -> Mapping[str, tuple[int, ...]]:
    """Parameter -> processes that update it, and have its state and its current value after a step."""
    owners: dict[str, set[int]] = {}
    for program in programs.programs:
        for slices in program.updates:
            for part in slices:
                owners.setdefault(part.parameter, set()).add(program.process)
    return {name: tuple(sorted(found)) for name, found in owners.items()}


def owners_differ(old: Runner, new: Runner) -> bool:
    """Whether parameters live on other processes under the new programs."""
    if isinstance(old, GraphRunner) and isinstance(new, GraphRunner) and not (old.held or new.held):
        return owners_of(old.programs) != owners_of(new.programs)
    return True
