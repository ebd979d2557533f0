"""`search`: the ranked plans of a step, by branch and bound over the corners of the space."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from partita.cluster.model import Cluster
from partita.cost.model import CostModel
from partita.errors import InfeasibleError, PlanError, ProgramError
from partita.graph.graph import Graph
from partita.plan import Alternative, Constraints, Plan, Prediction, Worker, cluster_fingerprint
from partita.planner.describe import title
from partita.planner.inputs import placed_inputs
from partita.planner.layout import oversubscribed
from partita.planner.overlap import best_buckets
from partita.planner.price import Price, Pricer
from partita.planner.space import Corner, corners
from partita.planner.tensor import TensorPlacement, place_on_tensor_axis
from partita.planner.work import Work, measure_work
from partita.units import format_bytes, format_time

MAX_REFINED = 3  # refining a compiled plan compiles it


class Outcome(Protocol):
    """What an evaluation of a plan tells; `partita.program.timeline.Timeline` is one."""

    @property
    def step_time_s(self) -> float: ...
    @property
    def step_memory_bytes(self) -> Mapping[int, int]: ...
    @property
    def shared_memory_bytes(self) -> Mapping[int, int]: ...
    @property
    def bytes_sent(self) -> int: ...


def search(
    graph: Graph,
    cluster: Cluster,
    cost: CostModel,
    *,
    constraints: Constraints | None = None,
    optimizer: str = "SGD",
    optimizer_state_bytes_per_element: float = 0,
    limit: int = 8,
    microbatches: bool = False,
    evaluate: Callable[[Plan], Outcome] | None = None,
    refine: Callable[[Plan], Outcome] | None = None,
) -> tuple[Plan, ...]:
    """Plans, best first: by predicted step time, then by fewer workers; up to `limit` compiled ones and as many that
    are not. Plain PyTorch (eager and compiled, on one thread and on all) is among them unless `constraints` fix the
    mesh, the microbatches, schedule or stages.

    `microbatches` says whether this graph may be cut into microbatches (nothing but sums crosses samples).
    `evaluate`, usually lowering and simulation, replaces the formula's prediction of the best plans; a plan for which
    it raises `PlanError` or `ProgramError` is dropped. `refine` predicts better than `evaluate` but takes longer: it is
    asked about the best plan until the best plan is a refined one, `MAX_REFINED` times at most.
    Raises `InfeasibleError`, naming the binding limit, if no plan is left.
    """
    wanted = constraints if constraints is not None else Constraints()
    if limit < 1:
        raise PlanError(f"limit must be at least 1, but got {limit}.")
    work = measure_work(graph)
    pricer = Pricer(
        graph, work, cluster, cost, optimizer=optimizer, state_bytes_per_element=optimizer_state_bytes_per_element
    )
    space = corners(cluster, wanted, batch_size=graph.batch_size, num_ops=len(work.names), microbatches=microbatches)
    placer = _Placer(graph, cluster, cost, wanted, optimizer_state_bytes_per_element)
    plans: list[Plan] = []
    bounds: list[float] = []
    misses: list[str] = []
    for compiled in (False, True):  # what compiling saves is a guess until it is tried: the two are ranked apart
        corners_of_kind = tuple(corner for corner in space if corner.compiled is compiled)
        ranked, found_bounds, found_misses = _branch_and_bound(pricer, corners_of_kind, wanted.stage_starts, limit)
        if evaluate is not None:
            ranked += _best_without_pipeline(pricer, corners_of_kind, ranked)
        plans += [_graph_plan(graph, cluster, cost, work, candidate, wanted, placer) for candidate in ranked]
        bounds += found_bounds
        misses += found_misses
    plans += _blocks(graph, cluster, cost, pricer, wanted)
    if evaluate is not None:
        plans, dropped = _evaluated(plans, evaluate, cluster)
        plans = _with_buckets(plans, int(work.parameter_bytes.sum()), cost, evaluate, cluster, wanted)
        misses += dropped
    if refine is not None:
        _refine_best(plans, refine, cluster, cost.refined_uncertainty)
    if not plans:
        raise InfeasibleError(misses[0] if misses else "No plan satisfies the constraints: free one of them.")
    bounds += [_time_s(plan) for plan in plans]  # evaluated ones and blocks belong to the space as well
    plans = sorted(plans, key=lambda plan: (_is_doubtful(plan, plans), _time_s(plan), plan.num_workers))
    return _explained(_keep(plans, limit), min(bounds), len(space))


@dataclass(frozen=True)
class _Candidate:
    corner: Corner
    price: Price


def _branch_and_bound(
    pricer: Pricer, space: tuple[Corner, ...], stage_starts: tuple[str, ...] | None, limit: int
) -> tuple[list[_Candidate], list[float], list[str]]:
    """The best `limit` candidates, proven lower bounds that cover all corners, and why corners are infeasible.

    Corners are visited by rising bound. One that comes up is bounded better (a chain's bound takes longer than that of
    any split), and when it comes up again it is priced, which takes longest. The visit ends when a bound exceeds the
    worst of `limit` found, which no later corner can then improve.
    """
    heap = [(pricer.bound_s(corner), 0, 0, place, corner.pipeline == 1) for place, corner in enumerate(space)]
    heapq.heapify(heap)
    explained = False
    found: list[_Candidate] = []
    bounds: list[float] = []
    misses: list[str] = []
    while heap and not (len(found) >= limit and heap[0][0] > found[limit - 1].price.step_time_s):
        bound_s, _, _, place, is_chain = heapq.heappop(heap)
        corner = space[place]
        if not is_chain and stage_starts is None:
            chain_s = max(bound_s, pricer.chain_bound_s(corner))
            thrift = (corner.pipeline, corner.num_microbatches) if math.isinf(chain_s) else (0, 0)
            heapq.heappush(heap, (chain_s, -thrift[0], -thrift[1], place, True))
            continue
        if math.isinf(bound_s) and (found or explained):
            break  # no corner that is left fits its memory, and to say why takes long
        try:
            worth_s = found[limit - 1].price.step_time_s if len(found) >= limit else math.inf
            price = pricer.price(corner, stage_starts, worth_s)
        except InfeasibleError as error:
            explained = math.isinf(bound_s)
            misses.insert(0 if explained else len(misses), str(error))  # the thriftiest says what would help
            continue
        bounds.append(max(bound_s, price.lower_bound_s))
        found.append(_Candidate(corner, price))
        found.sort(key=lambda c: (c.price.step_time_s, len(c.corner.workers)))
    return found[:limit], bounds + [bound_s for bound_s, *_ in heap], misses


def _best_without_pipeline(pricer: Pricer, space: tuple[Corner, ...], ranked: list[_Candidate]) -> list[_Candidate]:
    """The best corner without a pipeline, unless one is ranked already.

    The formula lets a stage send a microbatch while it still sends the one before, so on slow networks pipelines may
    take all places; and it knows no overlap of exchanges. Evaluation tells, if it is asked.
    """
    plain = [corner for corner in space if corner.pipeline == 1]
    if not plain or any(candidate.corner.pipeline == 1 for candidate in ranked):
        return []
    best = min(plain, key=lambda corner: (pricer.bound_s(corner), len(corner.workers)))
    try:
        return [_Candidate(best, pricer.price(best, None))]
    except InfeasibleError:
        return []


Places = dict[str, dict[str, str]]


class _Placer:
    """The inputs that plans cut and the rules of their ops: as the constraints ask, and over the tensor axis, where
    they leave it open, by the intra-stage programme (once per extent, with the rows of the batch free or not)."""

    def __init__(
        self, graph: Graph, cluster: Cluster, cost: CostModel, constraints: Constraints, state_bytes: float
    ) -> None:
        self._graph, self._cluster, self._cost = graph, cluster, cost
        self._constraints, self._state_bytes = constraints, state_bytes
        self._found: dict[tuple[int, bool], TensorPlacement] = {}

    def place(self, corner: Corner) -> tuple[Places, Places]:
        """Raises `PlanError` where the constraints name inputs or cuts that there are not."""
        open_axis = corner.tensor > 1 and not any(
            "tensor" in by_axis for by_axis in (self._constraints.inputs or {}).values()
        )
        if not open_axis:
            return placed_inputs(self._graph, corner.data, corner.tensor, self._constraints, {}), {}
        rows = corner.data == corner.num_microbatches == 1
        if (corner.tensor, rows) not in self._found:
            self._found[corner.tensor, rows] = place_on_tensor_axis(
                self._graph,
                tuple(w for w in corner.workers if w.stage == 0 and w.data == 0),
                self._cluster,
                self._cost,
                state_bytes_per_element=self._state_bytes,
                rows=rows,
            )
        chosen = self._found[corner.tensor, rows]
        inputs = placed_inputs(self._graph, corner.data, corner.tensor, self._constraints, chosen.inputs)
        return inputs, chosen.rules


def _graph_plan(
    graph: Graph,
    cluster: Cluster,
    cost: CostModel,
    work: Work,
    candidate: _Candidate,
    constraints: Constraints,
    placer: _Placer,
) -> Plan:
    corner, price = candidate.corner, candidate.price
    inputs, rules = placer.place(corner)
    reasons = [
        f"stage {stage}: {format_time(time_s)} a microbatch"
        for stage, time_s in enumerate(price.stage_time_s)
        if corner.pipeline > 1
    ]
    if oversubscribed(cluster, len(corner.workers), corner.threads_per_worker):
        reasons.append(f"{len(corner.workers)} workers share {cluster.num_cores} cores, as the constraints ask.")
    return Plan(
        mode="graph",
        graph_fingerprint=graph.fingerprint,
        cluster_fingerprint=cluster_fingerprint(cluster),
        axes={"pipeline": corner.pipeline, "data": corner.data}
        | ({"tensor": corner.tensor} if corner.tensor > 1 else {}),
        inputs=inputs,
        rules=rules,
        workers=corner.workers,
        threads_per_worker=corner.threads_per_worker,
        num_microbatches=corner.num_microbatches,
        schedule=corner.schedule,
        compiled=corner.compiled,
        stage_starts=tuple(work.names[start] for start in price.starts),
        shares=corner.shares,
        prediction=Prediction(
            step_time_s=price.step_time_s,
            lower_bound_s=0.0,
            uncertainty=cost.uncertainty(compiled=corner.compiled),
            memory_bytes={str(rank): num_bytes for rank, num_bytes in price.memory_bytes.items()},
            bytes_sent=price.bytes_sent,
        ),
        reasons=tuple(reasons),
        local_statistics=constraints.local_statistics,
    )


def _blocks(graph: Graph, cluster: Cluster, cost: CostModel, pricer: Pricer, constraints: Constraints) -> list[Plan]:
    fixed = (
        constraints.data,
        constraints.tensor,
        constraints.inputs,
        constraints.fully_sharded or None,
        constraints.pipeline,
        constraints.num_workers,
        constraints.num_microbatches,
        constraints.schedule,
        constraints.stage_starts,
    )
    if any(value is not None for value in fixed):
        return []
    process = min(cluster.processes, key=lambda item: item.rank)
    most = max(len(process.cores), 1)
    threads = {1, most} if constraints.threads_per_worker is None else {constraints.threads_per_worker}
    need = pricer.whole_memory_bytes()
    if process.memory_bytes and need > process.memory_bytes:
        return []
    plans = []
    for count in sorted(count for count in threads if count <= most):
        for compiled in (False, True) if constraints.compiled is None else (constraints.compiled,):
            worker = Worker(
                index=0,
                process=process.rank,
                machine=process.machine,
                cores=process.cores[:count],
                stage=0,
                data=0,
                gpu=process.gpus[0] if process.gpus else None,
            )
            prediction = Prediction(
                step_time_s=pricer.whole_time_s(worker, compiled),
                lower_bound_s=0.0,
                uncertainty=cost.uncertainty(compiled=compiled),
                memory_bytes={str(process.rank): need},
            )
            plans.append(
                Plan(
                    mode="block",
                    graph_fingerprint=graph.fingerprint,
                    cluster_fingerprint=cluster_fingerprint(cluster),
                    axes={"pipeline": 1, "data": 1},
                    workers=(worker,),
                    threads_per_worker=count,
                    compiled=compiled,
                    shares=(graph.batch_size,) if graph.batch_size else (),
                    prediction=prediction,
                    reasons=("Plain PyTorch on the whole batch: the peer that every other plan must beat.",),
                )
            )
    return plans


def _evaluated(
    plans: list[Plan], evaluate: Callable[[Plan], Outcome], cluster: Cluster
) -> tuple[list[Plan], list[str]]:
    """The plans with `evaluate`'s predictions, and why some were dropped. Blocks keep the formula's."""
    kept, dropped = [], []
    limits = {process.rank: process.memory_bytes for process in cluster.processes}
    for plan in plans:
        if plan.mode == "block":
            kept.append(plan)
            continue
        try:
            outcome = evaluate(plan)
        except (PlanError, ProgramError) as error:
            dropped.append(f"{title(plan)}: {error}")
            continue
        memory = {
            rank: outcome.shared_memory_bytes.get(rank, 0) + outcome.step_memory_bytes.get(rank, 0)
            for rank in {worker.process for worker in plan.workers}
        }
        over = [rank for rank, need in memory.items() if limits.get(rank) and need > limits[rank]]
        if over:
            rank = over[0]
            dropped.append(
                f"{title(plan)} must fit the memory of process {rank}, but needs {format_bytes(memory[rank])} of "
                f"{format_bytes(limits[rank])}. The smallest change: {format_bytes(memory[rank] - limits[rank])} more."
            )
            continue
        assert plan.prediction is not None
        prediction = msgspec.structs.replace(
            plan.prediction,
            step_time_s=outcome.step_time_s,
            bytes_sent=outcome.bytes_sent,
            memory_bytes={str(rank): need for rank, need in sorted(memory.items())},
        )
        kept.append(msgspec.structs.replace(plan, prediction=prediction))
    return kept, dropped


def _with_buckets(
    plans: list[Plan],
    gradient_bytes: int,
    cost: CostModel,
    evaluate: Callable[[Plan], Outcome],
    cluster: Cluster,
    constraints: Constraints,
) -> list[Plan]:
    """The plans, those with exchanges of gradients in the background where that is predicted to be faster."""

    def tried(plan: Plan) -> Plan | None:
        kept, _ = _evaluated([plan], evaluate, cluster)
        return kept[0] if kept else None

    fixed = constraints.num_microbatches is not None
    found: dict[str, Plan] = {}  # plans that differ in their microbatches alone may become one
    for plan in plans:
        if plan.mode == "graph":
            plan = best_buckets(plan, gradient_bytes, cost, tried, keeps_microbatches=fixed)
        found.setdefault(plan.hash, plan)
    return list(found.values())


def _refine_best(plans: list[Plan], refine: Callable[[Plan], Outcome], cluster: Cluster, uncertainty: float) -> None:
    """Refines predictions in place, always that of the best graph plan, until it is a refined one."""
    refined: set[str] = set()
    while len(refined) < MAX_REFINED:
        graphs = [plan for plan in plans if plan.mode == "graph" and not _is_doubtful(plan, plans)]
        best = min(graphs, key=lambda plan: (_time_s(plan), plan.num_workers), default=None)
        if best is None or best.hash in refined:
            return
        better, _ = _evaluated([best], refine, cluster)
        refined.add(best.hash)
        plans[plans.index(best) : plans.index(best) + 1] = [_with_uncertainty(plan, uncertainty) for plan in better]


def _is_doubtful(plan: Plan, plans: Sequence[Plan]) -> bool:
    """Whether a plan like it with fewer microbatches may be as good, for all that the predictions know. Sums of ops
    know least of what a segment costs that is run several times."""
    return any(
        _is_like(other, plan)
        and other.num_microbatches < plan.num_microbatches
        and (_latest_s(other) if _is_surer(other, plan) else _earliest_s(other)) <= _latest_s(plan)
        for other in plans
    )


def _is_like(plan: Plan, other: Plan) -> bool:
    """Whether they differ in their microbatches alone, without a pipeline that lives on them."""
    return (
        plan.mode == other.mode == "graph"
        and plan.axes == other.axes
        and plan.axes.get("pipeline", 1) == 1
        and (plan.workers, plan.threads_per_worker, plan.compiled)
        == (other.workers, other.threads_per_worker, other.compiled)
    )


def _is_surer(plan: Plan, other: Plan) -> bool:
    assert plan.prediction is not None and other.prediction is not None
    return plan.prediction.uncertainty < other.prediction.uncertainty


def _latest_s(plan: Plan) -> float:
    """The step time if it is as long as the prediction's uncertainty allows."""
    assert plan.prediction is not None
    return _time_s(plan) * (1 + plan.prediction.uncertainty)


