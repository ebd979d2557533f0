"""Runners: one model with its optimizer, one way to run its training step.

`GraphRunner` executes the programs of a plan; `BlockRunner` is plain PyTorch on the whole batch, the fallback for what
cannot be captured and the baseline that every plan must beat.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from partita.arguments import told
from partita.errors import InputError, PlanError
from partita.graph.graph import Graph, InputKind
from partita.plan import Plan
from partita.program import ProgramSet, Timeline, check, lower
from partita.program.instructions import Slice
from partita.program.ownership import UpdateCosts
from partita.runtime.allocator import give_back_freed_memory
from partita.runtime.binding import NORM_EPSILON
from partita.runtime.engine import Engine, State
from partita.runtime.transport import Transport
from partita.training.averages import average_updated
from partita.training.connecting import Connecting, GradientFilter
from partita.training.inputs import BatchLeaves
from partita.training.job import Team
from partita.training.masters import HALF, WholeMasters
from partita.training.optimizers import Kind, OptimizerShards, by_fused_kernels, fused_agrees, kind_of
from partita.training.scaling import LossScale
from partita.training.sync.method import GradientMethod
from partita.training.sync.sums import Sums
from partita.units import fingerprint

LossFn = Callable[[nn.Module, Any], torch.Tensor]
Due = Callable[[dict[str, torch.Tensor], float], list[dict[str, torch.Tensor]]]  # from gradients and the loss


@dataclass(slots=True)  # one is made in every step: a frozen one takes a microsecond more
class Outcome:
    """What one step gave. `bytes_sent` counts messages of this process to others; `norm` is that of all gradients
    before they were clipped, where they are; `error` as of `Sums`."""

    loss: float
    bytes_sent: int = 0
    timeline: Timeline | None = None
    norm: float | None = None
    error: float = 0.0
    sent_to: Mapping[int, int] = field(default_factory=dict)  # bytes, by receiving process

    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and (self.norm is None or math.isfinite(self.norm))


class Runner(Protocol):
    """One way to run a training step."""

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
        """Runs one step on the global batch; without `update` neither parameters nor buffers change, with
        `accumulate_only` its gradients are added to those of the next step instead of being applied; without
        `continues` what was accumulated before is dropped. With `finite_only` no parameter changes if the loss is NaN
        or infinite."""
        ...

    def collect(self) -> None:
        """Brings state and weights into the user's optimizer and model."""
        ...

    def load_state(self) -> None:
        """Takes the optimizer's state from the user's optimizer."""
        ...

    def sync_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the method of synchronisation keeps from step to step, by sum."""
        ...

    def load_sync(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Goes on from the states of sums that this runner has as well."""
        ...

    def close(self) -> None:
        """Ends threads and frees what the runner holds."""
        ...


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
    ) -> None:
        self.graph, self.plan, self.process = graph, plan, process
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
        self._filter = None if connecting is None else GradientFilter(connecting, self.held)
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
        if self._filter is not None:
            self._filter.after_step()
        return outcome

    def _tell(self, transport: Transport, outcome: Outcome, record: bool) -> None:
        """What the process that computes has found, on all."""
        start_s = time.perf_counter()
        told = torch.tensor([outcome.loss, outcome.norm or 0.0, outcome.norm is not None], dtype=torch.float64)
        Team(transport).spread([told], source=self._first)
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

    def take_weights(self) -> None:
        """Takes the parts that this process stores of its own from the user's model."""
        with torch.no_grad():
            for name, box in self.held.items():
                self._stored[name].copy_(box.of(self.parameters[name]))

    def load_state(self) -> None:
        """Takes the state from the user's optimizer."""
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


def apply_due(
    due: Due,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    loss: float,
    decay: float | None = None,
) -> None:
    """Takes the gradients that the parameters have, and applies those that are due instead."""
    made = {name: item.grad for name, item in parameters.items() if item.grad is not None}
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        found = due(made, loss)
    for gradients in found:
        apply_gradients(optimizer, parameters, gradients, decay)


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, torch.Tensor],
    decay: float | None = None,
) -> None:
    """One step of the optimizer, by its fused kernels if it has some that agree, with these gradients; and of the
    average of the weights, if there is one."""
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.to(parameters[name].dtype)
    with by_fused_kernels(optimizer) if fused_agrees(optimizer) else contextlib.nullcontext():
        optimizer.step()
    if decay is not None:
        average_updated(optimizer, decay)
    optimizer.zero_grad(set_to_none=True)


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


