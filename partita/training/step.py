"""`Step`: the training step that `partita.parallelize` gives: called with a batch, it trains the model by its plan."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from partita.arguments import path_of
from partita.cluster import Cluster
from partita.errors import (
    CaptureError,
    InputError,
    NonFiniteLossError,
    PeerLostError,
    PlanError,
    StepError,
    WaitTimeoutError,
)
from partita.graph import Graph, capture
from partita.plan import Plan
from partita.program.timeline import Timeline
from partita.runtime.allocator import let_go_of_garbage
from partita.runtime.large_pages import use_large_pages
from partita.runtime.transport import Transport
from partita.training.adopt import Adoption
from partita.training.arguments import check_sync_target
from partita.training.checkpoint import read_checkpoint, write_checkpoint
from partita.training.collecting import collect_all
from partita.training.diagnose import first_non_finite
from partita.training.events import Checkpointed, StepFinished, WarningRaised, emit, is_heard
from partita.training.inputs import BatchKey, BatchLeaves, TakenApart, check_structure
from partita.training.job import Team
from partita.training.loading import ShardedBatch, whole_shape
from partita.training.optimizers import OptimizerFacts, check_optimizer
from partita.training.planning import TooFewRowsError, adapted_plan, block_plan
from partita.training.runners import BlockRunner, Due, GraphRunner, LossFn, Outcome, owners_differ
from partita.training.sync.method import GradientMethod
from partita.training.torch_adapter import mark_stepped
from partita.training.trial import Snapshot
from partita.training.watch import Watch
from partita.units import MIB

CALM_STEPS = 3  # by the adopted plan; afterwards its memory is where it stays
LEAST_PAGED_BYTES = 16 * MIB  # of parameters, gradients and states: below, they fit the caches
MAX_GRAPHS = 8  # batch shapes and states of the model that are captured; further ones run as one block


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step gave. `loss` is that of the whole global batch; `bytes_sent` counts this process' messages."""

    loss: float
    step: int
    step_time_s: float
    num_samples: int
    bytes_sent: int

    @property
    def samples_per_s(self) -> float:
        return self.num_samples / self.step_time_s if self.step_time_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class StepSetup:
    """Everything that a `Step` works with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    cluster: Cluster
    team: Team
    transport: Transport | None
    timeout_s: float
    check_finite: Literal["step", "op", "off"]
    sync: GradientMethod | None = None  # how gradients are summed over processes; None: exactly
    due: Due | None = None  # what the optimizer applies instead of a step's gradients

    @functools.cached_property
    def facts(self) -> OptimizerFacts:
        """What planning needs to know of the optimizer: found by experiments, once."""
        whole = self.due is not None or (self.sync is not None and self.sync.needs_whole_parameters)
        return OptimizerFacts.of(self.optimizer, whole_parameters=whole)


class Step:
    """Trains the model by a plan: ``result = step(batch)``. Made by `partita.parallelize`.

    The model's own parameters are what the workers train, so in a job of one process `model` is always current; with
    several processes `sync_to` collects what other processes hold. Use it as a context manager or call `close`.
    """

    def __init__(
        self,
        setup: StepSetup,
        plan: Plan,
        graph: Graph | None,
        first: BatchLeaves,
        adoption: Adoption | None = None,
        on_adopted: Callable[[Adoption], None] = lambda _: None,
    ) -> None:
        self._setup = setup
        self._adoption, self._on_adopted = adoption, on_adopted
        self._plan = plan
        self._first_key = first.key
        self._num_steps = 0
        self._record = False
        self._timeline: Timeline | None = None
        self._failure: BaseException | None = None
        # A graph is made for one batch shape and one state of everything that the step reads besides parameters.
        watched = plan.mode == "graph" or adoption is not None
        self._watch = Watch(setup.model, setup.loss_fn, setup.optimizer) if watched else None
        self._state = self._watch.token if self._watch else ""
        self._runners: dict[tuple[BatchKey, str], GraphRunner | BlockRunner] = {}
        self._current: GraphRunner | BlockRunner | None = None
        self._fresh: Graph | None = None  # captured in this step
        self._num_calm = 0
        self._take_apart = TakenApart()
        self._compiles = False  # whether the next graph is worth compiling
        self._overflow: BlockRunner | GraphRunner | None = None
        self._adopting_key = (first.key, self._state)
        runner = self._make(plan, graph) if adoption is None else adoption.next_runner()
        self._first = self._runners[self._adopting_key] = runner
        # Whoever loads a state into his optimizer while training goes on means the shards that do its work.
        self._hooks = (
            setup.optimizer.register_load_state_dict_post_hook(lambda _: self._load_state()),
            setup.optimizer.register_state_dict_pre_hook(lambda _: self._collect_local()),
        )

    @property
    def plan(self) -> Plan:
        """The plan that is run: the adopted one, or until `is_settled` the best one so far."""
        return self._plan

    @property
    def is_settled(self) -> bool:
        """Whether a plan is adopted. During the first steps candidates run in turns, and compiled ones come in when
        they are ready; all of these steps train. A given plan is adopted from the beginning."""
        return self._adoption is None

    @property
    def num_steps(self) -> int:
        """Steps made so far, those of a loaded checkpoint included."""
        return self._num_steps

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(self, batch: Any) -> StepResult:
        """Trains one step on the global batch.

        Raises:
            InputError: the batch has another structure than the first one, or is empty.
            NonFiniteLossError: the loss is NaN or infinite; no parameter was updated, and training may go on with
                another batch. With ``check_finite="op"`` the message names the first op.
            StepError: a worker or process failed; the message names the root cause.
        """
        self._require_open()
        start_s = time.perf_counter()
        if isinstance(batch, ShardedBatch):
            batch, leaves = whole_shape(batch)
        else:
            leaves = self._take_apart(batch)
        self._follow(leaves, batch)
        runner = self._runner(leaves, batch)
        if self._setup.transport is not None:
            self._setup.transport.note(f"step {self._num_steps + 1} with a batch of {leaves.rows} rows")
        try:
            outcome = self._run(runner, leaves, batch)
        except (StepError, torch.distributed.DistBackendError) as error:
            self._failure = error
            raise
        if self._setup.check_finite != "off" and not math.isfinite(outcome.loss):
            raise NonFiniteLossError(
                f"the loss must be finite, but got {outcome.loss} in step {self._num_steps + 1}; no parameter was "
                'updated. Look at the batch and the learning rate; check_finite="op" tells which op produced it'
            )
        self._num_steps += 1
        if self._record:
            self._timeline = outcome.timeline or self._timeline
        self._mark_stepped()
        self._move_to_large_pages()
        result = StepResult(
            loss=outcome.loss,
            step=self._num_steps,
            step_time_s=time.perf_counter() - start_s,
            num_samples=leaves.rows,
            bytes_sent=outcome.bytes_sent,
        )
        if is_heard():
            process = self._setup.team.rank
            emit(StepFinished(**dataclasses.asdict(result), process=process))
        return result

    def rows_needed(self, num_rows: int) -> tuple[int, int]:
        """First and last (excluded) row that this process needs of a global batch of `num_rows` rows.

        Exact for the batch size that was planned; for others all rows are asked for.

        Raises:
            StepError: the step is closed or failed.
        """
        self._require_open()
        runner = self._first
        if self._adoption is not None or isinstance(runner, BlockRunner) or runner.graph.batch_size != num_rows:
            return 0, num_rows
        return runner.rows_needed()

    def timeline(self) -> Timeline | None:
        """The measured timeline of the last recorded step. The first call starts recording, so call it, make a step,
        and call it again. None for plans of mode "block" and before the first recorded step."""
        self._record = True
        return self._timeline

    def sync_to(self, model: nn.Module) -> None:
        """Copies the full, current weights and buffers into `model`, on every process.

        Raises:
            InputError: `model` has not the names and shapes of the trained model.
        """
        check_sync_target(model)
        self._collect()
        if model is self._setup.model:
            return
        values = self._setup.model.state_dict()
        own = model.state_dict()
        if {name: value.shape for name, value in values.items()} != {name: value.shape for name, value in own.items()}:
            differing = sorted(set(values) ^ set(own))[:5]
            raise InputError(
                "sync_to needs a module of the same structure, but names or shapes differ "
                f"(e.g. {differing or 'shapes'})"
            )
        model.load_state_dict(values)

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Writes a checkpoint of weights, optimizer, step count and random state; any plan can load it.

        The previous checkpoint stays until the new one is complete. Returns the path of the new one.
        """
        folder = path_of(folder, "the folder of step.save")
        self._collect()
        return save_state(self._setup, folder, self._num_steps)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continues from the latest complete checkpoint in `folder`, whatever plan wrote it.

        Raises:
            CheckpointError: none is complete, or it belongs to another model or optimizer. Nothing was changed.
        """
        folder, start_s = path_of(folder, "the folder of step.load"), time.perf_counter()
        found = read_checkpoint(folder, like=self._setup.model.state_dict(), optimizer=self._setup.optimizer)
        with torch.no_grad():
            own = self._setup.model.state_dict()
            for name, value in found.weights.items():
                own[name].copy_(value)
        for runner in self._runners.values():
            runner.take_weights()
        self._setup.optimizer.load_state_dict(found.optimizer_state)
        torch.set_rng_state(found.extra["random_state"])
        self._num_steps = found.step
        emit(
            Checkpointed(
                action="loaded",
                path=str(folder),
                step=found.step,
                num_bytes=sum(t.numel() * t.element_size() for t in found.weights.values()),
                time_s=time.perf_counter() - start_s,
            )
        )

    def close(self) -> None:
        """Ends the workers. The model and optimizer keep what was trained."""
        if self._failure is None and self._current is not None:
            self._current.collect()
        for hook in self._hooks:
            hook.remove()
        if self._adoption is not None:
            self._adoption.close()
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._current = None
        self._failure = self._failure or StepError("the step is closed; call parallelize again to train on")

    # Inside ----------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._failure is not None:
            raise StepError(f"no further step can be made: {self._failure}") from self._failure

    def _collect_local(self) -> None:
        """Whoever asks his optimizer for its state means that of the steps made here."""
        if self._current is not None and self._failure is None:
            self._current.collect()

    def _load_state(self) -> None:
        for runner in self._runners.values():
            runner.load_state()

    def _make(self, plan: Plan, graph: Graph | None) -> GraphRunner | BlockRunner:
        return make_runner(self._setup, plan, graph, self._setup.model, self._setup.optimizer)

    def _follow(self, leaves: BatchLeaves, batch: Any) -> None:
        """Notices what has changed outside of the graph since the last step, and has the next graph made for it."""
        self._fresh = None
        change = self._watch.changes() if self._watch else None
        if change is None or self._watch is None:
            return
        if change.structural:
            check_optimizer(self._setup.optimizer, dict(self._setup.model.named_parameters()))
        known = self._graph_of((leaves.key, self._state))
        if not change.structural and known is not None and self._has_no_part(known, batch):
            self._watch.ignore(change)
        else:
            self._watch.accept()
            self._settle()  # the candidates are graphs of another state
            if self._watch is None:
                return
        before, self._state = self._state, self._watch.token
        if self._watch.ignores(change):
            self._runners = {(key, self._state if state == before else state): runner
                             for (key, state), runner in self._runners.items()}  # fmt: skip
            self._adopting_key = (self._adopting_key[0], self._state)
        # Modes and frozen layers change once in a while; a number that changes in every step is not worth compiling.
        self._compiles = change.structural or all(name.endswith(".training") for name in change.names)

    def _graph_of(self, key: tuple[BatchKey, str]) -> Graph | None:
        """The captured step that runs for batches of that kind, or may once a plan is adopted."""
        if self._adoption is not None and key == self._adopting_key:
            return self._adoption.graph
        runner = self._runners.get(key)
        return runner.graph if isinstance(runner, GraphRunner) else None

    def _has_no_part(self, old: Graph, batch: Any) -> bool:
        """Whether the step, captured once more, is the one that is known."""
        try:
            graph = capture(self._setup.model, self._setup.loss_fn, batch)
        except CaptureError:
            return False
        self._fresh = graph
        same_constants = graph.constants.keys() == old.constants.keys() and all(
            value is old.constants[name] for name, value in graph.constants.items()
        )
        return graph.fingerprint == old.fingerprint and same_constants

    def _runner(self, leaves: BatchLeaves, batch: Any) -> GraphRunner | BlockRunner:
        if self._is_adopting(leaves):
            self._next_of_adoption()
        runner = self._runners.get((leaves.key, self._state))
        if runner is None:
            check_structure(leaves.key, self._first_key)
            runner = self._adapt(leaves, batch)
            self._runners[leaves.key, self._state] = runner
        return self._switch(runner)

    def _switch(self, runner: GraphRunner | BlockRunner) -> GraphRunner | BlockRunner:
        if runner is not self._current:
            if self._current is not None:  # each runner has its own slices: hand the optimizer's state over
                self._hand_over(self._current, runner)
            else:
                runner.take_weights()
                runner.load_state()
            self._current = runner
        return runner

    def _hand_over(self, old: GraphRunner | BlockRunner, new: GraphRunner | BlockRunner) -> None:
        old.collect()
        moves = owners_differ(old, new)
        if moves and not self._setup.team.is_alone:  # another process computes from now on: it needs what others have
            self._collect()
        new.take_weights()
        new.load_state()
        if isinstance(old, BlockRunner):
            self._setup.optimizer.zero_grad(set_to_none=True)  # nobody else would free these gradients

    def _move_to_large_pages(self) -> None:
        """Once, when everything that lives from step to step has been made."""
        self._num_calm += self.is_settled
        if self._num_calm == CALM_STEPS:
            values = self._setup.model.parameters()
            if 4 * sum(value.nbytes for value in values if value.device.type == "cpu") >= LEAST_PAGED_BYTES:
                use_large_pages()

    # Adoption --------------------------------------------------------------------------------------------------

    def _is_adopting(self, leaves: BatchLeaves) -> bool:
        return self._adoption is not None and (leaves.key, self._state) == self._adopting_key

    def _next_of_adoption(self) -> None:
        """Takes the runner whose turn it is, or the adopted one."""
        assert self._adoption is not None
        self._first = self._runners[self._adopting_key] = self._adoption.next_runner()
        if self._adoption.adopted is not None:
            self._settle()
        else:
            self._plan = self._adoption.plan

    def _settle(self) -> None:
        """Goes on with the best plan that is known."""
        adoption, self._adoption = self._adoption, None
        if adoption is None:
            return
        adoption.conclude()
        assert adoption.adopted is not None
        self._plan = adoption.adopted
        if adoption.runner is not None:
            self._first = self._runners[self._adopting_key] = adoption.runner
        self._switch(self._first)
        adoption.close(keep=self._first)
        for key in [key for key, runner in self._runners.items() if runner is not self._first]:
            self._runners.pop(key).close()  # other batch shapes ran by what was best then
        let_go_of_garbage()  # of the candidates that were not adopted
        if self._plan.mode == "block":
            self._watch = None  # plain PyTorch follows by itself
        self._on_adopted(adoption)

    def _run(self, runner: GraphRunner | BlockRunner, leaves: BatchLeaves, batch: Any) -> Outcome:
        """Makes the step; while a plan is being adopted, by the next best plan if this one cannot."""
        while self._adoption is not None and self._is_adopting(leaves):
            adoption, start_s = self._adoption, time.perf_counter()
            found = self._try(runner, leaves, batch) if adoption.is_first_try else self._once(runner, leaves, batch)
            if not isinstance(found, str):
                adoption.finished(time.perf_counter() - start_s, found.timeline)
                return found
            adoption.failed(found)
            self._next_of_adoption()
            runner = self._switch(self._first)
        return self._once(runner, leaves, batch)

    def _once(self, runner: GraphRunner | BlockRunner, leaves: BatchLeaves, batch: Any) -> Outcome:
        if self._setup.check_finite == "op":
            self._check_before(runner, batch, leaves)
        finite_only = self._setup.check_finite != "off"
        record = self._record or (self._adoption is not None and self._adoption.records)
        return runner.step(batch, leaves, record=record, finite_only=finite_only)

    def _try(self, runner: GraphRunner | BlockRunner, leaves: BatchLeaves, batch: Any) -> Outcome | str:
        """A candidate's first step: the reason, with everything as before, if a process cannot make it."""
        assert self._adoption is not None
        saved = Snapshot(self._setup.model, self._setup.optimizer) if self._adoption.can_undo else None
        outcome, error, is_checked = None, "", saved is not None
        try:
            if not is_checked:  # what cannot be undone is made without its updates before
                random_state = torch.get_rng_state()
                try:
                    runner.step(batch, leaves, update=False)
                finally:
                    torch.set_rng_state(random_state)
                is_checked = True
            outcome = self._once(runner, leaves, batch)
        except (NonFiniteLossError, PeerLostError, WaitTimeoutError):
            raise  # no fault of the plan, or nobody is left to go on with
        except Exception as found:
            if saved is None and is_checked:
                raise
            error = f"{type(found).__name__}: {found}"
        errors = [text for text in self._setup.team.gather(error, "the first step of a candidate plan") if text]
        if not errors and outcome is not None:
            return outcome
        if saved is not None:
            saved.restore()
        self._current = None  # whatever the failed runner holds is of no use
        return str(errors[0])

    # Other batches ---------------------------------------------------------------------------------------------

    def _adapt(self, leaves: BatchLeaves, batch: Any) -> GraphRunner | BlockRunner:
        """A runner for another batch shape, or for the same one after something else has changed: the same split,
        captured anew."""
        if self._plan.mode == "block":
            return self._first if isinstance(self._first, BlockRunner) else self._make(self._plan, None)
        if self._overflow is not None:
            return self._overflow
        if len(self._runners) >= MAX_GRAPHS:
            reason = f"more than {MAX_GRAPHS} batch shapes or states of the model were seen"
            self._overflow = self._make(self._block(reason), None)
            return self._overflow
        try:
            graph = self._fresh or capture(self._setup.model, self._setup.loss_fn, batch)
            plan = adapted_plan(self._plan, graph)
            if leaves.key == self._first_key and self._compiles:
                plan = msgspec.structs.replace(plan, compiled=self._plan.compiled)
            return self._make(plan, graph)
        except TooFewRowsError as error:  # the rest of an epoch: nothing that the user should care about
            return self._make(block_plan(self._setup.cluster, graph=None, reasons=(str(error),)), None)
        except (CaptureError, PlanError) as error:
            return self._make(self._block(str(error)), None)

    def _block(self, reason: str) -> Plan:
        message = (
            "from this step on, batches of this kind run as one block of plain PyTorch, which is right but not split: "
            f"{reason}. Pad or bucket batches to few shapes, and pass what changes from step to step as a tensor in "
            "the batch"
        )
        warnings.warn(message, stacklevel=6)
        emit(WarningRaised(subject="batch", message=message))
        return block_plan(self._setup.cluster, graph=None, reasons=(reason,))

    def _check_before(self, runner: GraphRunner | BlockRunner, batch: Any, leaves: BatchLeaves) -> None:
        """Runs the step without its update first, and names the op that made the loss NaN or infinite."""
        random_state = torch.get_rng_state()
        loss = runner.step(batch, leaves, update=False).loss
        torch.set_rng_state(random_state)
        if math.isfinite(loss):
            return
        found = ""
        if isinstance(runner, GraphRunner):
            if runner.held:  # the op is looked for with whole weights
                self._collect()
            found = first_non_finite(runner.graph, runner.parameters, runner.buffers, batch)
            torch.set_rng_state(random_state)
        raise NonFiniteLossError(
            f"the loss must be finite, but got {loss} in step {self._num_steps + 1}; nothing was updated. "
            f"{found or 'The model runs as one block, so the op is not known.'}"
        )

    def _mark_stepped(self) -> None:
        if isinstance(self._current, GraphRunner):
            mark_stepped(self._setup.optimizer)

    def _collect(self) -> None:
        """Makes model and optimizer of every process current."""
        self._require_open()
        team = self._setup.team
        if self._current is not None:
            self._current.collect()
        if team.is_alone:
            return
        collect_all(team, self._setup.model, self._setup.optimizer, self._current)


