"""``sync="auto"``: the method with which training is predicted to reach a loss soonest.

    time to a loss = time of a step * steps that the method needs, as a multiple of those of exact training

The second factor is a rule of `partita.training.sync.steps`. The first one, of methods that add gradients, is that of
the best plan of the job with sums that cost what the method's cost (its bytes by its formula, its computing as measured
here); so a method may make a plan worth its while that is too slow with exact sums. Of replicas it is the time of the
best plan of one process with its part of the rows, and what agreeing costs in the mean of a step. Exchanges go over the
slowest link between processes; those that are made in the background cost what is left of them when they are
waited for, or what they take of a process' cores if workers use all of them.

Exact training has the best exact plan, on one machine or on all; what is slower than that is not chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from partita.cluster import Cluster
from partita.cluster.model import Link, Process
from partita.cost.sums import EXACT_SUM, FREE_SUM, SumCost
from partita.cost.table import CostTable
from partita.graph import Graph
from partita.plan import Constraints, Plan
from partita.planner.describe import title
from partita.program import ProgramSet
from partita.simulator import simulate
from partita.training.inputs import cut_rows, take_apart
from partita.training.optimizers import OptimizerFacts
from partita.training.planning import ranked_plans
from partita.training.replicated import own_cluster
from partita.training.setup import StepSetup
from partita.training.sync import Exact, GradientMethod, Method
from partita.training.sync.choice import Choice, Estimate, Tolerance, candidates, decide
from partita.training.sync.method import Part, Peers
from partita.training.sync.outer import StreamingDiLoCo
from partita.training.sync.pricing import Periodic, periodic_cost, sum_cost
from partita.training.sync.steps import steps_factor
from partita.units import split_evenly

NUM_PLANS = 2  # of a kind that are priced under every method


def choose(setup: StepSetup, batch: Any, tolerance: Tolerance, wanted: Plan | Constraints, *, replicas: bool) -> Choice:
    """The method to train by. Rank 0 predicts, the others receive; all processes call it.

    Args:
        setup: of the job, without a method.
        batch: a global batch.
        tolerance: "exact", or "equivalent-loss": the mathematics of a step may change.
        wanted: the plan, or what it must be like.
        replicas: whether methods come into question that give every process a plan of its own.
    """
    if setup.team.is_alone:
        return _exact(tolerance, "there is one process, and inside it training is exact")
    if tolerance == "exact":
        return _exact(tolerance, 'tolerance="exact" asks for it')
    if isinstance(wanted, Plan) and wanted.mode == "block":
        return _exact(tolerance, "the plan that was given is one block, which sends nothing")
    num = setup.team.num_processes
    known = candidates(setup.optimizer, num, replicas=replicas)
    told: list[tuple[int, str, float, float]] = []
    problem = ""
    if setup.team.rank == 0:
        try:
            found = _Predictor(setup, batch, wanted).estimates(known)
            told = [(known.index(one.method), one.plan, one.step_time_s, one.sent_bytes) for one in found]
        except Exception as error:  # planning meets it again, on all processes, and says what to do
            problem = f"nothing can be predicted of this model: {type(error).__name__}: {error}"
    told, problem = setup.team.from_first((told, problem))
    if problem:
        return _exact(tolerance, problem)
    factors = [steps_factor(method, num, setup.optimizer) or math.inf for method in known]
    estimates = [
        Estimate(method=known[i], plan=plan, step_time_s=step_s, sent_bytes=sent, steps_factor=factors[i])
        for i, plan, step_s, sent in told
    ]
    return decide(estimates, tolerance)


def _exact(tolerance: Tolerance, reason: str) -> Choice:
    return Choice(tolerance=tolerance, estimates=(), reason=reason)


def shared_sum_cost(method: GradientMethod, setup: StepSetup) -> SumCost:
    """What sums of gradients cost by a method, as rank 0 measures it; all processes call it."""
    if setup.team.is_alone:
        return EXACT_SUM
    parts = _parts_of(setup)
    cost = sum_cost(method, parts, _peers_of(setup)) if setup.team.rank == 0 else EXACT_SUM
    share, compute_s = setup.team.from_first((cost.sent_share, cost.compute_s_per_byte))
    return SumCost(sent_share=share, compute_s_per_byte=compute_s)


def _parts_of(setup: StepSetup) -> list[Part]:
    named = setup.model.named_parameters()
    return [Part(name, tuple(value.shape)) for name, value in named if value.requires_grad]


def _peers_of(setup: StepSetup) -> Peers:
    return Peers(tuple(range(setup.team.num_processes)), setup.team.rank)


@dataclass
class _Lowered:
    """A plan whose programs are priced under several methods."""

    graph: Graph
    plan: Plan
    programs: dict[bool, ProgramSet] = field(default_factory=dict)  # by whether parameters are whole

    def price(self, facts: OptimizerFacts, cost: CostTable) -> tuple[float, int]:
        """Seconds and bytes of a step."""
        if self.plan.mode == "block":
            assert self.plan.prediction is not None
            return self.plan.prediction.step_time_s, 0
        if facts.whole_parameters not in self.programs:
            self.programs[facts.whole_parameters] = facts.lowered(self.graph, self.plan)
        programs = self.programs[facts.whole_parameters]
        timeline = simulate(programs, self.plan, cost, optimizer=facts.name, update_values=facts.update_values)
        return timeline.step_time_s, timeline.bytes_sent


@dataclass(frozen=True, kw_only=True)
class _Alone:
    """The best plan of one process that trains alone."""

    step_time_s: float
    plan: Plan
    cost: CostTable

    def interruption_s(self, num_bytes: int, num_processes: int) -> float:
        """What an exchange in the background takes of its time."""
        place = self.plan.workers[0]
        num_busy = self.plan.used_cores[place.process]
        return self.cost.interruption_s(num_bytes, place, num_processes=num_processes, num_busy=num_busy)


class _Predictor:
    """Predicts steps, on rank 0."""

    def __init__(self, setup: StepSetup, batch: Any, wanted: Plan | Constraints) -> None:
        self._setup, self._batch, self._wanted = setup, batch, wanted
        self._parts, self._peers = _parts_of(setup), _peers_of(setup)

    def estimates(self, methods: Sequence[Method]) -> list[Estimate]:
        """Raises what capturing and planning the model raise."""
        graph = self._setup.capture(self._batch)
        plans = self._plans(graph)
        exact = self._of_gradients(Exact(), plans)
        found = [exact]
        for method in methods:
            if isinstance(method, GradientMethod) and not isinstance(method, Exact):
                one = self._of_gradients(method, plans)
                if (one.plan, one.sent_bytes) != (exact.plan, exact.sent_bytes):  # else it has nothing to add
                    found.append(one)
        periodic = [method for method in methods if isinstance(method, Periodic)]
        if periodic:
            alone = self._of_one_replica()
            found += [self._of_replicas(method, alone) for method in periodic]
        return found

    def _plans(self, graph: Graph) -> list[_Lowered]:
        """The given plan; or those that may be best under some method: the best ones where sums cost what exact sums
        cost, and where they cost nothing."""
        setup = self._setup
        if isinstance(self._wanted, Plan):
            return [_Lowered(graph, self._wanted)]
        found: dict[str, Plan] = {}
        for sums in (EXACT_SUM, FREE_SUM):
            cost = CostTable(setup.cluster, sums=sums)
            plans = ranked_plans(graph, setup.cluster, cost, self._wanted, setup.facts, limit=NUM_PLANS, refines=False)
            found |= {title(plan): plan for plan in plans if title(plan) not in found}
        return [_Lowered(graph, plan) for plan in found.values()]

    def _of_gradients(self, method: GradientMethod, plans: Sequence[_Lowered]) -> Estimate:
        facts = dataclasses.replace(self._setup, sync=method).facts
        cost = CostTable(self._setup.cluster, sums=sum_cost(method, self._parts, self._peers))
        priced = [(*lowered.price(facts, cost), title(lowered.plan)) for lowered in plans]
        step_time_s, sent_bytes, plan = min(priced)
        return self._estimate(method, plan, step_time_s, sent_bytes)

    def _of_one_replica(self) -> _Alone:
        """A step of one process with its part of the rows. Rows follow the processes' speed, so that all take as long
        as if they were alike."""
        setup, num = self._setup, self._peers.num
        rows = take_apart(self._batch).rows
        batch = cut_rows(self._batch, rows, 0, split_evenly(rows, num)[0])
        alone = own_cluster(setup.cluster, setup.team.rank)
        graph = setup.capture(batch)
        assert isinstance(self._wanted, Constraints)
        cost = CostTable(alone)
        plan = ranked_plans(graph, alone, cost, self._wanted, setup.facts, limit=1, refines=False)[0]
        assert plan.prediction is not None
        speeds = [_speed(setup.cluster, process) for process in setup.cluster.processes]
        own = _speed(setup.cluster, setup.cluster.processes[setup.team.rank])
        step_time_s = plan.prediction.step_time_s * own * num / sum(speeds)
        return _Alone(step_time_s=step_time_s, plan=plan, cost=cost)

    def _of_replicas(self, method: Periodic, alone: _Alone) -> Estimate:
        cost, link = periodic_cost(method, self._parts, self._peers), _slowest_link(self._setup.cluster)
        step_time_s = alone.step_time_s + cost.compute_s
        exchange_s = 2 * link.latency_s + cost.bytes_at_once / link.bytes_per_s
        per_step = cost.sent_bytes / cost.bytes_at_once  # exchanges
        if isinstance(method, StreamingDiLoCo):
            taken_s = alone.interruption_s(round(cost.bytes_at_once), self._peers.num)
            exchange_s = max(exchange_s - method.delay * step_time_s, taken_s)
        step_time_s += exchange_s * per_step
        plan = f"each process: {title(alone.plan)}"
        return self._estimate(method, plan, step_time_s, cost.sent_bytes * self._peers.num)

    def _estimate(self, method: Method, plan: str, step_time_s: float, sent_bytes: float) -> Estimate:
        factor = steps_factor(method, self._peers.num, self._setup.optimizer)
        assert factor is not None
        return Estimate(
            method=method, plan=plan, step_time_s=step_time_s, sent_bytes=float(sent_bytes), steps_factor=factor
        )


def _speed(cluster: Cluster, process: Process) -> float:
    return max(len(process.cores), 1) * (cluster.machines[process.machine].flops_per_s_per_core or 1.0)


def _slowest_link(cluster: Cluster) -> Link:
    machines = {process.machine for process in cluster.processes}
    return cluster.network if len(machines) > 1 else cluster.process_link