class BlockRunner:
    """Plain PyTorch: forward, backward and the user's own optimizer on the whole batch, as one block. The optimizer
    steps by fused kernels if it has some that agree.

    In a job of several processes rank 0 computes; the others wait for the loss and receive the weights on demand.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        compiled: bool = False,
        num_threads: int,
        process: int = 0,
        transport: Transport | None = None,
        due: Due | None = None,
        clip_norm: float | None = None,
        decay: float | None = None,
        masters: bool = False,
        scale: LossScale | None = None,
        connecting: Connecting | None = None,
    ) -> None:
        self._filter = None if connecting is None else GradientFilter(connecting, {})
        self.model, self.optimizer, self._due = model, optimizer, due
        self._clip_norm, self._decay, self._scale = clip_norm, decay, scale
        self._masters = WholeMasters(optimizer, decay) if masters else None
        self.num_threads = num_threads
        self.process, self.transport = process, transport
        scaled = loss_fn if scale is None else scale.of(loss_fn)
        self._loss = torch.compile(scaled, dynamic=False) if compiled else scaled
        self._is_fused = fused_agrees(optimizer)
        self._has_accumulated = False  # whether parameters have gradients that were not applied

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
        if leaves.offsets:
            raise InputError(
                "a block of plain PyTorch needs all rows of the batch, but partita.data.sharded read those of this "
                "process only; pass the loader's batches as they are"
            )
        told = torch.zeros(2, dtype=torch.float64)  # loss, and the norm of the gradients
        if self.process == 0:
            with _threads(self.num_threads):
                told = self._compute(batch, update, accumulate_only, continues, finite_only)
        if self.transport is not None:
            Team(self.transport).spread([told])
        loss, norm = told.tolist()
        knows_norm = self._clip_norm is not None or self._scale is not None
        return Outcome(
            loss / (1.0 if self._scale is None else self._scale.value),
            norm=norm if knows_norm and not accumulate_only else None,
        )

    def _compute(
        self, batch: Any, update: bool, accumulate_only: bool, continues: bool, finite_only: bool
    ) -> torch.Tensor:
        saved = None if update else [buffer.clone() for buffer in self.model.buffers()]
        kept = None if update else [parameter.grad for parameter in self.model.parameters()]
        if not self._has_accumulated or not continues or not update:
            self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.model, batch)
        if not isinstance(loss, torch.Tensor):
            raise InputError(
                f"loss_fn must return a scalar tensor, but got {told(loss)}. Return the tensor itself, without .item() "
                "or float()."
            )
        if loss.dim() != 0 or not loss.requires_grad:
            raise InputError(
                f"loss_fn must return a scalar tensor that depends on the model's parameters, but got shape "
                f"{tuple(loss.shape)} with requires_grad={loss.requires_grad}"
            )
        norm, is_finite = 0.0, math.isfinite(loss.item())
        if is_finite or not (accumulate_only and finite_only):  # gradients of NaN would spoil the others
            loss.backward()
        if accumulate_only:
            self._has_accumulated = True
        else:
            norm = self._apply(loss.item(), update, finite_only)
        if saved is not None and kept is not None:
            with torch.no_grad():
                for buffer, old in zip(self.model.buffers(), saved, strict=True):
                    buffer.copy_(old)
            for parameter, gradient in zip(self.model.parameters(), kept, strict=True):
                parameter.grad = gradient
        return torch.tensor([loss.item(), norm], dtype=torch.float64)

    def _apply(self, loss: float, update: bool, finite_only: bool) -> float:
        """Unscales, clips and applies the gradients that parameters have; their norm before they were clipped."""
        if self._filter is not None:
            self._filter.whole(dict(self.model.named_parameters()))
        gradients = self._taken()
        norm = self._clipped(list(gradients.values()))
        applies = update and (not finite_only or (math.isfinite(loss) and math.isfinite(norm)))
        if not applies:
            self.optimizer.zero_grad(set_to_none=True)
        elif self._masters is not None:
            with by_fused_kernels(self._masters.optimizer) if self._is_fused else contextlib.nullcontext():
                self._masters.step(gradients)
        elif self._due is not None:
            apply_due(self._due, self.optimizer, dict(self.model.named_parameters()), loss, self._decay)
        else:
            with by_fused_kernels(self.optimizer) if self._is_fused else contextlib.nullcontext():
                self.optimizer.step()
            if self._decay is not None:
                average_updated(self.optimizer, self._decay)
        self._has_accumulated = self._has_accumulated and not update
        return norm

    def _taken(self) -> dict[int, torch.Tensor]:
        """The gradients, by identity of the parameter; wide ones for masters."""
        found = {id(item): item.grad for item in self.model.parameters() if item.grad is not None}
        if self._masters is None:
            return found
        return {key: gradient.float() if gradient.dtype in HALF else gradient for key, gradient in found.items()}

    @torch.no_grad()
    def _clipped(self, gradients: list[torch.Tensor]) -> float:
        """Unscales and clips gradients in place, as `torch.nn.utils.clip_grad_norm_` does; the norm before."""
        if self._scale is not None and gradients:
            torch._foreach_mul_(gradients, 1 / self._scale.value)
        if (self._clip_norm is None and self._scale is None) or not gradients:
            return 0.0
        norm = float(nn.utils.get_total_norm(gradients))
        factor = math.inf if self._clip_norm is None else self._clip_norm / (norm + NORM_EPSILON)
        if factor < 1:
            torch._foreach_mul_(gradients, factor)
        return norm

    def collect(self) -> None:
        """The user's optimizer holds its own state."""

    def load_state(self) -> None:
        """The user's optimizer holds its own state."""
        if self._masters is not None:
            self._masters.load()

    def take_weights(self) -> None:
        """The user's model holds the weights."""

    def sync_states(self) -> dict[str, dict[str, torch.Tensor]]:
        return {}  # one process computes: nothing is summed

    def load_sync(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """There is nothing to go on with."""

    def close(self) -> None:
        """Nothing runs between steps."""


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def owners_differ(old: GraphRunner | BlockRunner, new: GraphRunner | BlockRunner) -> bool:
    """Whether parameters live on other processes under the new programs."""
    if isinstance(old, GraphRunner) and isinstance(new, GraphRunner) and not (old.held or new.held):
        return owners_of(old.programs) != owners_of(new.programs)
    return True
