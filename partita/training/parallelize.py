"""`parallelize`: capture, plan, measure, adopt; and `plan` for the plan alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from partita.cluster import Cluster
from partita.cluster.job import current_job
from partita.cluster.measure import measure_network
from partita.constraints import refuse_described
from partita.errors import CaptureError, InfeasibleError, InputError, PlanError
from partita.graph import Graph, capture
from partita.plan import Constraints, Plan
from partita.program import forget
from partita.runtime.allocator import keep_freed_memory, let_go_of_garbage
from partita.runtime.segments import CompileWarning
from partita.runtime.transport import Transport
from partita.training.adopt import Adoption
from partita.training.arguments import (
    Found,
    check_decay,
    check_masters,
    check_norm,
    check_planning,
    check_running,
    check_scale,
    check_task,
    wanted_plan,
)
from partita.training.checkpoint.settings import Checkpoints
from partita.training.choosing import choose, shared_sum_cost
from partita.training.combining import check_connections, check_elastic, check_method, wanted_method
from partita.training.connecting import Connecting, Connections
from partita.training.described import described_plan, described_planner, is_described_gpus
from partita.training.elastic import ElasticStep
from partita.training.elastic_fragments import OuterMethod
from partita.training.elastic_replicas import ElasticReplicas
from partita.training.events import PlanChosen, SyncChosen, WarningRaised, emit
from partita.training.forms import in_blocks
from partita.training.graph_runner import named_state
from partita.training.inputs import BatchLeaves, take_apart
from partita.training.job import Team
from partita.training.measuring import StepValues
from partita.training.membership import Elastic
from partita.training.observing import observed_plan
from partita.training.optimizers import check_optimizer, kind_of
from partita.training.planning import best_plan, block_plan, fallback_reasons, has_compiler
from partita.training.remembered import Memory
from partita.training.replicated import ReplicatedStep
from partita.training.runner import LossFn
from partita.training.scaling import LossScale
from partita.training.setup import StepSetup, make_runner
from partita.training.shared_plans import shared_plans, step_values
from partita.training.step import Step
from partita.training.sync import Exact, GradientMethod, Masked, Method, ReplicaMethod
from partita.training.sync.choice import Tolerance
from partita.training.trial import fits
from partita.training.update_costs import agreed_costs

NUM_MEASURED = 4  # graph plans that are run before one is adopted
# A candidate that needs this many times another one's memory, and so many bytes more (a process without any plan takes
# as much), must be predicted to be faster by this share: the peak of a job is that of the hungriest plan it has tried.
HUNGRY_RATIO, HUNGRY_BYTES, HUNGRY_GAIN = 1.25, 256 * 2**20, 0.05
QUICKLY = 'plan="quick" knows a worker a core with rows of its own, and plain PyTorch'
MAX_COMPILED_OPS = 3000  # compiling larger graphs takes minutes


class FallbackWarning(UserWarning):
    """The model runs as one block of plain PyTorch; the message says why and what it costs."""


def plan(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    cluster: Cluster | None = None,
    constraints: Constraints | None = None,
) -> Plan:
    """The plan that is predicted to be fastest, without training. On this machine, ops and segments of the best plans
    are measured, each for itself; nothing of the model changes.

    Args:
        model: may live on the `meta` device.
        loss_fn: ``loss_fn(model, batch)`` -> scalar tensor.
        batch: the global batch; its tensors may live on the `meta` device.
        optimizer: for the size of its state and the time of its update. For described GPUs, none means mixed precision
            with Adam (18 bytes a parameter), and a given one what plain PyTorch keeps.
        cluster: default: this machine, or all machines of the running job. A described cluster of GPUs (up to 100,000)
            gives a plan of mode "layout": degrees, stages of blocks, microbatches, without a graph of the whole model.
        constraints: corners of the plan space that are fixed.

    Raises:
        InputError, CaptureError: the model cannot be captured; says why.
        InfeasibleError: no plan satisfies the constraints or fits the memory.

    Example:
        >>> print(partita.plan(model, loss_fn, batch, cluster=partita.Cluster.preset("2x1xcpu-16")))
    """
    check_task(model, loss_fn, cluster)
    check_planning(optimizer, constraints)
    where = cluster if cluster is not None else measure_network(Cluster.detect())
    if is_described_gpus(where):
        with _old_objects_left_alone():
            planner = described_planner(model, loss_fn, batch, optimizer)
            return described_plan(planner, where, constraints or Constraints())
    if where.is_here:
        keep_freed_memory()
    refuse_described(constraints or Constraints())
    with _old_objects_left_alone():
        graph = capture(model, loss_fn, batch)
        values = step_values(model, graph, take_apart(batch))
        return best_plan(graph, where, constraints or Constraints(), optimizer, values)


_MANY_OBJECTS = 10_000  # new ones after which garbage is looked for: fewer than a graph has


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Python's garbage collector does not walk the objects that exist already (hundreds of thousands, with large
    libraries loaded) again and again while graphs are made: that took a third of planning. Nor those of the graphs
    whenever a few hundred more are there."""
    mine = gc.get_freeze_count() == 0  # who freezes objects himself wants them to stay frozen
    before = gc.get_threshold()
    if mine:
        gc.freeze()
    if before[0]:  # else it is off
        gc.set_threshold(max(before[0], _MANY_OBJECTS), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if mine:
            gc.unfreeze()


@dataclass(frozen=True, kw_only=True)
class _Request:
    plan: Plan | Constraints | Found
    compile: bool | Literal["auto"]

    @property
    def is_quick(self) -> bool:
        return self.plan == "quick"

    @property
    def wanted(self) -> Plan | Constraints:
        """The plan, or what it must be like."""
        if isinstance(self.plan, Plan):
            return self.plan if self.compile == "auto" else msgspec.structs.replace(self.plan, compiled=self.compile)
        constraints = self.plan if isinstance(self.plan, Constraints) else Constraints()
        compiled = False if self.is_quick and self.compile == "auto" else self.compile
        if compiled != "auto" and constraints.compiled is None:
            constraints = msgspec.structs.replace(constraints, compiled=compiled)
        return constraints


def parallelize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batch: Any,
    *,
    plan: Plan | Constraints | Found = "auto",
    sync: str | Method = "exact",
    tolerance: Tolerance | None = None,
    compile: bool | Literal["auto"] = "auto",
    cluster: Cluster | None = None,
    timeout_s: float = 120.0,
    check_finite: Literal["step", "op", "off"] = "step",
    clip_grad_norm: float | None = None,
    ema: float | None = None,
    master_weights: bool = False,
    loss_scale: Literal["dynamic"] | float | None = None,
    connections: Connections | None = None,
    elastic: Elastic | None = None,
    checkpoints: str | os.PathLike[str] | Checkpoints | None = None,
    resume: Literal["auto", "never"] = "auto",
) -> Step:
    """Makes the training step of a model, split by a plan over the workers of this machine or job.

    Args:
        model: any module. In a job of one process its own parameters are what is trained.
        optimizer: an ordinary `torch.optim.Optimizer` over the model's parameters; schedulers keep working.
        loss_fn: ``loss_fn(model, batch)`` -> scalar tensor.
        batch: a global batch of the usual shape; it is not trained on.
        plan: "auto" runs the best few plans and plain PyTorch in turns during the first steps and adopts the fastest
            (`Step.is_settled`); what is adopted is remembered for the next run. `Constraints` fix corners and take the
            best predicted plan; a `Plan` is used as it is. Without one, the rows of each process follow its measured
            speed while it trains. "quick" is "auto" for trainings of less than some minutes: it knows plain PyTorch
            and a worker a core with rows of its own, which are found in a second or two instead of five to ten and
            more, and what earlier runs have adopted; where there are GPUs, all plans. It compiles only if told to.
        sync: how processes are brought together: "exact", so that the mathematics is that of plain PyTorch, or a method
            of `partita.sync` or its name, which sends fewer bytes; "auto" chooses one within the `tolerance`
            (`Step.choice` says why). Inside a process training is always exact.
        tolerance: what ``sync="auto"`` may trade: "exact" (the default) nothing, "equivalent-loss" the mathematics of
            single steps, where the same loss is predicted to be reached sooner for it.
        compile: True or False fixes whether segments are compiled; "auto" leaves it to the plan.
        cluster: default: detected.
        timeout_s: limit of every wait for another process or worker, seconds; when the job starts as well. Others wait
            without one for a process that plans or compiles, as long as it lives.
        check_finite: "step" raises instead of updating if the loss is NaN or infinite, "op" names the op as well (each
            step then costs twice), "off" does not look.
        clip_grad_norm: limit of the 2-norm of all gradients together, as of `torch.nn.utils.clip_grad_norm_`, exact
            under every plan; `StepResult.grad_norm` tells the norm before. `math.inf` only tells it. Replicas clip each
            its own.
        ema: decay of an exponential moving average of the weights, e.g. 0.999, which `Step.ema_to` gives.
        master_weights: parameters of bfloat16 or float16 are updated by float32 copies of them, the masters, and are
            these rounded; the optimizer's state is float32 as well.
        loss_scale: what the loss is multiplied by for the gradients, which are divided by it in float32 before they are
            clipped: a number, or "dynamic" as of `torch.amp.GradScaler`. A step with a gradient of infinity or NaN is
            skipped (`StepResult.skipped`).
        connections: a method of `partita.connections`, which learns which elements of weights are there while training
            goes on (`Step.connections`); the others are zero. Processes then exchange gradients of those elements only.
        elastic: processes may come, go and crash while training goes on, exactly, or by replicas that agree now
            and then (LocalSGD, DiLoCo, StreamingDiLoCo(delay=0)), also compressed; each is started by itself.
        checkpoints: a folder for them, or `Checkpoints`, which says when they are written.
        resume: "auto" goes on from the latest checkpoint there if there is one, with the step count, random states and
            whatever was saved besides; "never" starts anew and leaves them alone.

    Raises:
        InputError: something given cannot be used; says what must hold and what to change.
        PlanError: the plan belongs to another model or cluster, or cannot be had.
        CheckpointError: the checkpoint to go on from is damaged, or of another model or optimizer.

    Example:
        >>> step = partita.parallelize(model, optimizer, loss_fn, batch)
        >>> for batch in loader:
        ...     result = step(batch)
    """
    start_s = time.perf_counter()
    method, plan = wanted_method(sync, tolerance), wanted_plan(plan)
    settings = Checkpoints.of(checkpoints)
    check_task(model, loss_fn, cluster)
    check_running(compile, timeout_s, check_finite, resume)
    check_norm(clip_grad_norm)
    check_decay(ema)
    check_scale(loss_scale)
    take_apart(batch)  # raises if it is none
    check_optimizer(optimizer, dict(model.named_parameters()))
    check_masters(optimizer, master_weights)
    check_elastic(elastic, method, settings)
    check_connections(connections, method, elastic)
    check_method(method, optimizer, tolerance, elastic, masters=master_weights, scales=loss_scale is not None)
    where = _cluster_here(cluster, plan, timeout_s)
    keep_freed_memory()
    team, transport = _join(timeout_s)
    setup = StepSetup(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        cluster=where,
        team=team,
        transport=transport,
        timeout_s=timeout_s,
        check_finite=check_finite,
        clip_norm=clip_grad_norm,
        decay=ema,
        masters=master_weights,
        scale=None if loss_scale is None else LossScale(loss_scale),
        checkpoints=settings,
        shares_move=not isinstance(plan, Plan),
    )
    request = _Request(plan=plan, compile=compile)
    with team.working_alone():
        setup, method = _agreed(setup, method, tolerance, connections, request, batch)
        step = _step_of(setup, method, elastic, batch, functools.partial(_made, request=request, start_s=start_s))
    if resume == "auto":
        try:
            step.resume()
        except BaseException:
            step.close()
            raise
    emit(PlanChosen(plan=step.plan, time_s=time.perf_counter() - start_s))
    return step


