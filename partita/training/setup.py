"""What a training step works with and what it gives, and the runner that a plan asks for."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from partita.cluster import Cluster
from partita.cost.sums import EXACT_SUM, SumCost
from partita.errors import NonFiniteLossError
from partita.graph import Graph, capture
from partita.plan import Plan
from partita.program.ownership import UpdateCosts
from partita.runtime.transport import Transport
from partita.training.balance import Balance
from partita.training.block_form import BlockForm
from partita.training.block_runner import BlockRunner
from partita.training.checkpoint.settings import Checkpoints, Stateful
from partita.training.connecting import Connecting
from partita.training.events import StepFacts
from partita.training.graph_runner import GraphRunner
from partita.training.job import Team
from partita.training.keeping import Keeper
from partita.training.optimizers import OptimizerFacts
from partita.training.runner import Due, LossFn, Outcome
from partita.training.scaling import LossScale
from partita.training.sync.choice import Choice
from partita.training.sync.method import GradientMethod

RECORDED_EVERY = 10  # steps, of those that somebody hears of


@dataclass(frozen=True, kw_only=True)
class StepResult(StepFacts):
    """What one step gave. `loss` is that of the whole global batch; `bytes_sent` counts this process' messages, and
    `sent_to` the same by the process that they went to first (sums of many bytes go round a ring).

    `grad_norm`: of all gradients, before they were clipped; None unless `parallelize` has a `clip_grad_norm` or
    `loss_scale`, and where the step only accumulates. `compression_error`: the share of what was to be sent in the step
    that was not, by norms; 0 of an exact sum. `staleness`: by how many steps what was applied last was late.
    `loss_scale`: what the loss was multiplied by for the gradients (None: by nothing); `skipped`: some gradient was
    infinite or NaN with it, so nothing was updated. `exposed_time_s`: the most seconds that a worker of this process
    spent in exchanges with others and waiting for them; `skew`: by how much its busiest worker is busier than the mean;
    None of steps whose instructions were not recorded (`Step.timeline` records all; while somebody subscribes to
    events, one in `RECORDED_EVERY`).
    """


def result_of(outcome: Outcome, **facts: Any) -> StepResult:
    """What a runner's outcome tells the user, besides what the step knows."""
    timeline = outcome.timeline
    if timeline is not None:
        workers = {event.worker for event in timeline.events}
        facts["exposed_time_s"] = max(map(timeline.exposed_time_s, workers), default=0.0)
        facts["skew"] = timeline.skew
    return StepResult(
        loss=outcome.loss,
        bytes_sent=outcome.bytes_sent,
        grad_norm=outcome.norm,
        compression_error=outcome.error,
        sent_to=dict(outcome.sent_to),
        **facts,
    )


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
    sums: SumCost = EXACT_SUM  # what that costs
    choice: Choice | None = None  # why it is that method
    due: Due | None = None  # what the optimizer applies instead of a step's gradients
    clip_norm: float | None = None  # limit of the norm of all gradients
    decay: float | None = None  # of the average of the weights
    costs: UpdateCosts = UpdateCosts()  # noqa: RUF009 - a frozen value: of updates of whole parameters
    masters: bool = False  # whether half-precision parameters have some
    scale: LossScale | None = None  # of the loss
    connecting: Connecting | None = None  # which elements of weights are there; None: all
    blocks: BlockForm | None = None  # the weights of which only blocks are stored; None: there are none
    masked: StepSetup | None = None  # the same without these, for steps whose gradients of all elements are wanted
    explained: tuple[str, ...] = ()  # why it is so, for the plan's reasons
    checkpoints: Checkpoints | None = None
    shares_move: bool = True  # whether rows may be dealt anew while training: not where the plan was given
    tells: bool = True  # whether the step emits `StepFinished`

    @functools.cached_property
    def facts(self) -> OptimizerFacts:
        """What planning needs to know of the optimizer: found by experiments, once."""
        whole = self.due is not None or (self.sync is not None and self.sync.needs_whole_parameters)
        return OptimizerFacts.of(
            self.optimizer,
            whole_parameters=whole,
            clips=self.clip_norm is not None or self.scale is not None,
            averages=self.decay is not None,
            costs=self.costs,
            masters=self.masters,
        )

    def capture(self, batch: Any) -> Graph:
        """The step on a batch as a graph. Raises what `partita.graph.capture` does."""
        loss_fn = self.loss_fn if self.scale is None else self.scale.of(self.loss_fn)
        wide = self.masters or self.scale is not None
        with self.in_form():
            return capture(self.model, loss_fn, batch, wide_gradients=wide)

    def in_form(self) -> contextlib.AbstractContextManager[None]:
        """Meanwhile the model has the weights that are trained: blocks, where there are some."""
        return contextlib.nullcontext() if self.blocks is None else self.blocks.in_place()

    def skips(self, outcome: Outcome, step: int) -> bool:
        """Whether the gradients of a step were too large for the scale of the loss, which is adapted.

        Raises:
            NonFiniteLossError: they have no finite norm, and there is no scale.
        """
        if self.scale is not None:
            self.scale.stepped(is_finite=outcome.is_finite())
            return not outcome.is_finite()
        if self.check_finite != "off" and not outcome.is_finite():
            raise NonFiniteLossError(
                f"the norm of the gradients must be finite, but got {outcome.norm} in step {step}; no parameter was "
                "updated. Look at the batch and the learning rate"
            )
        return False

    def keeper(self, method: object) -> Keeper:
        """Of the step's checkpoints; `method` is how processes are synchronised (None: exactly)."""
        text = "" if method is None else repr(method)
        own: dict[str, Stateful] = {}
        if self.scale is not None:
            own["partita.loss_scale"] = self.scale
        if self.connecting is not None:
            own["partita.connections"] = self.connecting
        ranks = sorted(self.cluster.processes, key=lambda process: process.rank)
        machines = [process.machine for process in ranks[: self.team.num_processes]]
        return Keeper(
            self.model, self.optimizer, self.team, self.transport, self.timeout_s, self.checkpoints, text, machines, own
        )

    def balance(self) -> Balance | None:
        """What deals the rows by the speed of the processes; None if there is one process only."""
        if self.team.is_alone:
            return None

        def make(runner: GraphRunner, plan: Plan) -> GraphRunner | BlockRunner:
            return make_runner(self, plan, runner.graph, self.model, self.optimizer)

        return Balance(self.team, self.cluster, lambda: self.facts, make, moves=self.shares_move)


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
            clip_norm=setup.clip_norm,
            decay=setup.decay,
            masters=setup.masters,
            scale=setup.scale,
            connecting=setup.connecting,
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
        clip_norm=setup.clip_norm,
        decay=setup.decay,
        costs=setup.costs,
        masters=setup.masters,
        scale=setup.scale,
        connecting=setup.connecting,
        blocks=setup.blocks,
    )
