"""`Step`: the training step that `partita.parallelize` gives: called with a batch, it trains the model by its plan."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from partita.errors import (
    CaptureError,
    InputError,
    NonFiniteLossError,
    PeerLostError,
    StepError,
    WaitTimeoutError,
)
from partita.graph import Graph
from partita.plan import Plan
from partita.program import forget
from partita.program.timeline import Timeline
from partita.runtime.allocator import let_go_of_garbage
from partita.runtime.large_pages import use_large_pages
from partita.training.adapting import Adapter
from partita.training.adopt import Adoption
from partita.training.arguments import check_sync_target
from partita.training.averages import averaged
from partita.training.block_runner import BlockRunner
from partita.training.changing import change_connections, explained
from partita.training.checkpoint.loader import Loaded
from partita.training.checkpoint.saver import Source
from partita.training.collecting import collect_all, copy_state, ownership_of
from partita.training.diagnose import check_before
from partita.training.events import SharesChanged, StepFinished, emit, is_heard
from partita.training.graph_runner import GraphRunner, owners_differ
from partita.training.inputs import BatchKey, BatchLeaves, TakenApart, check_structure, take_apart
from partita.training.loading import ShardedBatch, whole_shape
from partita.training.masked_steps import masked_runner
from partita.training.masters import ExactLoading
from partita.training.optimizers import check_optimizer
from partita.training.runner import Outcome
from partita.training.saved import Saved
from partita.training.setup import RECORDED_EVERY, StepResult, StepSetup, result_of
from partita.training.shares import with_shares
from partita.training.sync.choice import Choice
from partita.training.torch_adapter import mark_stepped
from partita.training.trial import Snapshot
from partita.training.watch import Watch
from partita.units import MIB

CALM_STEPS = 3  # by the adopted plan; afterwards its memory is where it stays
MASKED = "masked, "  # before the state of the model, of runners that make steps of masked weights
LEAST_PAGED_BYTES = 16 * MIB  # of parameters, gradients and states: below, they fit the caches


class Step(Saved):
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
        self._keeper = setup.keeper(setup.sync)
        self._is_accumulating = False  # whether gradients of earlier batches wait for the next update
        self._sync_states: dict[str, dict[str, torch.Tensor]] = {}  # loaded, for the next runner
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
        self._balance = setup.balance()
        self._adapter = Adapter(setup)
        self._adopting_key = (first.key, self._state)
        runner = self._adapter.make(plan, graph) if adoption is None else adoption.next_runner()
        setup.team.meet("the start of training")  # some may compile for longer than a step may wait for them
        self._first = self._runners[self._adopting_key] = runner
        exact = (ExactLoading(setup.optimizer),) if setup.masters else ()
        # Whoever loads a state into his optimizer while training goes on means the shards that do its work.
        self._hooks = (
            *exact,
            setup.optimizer.register_load_state_dict_post_hook(lambda _: self._load_state()),
            setup.optimizer.register_state_dict_pre_hook(lambda _: self._collect_local()),
        )

    @property
    def plan(self) -> Plan:
        """The plan that is run: the adopted one, or until `is_settled` the best one so far."""
        told = [text for text in explained(self._setup, self._adopted) if text not in self._plan.reasons]
        return msgspec.structs.replace(self._plan, reasons=(*self._plan.reasons, *told)) if told else self._plan

    @property
    def is_settled(self) -> bool:
        """Whether a plan is adopted. During the first steps candidates run in turns, and compiled ones come in when
        they are ready; all of these steps train. A given plan is adopted from the beginning."""
        return self._adoption is None

    @property
    def choice(self) -> Choice | None:
        """Which method of synchronisation ``sync="auto"`` has chosen, and why; None where one was given."""
        return self._setup.choice

    @property
    def connections(self) -> Mapping[str, torch.Tensor]:
        """By parameter, which of its elements are there (bool, in its shape), as they are now; empty unless
        `parallelize` was given a method that learns connections."""
        return {} if self._setup.connecting is None else self._setup.connecting.shown

    @property
    def num_steps(self) -> int:
        """Steps made so far, those of a loaded checkpoint included."""
        return self._num_steps

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(self, batch: Any, *, update: bool = True) -> StepResult:
        """Trains one step on the global batch.

        Args:
            batch: of the structure that `parallelize` was given.
            update: False adds the batch's gradients to those of the next batches instead of applying them, as
                ``loss.backward()`` without ``optimizer.step()`` does; those batches must have one shape. `num_steps`
                counts updates. (Divide the loss by their number for the mean over them.)

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
        with self._setup.team.working_alone():
            self._follow(leaves, batch)
            if self._setup.connecting is not None:
                self._setup.connecting.before_step(self._num_steps + 1)
            runner = self._runner(leaves, batch)
        if self._setup.transport is not None:
            self._setup.transport.note(f"step {self._num_steps + 1} with a batch of {leaves.rows} rows")
        try:
            outcome = self._run(runner, leaves, batch, update)
        except (StepError, torch.distributed.DistBackendError) as error:
            self._failure = error
            raise
        if self._setup.check_finite != "off" and not math.isfinite(outcome.loss):
            raise NonFiniteLossError(
                f"the loss must be finite, but got {outcome.loss} in step {self._num_steps + 1}; no parameter was "
                'updated. Look at the batch and the learning rate; check_finite="op" tells which op produced it'
            )
        self._is_accumulating = not update
        scale = None if self._setup.scale is None else self._setup.scale.value
        skipped = update and self._setup.skips(outcome, self._num_steps + 1)
        self._num_steps += update
        if self._record:
            self._timeline = outcome.timeline or self._timeline
        self._mark_stepped()
        if update and self._current is not None:
            change_connections(self._setup, self._current, self._adopted, self._num_steps, skipped=skipped)
        self._move_to_large_pages()
        if self._balance is not None and update and self.is_settled and not self._is_masked:
            with self._setup.team.working_alone():
                self._balance.after_step(runner, outcome.timeline, time.perf_counter() - start_s)
        time_s = time.perf_counter() - start_s
        result = result_of(
            outcome,
            step=self._num_steps,
            step_time_s=time_s,
            num_samples=leaves.rows,
            loss_scale=scale,
            skipped=skipped,
        )
        self._tell(result)
        if update:
            self._keeper.save_if_due(self._num_steps, self.source)
        return result

    def _tell(self, result: StepResult) -> None:
        if self._setup.tells and is_heard():
            emit(StepFinished(**dataclasses.asdict(result), process=self._setup.team.rank))

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
        return runner.rows_needed() if self._balance is None else self._balance.rows_needed(runner)

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
        copy_state(self._setup.model.state_dict(), model, "sync_to")

    def ema_to(self, model: nn.Module) -> None:
        """Copies the average of the weights of `parallelize(ema=...)`, and the buffers, into `model`, on every process.

        Raises:
            InputError: there is no average, or `model` is the trained one or another structure.
        """
        check_sync_target(model)
        if self._setup.decay is None:
            raise InputError("there is no average of the weights: pass parallelize(..., ema=0.999)")
        if model is self._setup.model:
            raise InputError("ema_to must not overwrite the weights that are trained; pass a copy.deepcopy(model)")
        self._collect()
        copy_state(averaged(self._setup.model, self._setup.optimizer), model, "ema_to")

    def close(self) -> None:
        """Ends the workers, and completes a checkpoint that is being written. The model and optimizer keep what was
        trained."""
        self._keeper.close(failed=self._failure is not None)
        if self._failure is None and self._current is not None:
            self._current.collect()
        for hook in self._hooks:
            hook.remove()
        if self._adoption is not None:
            self._adoption.close()
        if self._balance is not None:
            self._balance.close()
        self._adapter.close()
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._current = None
        self._failure = self._failure or StepError("the step is closed; call parallelize again to train on")

    # Inside ----------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._failure is not None:
            raise StepError(f"no further step can be made: {self._failure}") from self._failure

    def take_loaded(self, loaded: Loaded) -> None:
        """Goes on from what was loaded into model and optimizer; what methods of synchronisation keep from step to
        step, where it belongs to the same sums."""
        self._num_steps = loaded.step
        if self._setup.connecting is not None:
            self._setup.connecting.clean(self._setup.optimizer)
        for runner in self._runners.values():
            runner.take_weights()
        if self._setup.masters:  # those of parts of weights were compared with what the parts were before
            self._load_state()
        self._sync_states = loaded.sync
        if self._current is not None:
            self._current.load_sync(self._sync_states)

    def source(self) -> Source:
        """What a checkpoint is written from: everything as it is now, each process with what it has."""
        self._require_open()
        self._collect_local()
        return Source(
            step=self._num_steps,
            model=self._setup.model,
            optimizer=self._setup.optimizer,
            ownership=lambda: ownership_of(self._current, self._setup.team.num_processes),
            collect=self._collect,
            sync=self._current.sync_states() if self._current is not None else self._sync_states,
        )

    def _collect_local(self) -> None:
        """Whoever asks his optimizer for its state means that of the steps made here."""
        if self._current is not None and self._failure is None:
            self._current.collect()

    def _load_state(self) -> None:
        for runner in self._runners.values():
            runner.load_state()

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
            self._runners = {(key, state.replace(before, self._state)): runner
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
            graph = self._setup.capture(batch)
        except CaptureError:
            return False
        self._fresh = graph
        same_constants = graph.constants.keys() == old.constants.keys() and all(
            value is old.constants[name] for name, value in graph.constants.items()
        )
        return graph.fingerprint == old.fingerprint and same_constants

    def _runner(self, leaves: BatchLeaves, batch: Any) -> GraphRunner | BlockRunner:
        if self._is_adopting(leaves) and not self._is_accumulating:
            self._next_of_adoption()
        self._take_shares(leaves)
        key = leaves.key, MASKED * self._is_masked + self._state
        runner = self._runners.get(key)
        if self._is_accumulating and runner is not self._current:
            self._is_accumulating = False
            raise InputError(
                "batches whose gradients are accumulated must have one shape, and the model must not change between "
                "them, but this batch needs another program; the gradients so far are dropped. Update before it"
            )
        if runner is None:
            check_structure(leaves.key, self._first_key)
            runner = self._runners[key] = self._adapt(leaves, batch)
        return self._switch(runner)

    @property
    def _is_masked(self) -> bool:
        """Whether the step that comes is one of masked weights, though others are in blocks."""
        connecting = self._setup.connecting
        if self._setup.masked is None or connecting is None or not connecting.wants_gradients:
            return False
        return self._plan.mode == "graph" or not self.is_settled  # plain PyTorch knows no others

    def _switch(self, runner: GraphRunner | BlockRunner) -> GraphRunner | BlockRunner:
        if runner is not self._current:
            if self._current is not None:  # each runner has its own slices: hand the optimizer's state over
                self._hand_over(self._current, runner)
            else:
                runner.take_weights()
                runner.load_state()
                runner.load_sync(self._sync_states)
            self._current = runner
        return runner

    def _hand_over(self, old: GraphRunner | BlockRunner, new: GraphRunner | BlockRunner) -> None:
        old.collect()
        moves = owners_differ(old, new)
        if moves and not self._setup.team.is_alone:  # another process computes from now on: it needs what others have
            self._collect()
        new.take_weights()
        new.load_state()
        new.load_sync(old.sync_states())
        if isinstance(old, BlockRunner):
            self._setup.optimizer.zero_grad(set_to_none=True)  # nobody else would free these gradients

    def _take_shares(self, leaves: BatchLeaves) -> None:
        """Goes on with the runner that has other shares of the rows, once all processes can."""
        balance, key = self._balance, (leaves.key, self._state)
        if balance is None or balance.coming is None or self._is_accumulating:
            return
        old = self._runners.get(key)
        if old is None or old is not balance.runner or not balance.agree(leaves):
            return
        new = balance.take()
        self._first = new if self._first is old else self._first
        self._switch(new)
        self._runners[key] = new
        old.close()
        self._keep_only(new)  # those for other batch shapes have the old shares
        self._plan = with_shares(self._plan, new.plan.shares)
        emit(SharesChanged(shares=new.plan.shares, step=self._num_steps + 1))

    def _keep_only(self, runner: GraphRunner | BlockRunner) -> None:
        for key in [key for key, other in self._runners.items() if other is not runner]:
            self._runners.pop(key).close()

    def _move_to_large_pages(self) -> None:
        """Once, when everything that lives from step to step has been made."""
        self._num_calm += self.is_settled
        if self._num_calm == CALM_STEPS:
            values = self._setup.model.parameters()
            if 4 * sum(value.nbytes for value in values if value.device.type == "cpu") >= LEAST_PAGED_BYTES:
                use_large_pages()

    # Adoption --------------------------------------------------------------------------------------------------

    @property
    def _adopted(self) -> GraphRunner | BlockRunner | None:
        """The runner of the adopted plan, if there is one."""
        return self._first if self.is_settled else None

    def _is_adopting(self, leaves: BatchLeaves) -> bool:
        usual = (leaves.key, self._state) == self._adopting_key
        return self._adoption is not None and usual and not self._is_masked

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
        self._keep_only(self._first)  # other batch shapes ran by what was best then
        forget(adoption.graph)
        let_go_of_garbage()  # of the candidates that were not adopted
        if self._plan.mode == "block":
            self._watch = None  # plain PyTorch follows by itself
        self._on_adopted(adoption)

    def _run(self, runner: GraphRunner | BlockRunner, leaves: BatchLeaves, batch: Any, update: bool) -> Outcome:
        """Makes the step; while a plan is being adopted, by the next best plan if this one cannot."""
        while self._adoption is not None and self._is_adopting(leaves):
            adoption, start_s = self._adoption, time.perf_counter()
            make = self._try if adoption.is_first_try else self._once
            found = make(runner, leaves, batch, update)
            if not isinstance(found, str):
                if update:  # a turn ends with it
                    adoption.finished(time.perf_counter() - start_s, found.timeline)
                return found
            adoption.failed(found)
            self._next_of_adoption()
            runner = self._switch(self._first)
            if self._is_accumulating:
                self._is_accumulating = False
                raise InputError(
                    f"a candidate plan must not fail between batches whose gradients are accumulated, but: {found}. "
                    "Their gradients are dropped, and another plan is taken: pass these batches again"
                )
        return self._once(runner, leaves, batch, update)

    def _once(self, runner: GraphRunner | BlockRunner, leaves: BatchLeaves, batch: Any, update: bool) -> Outcome:
        if self._setup.check_finite == "op":
            check_before(runner, batch, leaves, self._num_steps + 1, self._collect)
        finite_only = self._setup.check_finite != "off" or self._setup.scale is not None
        records = self._adoption or self._balance
        is_heard_of = self._setup.tells and is_heard() and self._num_steps % RECORDED_EVERY == 0
        record = self._record or is_heard_of or (records is not None and records.records)
        return runner.step(
            batch,
            leaves,
            accumulate_only=not update,
            continues=self._is_accumulating,
            record=record,
            finite_only=finite_only,
        )

    def _try(self, runner: GraphRunner | BlockRunner, leaves: BatchLeaves, batch: Any, update: bool) -> Outcome | str:
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
            outcome = self._once(runner, leaves, batch, update)
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
        if self._setup.masked is not None and self._is_masked:
            return masked_runner(self._setup.masked, self._plan, batch)
        if self._plan.mode == "block":
            return self._first if isinstance(self._first, BlockRunner) else self._adapter.make(self._plan, None)
        prepared = self._adapter.prepared((leaves.key, self._state))
        if prepared is not None:  # the usual batches from now on
            self._plan, self._first = prepared
            self._first_key = leaves.key
            self._keep_only(self._switch(self._first))
            return self._first
        compiled = self._plan.compiled and leaves.key == self._first_key and self._compiles
        return self._adapter.adapt(self._plan, batch, self._fresh, compiled=compiled, num_known=len(self._runners))

    def prepare(self, batch: Any) -> None:
        """Makes ready, beside the steps, for batches like this one (its tensors may be on `meta`), which are the usual
        ones from the first one on. Only for a settled step of one process.

        Raises:
            CaptureError, PlanError: the plan cannot be had for it.
        """
        if self._plan.mode == "graph":
            self._adapter.prepare(self._plan, batch, (take_apart(batch).key, self._state))

    @property
    def is_prepared(self) -> bool:
        """Whether all that is to be prepared is."""
        return self._adapter.is_prepared

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