def _cluster_here(cluster: Cluster | None, plan: Plan | Constraints | Found, timeout_s: float) -> Cluster:
    """The machines of this job; what lies between them is measured where a plan is to be found."""
    where = cluster if cluster is not None else Cluster.detect(timeout_s=timeout_s)
    if cluster is None and not isinstance(plan, Plan):
        where = measure_network(where, timeout_s=timeout_s)
    if not where.is_here:
        raise InputError(
            "parallelize runs on the machines of this job, but got a described cluster; use partita.plan for those"
        )
    return where


def _agreed(
    setup: StepSetup,
    method: Method | None,
    tolerance: Tolerance | None,
    connections: Connections | None,
    request: _Request,
    batch: Any,
) -> tuple[StepSetup, Method]:
    """All processes start alike, agree on connections, on what updates cost, and on the method where one is to be
    chosen."""
    _equalise(setup, repr((method, tolerance, connections)))
    if connections is not None:
        connecting = Connecting(connections, setup.model, setup.team)
        connecting.begin(setup.optimizer)
        setup = dataclasses.replace(setup, connecting=connecting)
        method = Exact() if setup.team.is_alone else Masked(masks=connecting.travelling)
    if kind_of(setup.optimizer) == "parameter":
        parameters = dict(setup.model.named_parameters())
        costs = agreed_costs(setup.optimizer, parameters, setup.cluster, setup.team, masters=setup.masters)
        setup = dataclasses.replace(setup, costs=costs)
    if method is None:
        choice = choose(setup, batch, tolerance or "exact", request.wanted, replicas=isinstance(request.plan, str))
        setup, method = dataclasses.replace(setup, choice=choice), choice.method
        emit(SyncChosen(choice=choice))
    if isinstance(method, GradientMethod) and not isinstance(method, Exact):
        setup = dataclasses.replace(setup, sync=method, sums=shared_sum_cost(method, setup))
    return setup, method