def save_state(setup: StepSetup, folder: Path, step: int, *, extra: Mapping[str, Any] | None = None) -> str:
    """Has rank 0 write model, optimizer and random state, which are current there, with whatever else; the path."""
    start_s = time.perf_counter()
    path = ""
    if setup.team.rank == 0:
        written = write_checkpoint(
            folder,
            step=step,
            weights=setup.model.state_dict(),
            optimizer_state=setup.optimizer.state_dict(),
            extra={"random_state": torch.get_rng_state(), **(extra or {})},
            optimizer=type(setup.optimizer).__name__,
        )
        path = str(written)
    path = str(setup.team.from_first(path))
    num_bytes = sum(t.numel() * t.element_size() for t in setup.model.state_dict().values())
    emit(Checkpointed(action="saved", path=path, step=step, num_bytes=num_bytes, time_s=time.perf_counter() - start_s))
    return path


def make_runner(
    setup: StepSetup, plan: Plan, graph: Graph | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> GraphRunner | BlockRunner:
    """The runner that a plan asks for. The random state is left as it was: kernels may be measured for it."""
    with torch.random.fork_rng(devices=[]):
        return _runner_of(setup, plan, graph, model, optimizer)


def _runner_of(
    setup: StepSetup, plan: Plan, graph: Graph | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> GraphRunner | BlockRunner:
    if plan.mode == "block":
        return BlockRunner(
            model,
            optimizer,
            setup.loss_fn,
            compiled=plan.compiled,
            num_threads=plan.threads_per_worker,
            process=setup.team.rank,
            transport=setup.transport,
            due=setup.due,
        )
    assert graph is not None
    return GraphRunner(
        graph,
        plan,
        model,
        optimizer,
        process=setup.team.rank,
        transport=setup.transport,
        timeout_s=setup.timeout_s,
        sync=setup.sync,
        due=setup.due,
    )