def _earliest_s(plan: Plan) -> float:
    """The step time if it is as short as the prediction's uncertainty allows."""
    assert plan.prediction is not None
    return _time_s(plan) / (1 + plan.prediction.uncertainty)


def _with_uncertainty(plan: Plan, uncertainty: float) -> Plan:
    assert plan.prediction is not None
    prediction = msgspec.structs.replace(plan.prediction, uncertainty=uncertainty)
    return msgspec.structs.replace(plan, prediction=prediction)


def _time_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_time_s


def _keep(plans: list[Plan], limit: int) -> list[Plan]:
    """The first `limit` compiled graph plans and as many others, and the best plain eager and compiled plan: they are
    measured before anything is adopted."""
    kept: set[int] = set()
    for compiled in (False, True):
        graphs = [plan for plan in plans if plan.mode == "graph" and plan.compiled is compiled]
        blocks = [plan for plan in plans if plan.mode == "block" and plan.compiled is compiled]
        kept |= {id(plan) for plan in (*graphs[:limit], *blocks[:1])}
    return [plan for plan in plans if id(plan) in kept]


def _explained(plans: list[Plan], bound_s: float, num_corners: int) -> tuple[Plan, ...]:
    result = []
    for plan in plans:
        assert plan.prediction is not None
        prediction = msgspec.structs.replace(plan.prediction, lower_bound_s=bound_s)
        others, ties = [], []
        for other in plans:
            if other is plan:
                continue
            ratio = _time_s(other) / _time_s(plan) - 1 if _time_s(plan) > 0 else 0.0
            tied = abs(ratio) <= prediction.uncertainty
            if tied:
                ties.append(title(other))
            reason = (
                "A tie within the uncertainty."
                if tied
                else f"{abs(ratio):.0%} {'slower' if ratio > 0 else 'faster'} by prediction."
            )
            others.append(
                Alternative(
                    description=title(other),
                    predicted_step_time_s=_time_s(other),
                    measured_step_time_s=None,
                    reason=reason,
                )
            )
        reasons = (
            *plan.reasons,
            f"{num_corners} combinations of workers, threads, mesh, orders of processes, shares of rows, microbatches, "
            "schedule and compilation were bounded; stage boundaries are optimal within each that the bound could not "
            "exclude. The lower bound is proven for the planner's formula; what the best plans are predicted to take "
            "comes from simulating them.",
        )
        if ties:
            reasons += (
                f"Within the uncertainty of {prediction.uncertainty:.0%} it ties with: " + "; ".join(ties) + ".",
            )
        result.append(msgspec.structs.replace(plan, prediction=prediction, alternatives=tuple(others), reasons=reasons))
    return tuple(result)