def _step_of(
    setup: StepSetup, method: Method, elastic: Elastic | None, batch: Any, make: Callable[[StepSetup, Any], Step]
) -> Step:
    """The step of processes that are brought together so; `make` makes that of those that train as one."""
    if elastic is not None and isinstance(method, OuterMethod):
        return ElasticReplicas(setup, elastic, method, batch, make)
    if elastic is not None:
        return ElasticStep(setup, elastic, batch, make)
    if isinstance(method, ReplicaMethod) and not setup.team.is_alone:
        return ReplicatedStep(setup, method, batch, make)
    return make(setup, batch)


def _made(setup: StepSetup, batch: Any, request: _Request, start_s: float) -> Step:
    """The step of processes that train as one."""
    leaves = take_apart(batch)
    with _old_objects_left_alone():
        setup, graph = in_blocks(setup, batch, request.wanted)
        decision = _decide(setup, batch, leaves, request, graph)
        step = _make_step(setup, decision, leaves, start_s)
    if graph is not None:
        forget(graph, keep_programs=True)  # those of the candidates
    let_go_of_garbage()  # of planning and measuring
    return step


def _join(timeout_s: float) -> tuple[Team, Transport | None]:
    job = current_job()
    if job is None:
        return Team(), None
    from partita.runtime.processes import connect  # needs torch.distributed, which not every build of torch has

    transport = connect(timeout_s=timeout_s)
    return Team(transport), transport


def _equalise(setup: StepSetup, sync: str) -> None:
    """All processes start from the weights, buffers and random state of rank 0."""
    parameters, buffers = named_state(setup.model)
    values = {**parameters, **buffers}
    setup.team.require_same_items(
        {name: f"{tuple(value.shape)} {value.dtype}" for name, value in values.items()}, "model"
    )
    groups = [sum(value.numel() for value in group["params"]) for group in setup.optimizer.param_groups]
    setup.team.require_equal(f"{type(setup.optimizer).__name__} with groups of {groups} elements", "optimizer")
    setup.team.require_equal(sync, "synchronisation method")
    setup.team.spread([*parameters.values(), *buffers.values()])
    setup.team.spread_random_state()


@dataclass(frozen=True, kw_only=True)
class _Decision:
    """The plan to run; or `finalists`, of which the first steps choose one, and where it is remembered."""

    plan: Plan
    graph: Graph | None = None
    finalists: tuple[Plan, ...] = ()
    memory: Memory | None = None


def _decide(setup: StepSetup, batch: Any, leaves: BatchLeaves, request: _Request, captured: Graph | None) -> _Decision:
    plan = request.plan
    if isinstance(plan, Plan) and plan.mode == "block":
        plan.validate(None, setup.cluster)
        return _Decision(plan=plan)
    try:
        graph = captured or setup.capture(batch)
    except CaptureError as error:
        if isinstance(plan, Plan):
            raise PlanError(f"the plan needs the model as a graph, but it cannot be captured: {error}") from error
        return _Decision(plan=_fall_back(setup, error, compiled=request.compile is True))
    setup.team.require_equal(graph.fingerprint, "captured graph (model, loss and batch shape)")
    if graph.unchecked:
        emit(WarningRaised(subject="capture", message=_unchecked(graph.unchecked)))
    if isinstance(plan, Plan):
        plan.validate(graph, setup.cluster)
    constraints = request.wanted
    if isinstance(constraints, Plan):
        return _Decision(plan=constraints, graph=graph)
    _check_rows(constraints, graph)
    if constraints.compiled is None and (not has_compiler() or len(graph.nodes) > MAX_COMPILED_OPS):
        if not has_compiler():
            _warn_no_compiler()
        constraints = msgspec.structs.replace(constraints, compiled=False)
    with setup.in_form():
        values = step_values(setup.model, graph, leaves)
    if isinstance(plan, Constraints):
        best = shared_plans(setup, graph, constraints, values)[0]
        return _Decision(plan=best, graph=graph if best.mode == "graph" else None)
    memory = Memory(graph, setup.cluster, constraints, setup.facts, repr(setup.sync))
    recalled = [text.to_json() for text in memory.recall()] if setup.team.rank == 0 else []
    known = [Plan.from_json(text) for text in setup.team.from_first(recalled)]
    if request.is_quick and not any(process.gpus for process in setup.cluster.processes):
        finalists = known or _quick_finalists(setup, graph, constraints, values)
        return _Decision(plan=finalists[0], graph=graph, finalists=tuple(finalists))
    finalists = known or _finalists(shared_plans(setup, graph, constraints, values, refines=False))
    if not known and setup.team.rank == 0:
        with contextlib.suppress(OSError):  # a full or read-only disk: the next run plans again
            memory.remember_candidates(finalists)
    return _Decision(plan=finalists[0], graph=graph, finalists=tuple(finalists), memory=memory)


def _warn_no_compiler() -> None:
    message = (
        "no C++ compiler was found, so nothing is compiled, which is slower but gives the same result. Install g++ or "
        "name one in CXX, or pass compile=False to silence this"
    )
    warnings.warn(message, CompileWarning, stacklevel=4)
    emit(WarningRaised(subject="compiler", message=message))


def _make_step(setup: StepSetup, decision: _Decision, leaves: BatchLeaves, start_s: float) -> Step:
    """The step, which begins with plain PyTorch, or else a plan that needs no compiling, where finalists are left."""
    plans, graph, memory = list(decision.finalists), decision.graph, decision.memory
    if len(plans) < 2 or graph is None:
        return Step(setup, decision.plan, graph if decision.plan.mode == "graph" else None, leaves)
    order = sorted((plan.compiled, plan.mode != "block", place) for place, plan in enumerate(plans))
    compiled, _, start = order[0]
    if compiled:
        plans.append(msgspec.structs.replace(plans[start], compiled=False))
        start = len(plans) - 1
    adoption = Adoption(
        plans,
        start=start,
        provisional=compiled,
        graph=graph,
        make=lambda plan: make_runner(setup, plan, graph, setup.model, setup.optimizer),
        team=setup.team,
        facts=setup.facts,
        started_s=start_s,
        can_undo=lambda: fits(setup.model, setup.optimizer),
        reprice=lambda plan, programs, timelines: observed_plan(
            plan, programs, timelines, setup.cluster, setup.facts, setup.team, setup.sums
        ),
    )

    def remember(adoption: Adoption) -> None:
        if memory is not None and setup.team.rank == 0 and adoption.is_complete:
            with contextlib.suppress(OSError):
                memory.remember(adoption.measured())

    return Step(setup, plans[start], graph, leaves, adoption, remember)


def _unchecked(lines: tuple[str, ...]) -> str:
    return (
        f"the step checks values of tensors at {', '.join(lines[:5])} and raises if they are bad; a graph cannot, so "
        "these checks are left out while partita trains. Check the data before the step if they matter"
    )


def _check_rows(constraints: Constraints, graph: Graph) -> None:
    data = constraints.data or 1
    if data > 1 and graph.batch_size < data:
        raise InputError(
            f"the batch must have at least one row per worker of the data axis, but it has {graph.batch_size} rows for "
            f"data={data}; use a larger batch or a smaller data axis"
        )


def _fall_back(setup: StepSetup, error: CaptureError, *, compiled: bool) -> Plan:
    reasons = fallback_reasons(error)
    message = ". ".join(reasons)
    warnings.warn(message, FallbackWarning, stacklevel=4)
    emit(WarningRaised(subject="capture", message=message))
    return block_plan(setup.cluster, graph=None, reasons=reasons, compiled=compiled)


def _finalists(candidates: tuple[Plan, ...]) -> list[Plan]:
    """The best few graph plans, compiled ones and others, and every plain plan."""
    graphs = [plan for plan in candidates if plan.mode == "graph"]
    graphs = [plan for plan in graphs if not any(_is_hungry(plan, other) for other in graphs)]
    compiled = [plan for plan in graphs if plan.compiled][: NUM_MEASURED // 2]
    plain = [plan for plan in graphs if not plan.compiled][: NUM_MEASURED - len(compiled)]
    if compiled:
        compiled += _compiled_twins(plain, compiled)
        compiled += [plan for plan in graphs if plan.compiled and plan not in compiled and _is_of_one(plan, graphs)]
    return [*plain, *compiled, *(plan for plan in candidates if plan.mode == "block")]


def _quick_finalists(setup: StepSetup, graph: Graph, constraints: Constraints, values: StepValues) -> list[Plan]:
    """A worker a core with rows of its own, where there are enough, and plain PyTorch on all cores and on one. Nothing
    is measured for them, and one plan is lowered."""
    num_cores = setup.cluster.num_cores
    counts = sorted({1, len(setup.cluster.processes[0].cores)}, reverse=True)
    found = [block_plan(setup.cluster, graph=graph, reasons=(QUICKLY,), num_threads=count) for count in counts]
    if graph.batch_size < num_cores:
        return found
    wanted = msgspec.structs.replace(
        constraints,
        data=num_cores,
        tensor=1,
        pipeline=1,
        num_workers=num_cores,
        threads_per_worker=1,
        num_microbatches=1,
    )
    with contextlib.suppress(PlanError, InfeasibleError):
        graphs = [one for one in shared_plans(setup, graph, wanted, values, refines=False) if one.mode == "graph"]
        found = [*graphs[:1], *found]
    return found


def _is_of_one(plan: Plan, others: list[Plan]) -> bool:
    """Whether one process alone makes the steps of a plan, but not of all others."""
    processes = [{worker.process for worker in one.workers} for one in (plan, *others)]
    return len(processes[0]) == 1 and any(len(some) > 1 for some in processes)


def _compiled_twins(plain: list[Plan], compiled: list[Plan]) -> list[Plan]:
    """Plans of one worker that are tried without compiling, compiled, where that is not among those that are tried:
    how fast compiled segments are is a guess before, and below a millisecond two workers' meetings may outweigh it."""
    tried = [(plan.axes, plan.num_microbatches) for plan in compiled if len(plan.workers) == 1]
    alone = [plan for plan in plain if len(plan.workers) == 1 and (plan.axes, plan.num_microbatches) not in tried]
    return [msgspec.structs.replace(plan, compiled=True) for plan in alone]


def _is_hungry(plan: Plan, other: Plan) -> bool:
    """Whether the plan would take much more memory than the other one, for little or nothing."""
    if plan.prediction is None or other.prediction is None or plan.compiled != other.compiled:
        return False
    needs, others_needs = (max(p.prediction.memory_bytes.values(), default=0) for p in (plan, other) if p.prediction)
    gain = 1 - plan.prediction.step_time_s / other.prediction.step_time_s
    is_more = needs > HUNGRY_RATIO * others_needs and needs > others_needs + HUNGRY_BYTES
    return is_more and gain < HUNGRY_GAIN
