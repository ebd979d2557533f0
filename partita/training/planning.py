"""From a captured graph to ranked plans: measured op times, exact search, simulation of the best, and measured parts of
the best of these."""

from __future__ import annotations

import dataclasses
import os
import shutil

import msgspec
import torch

from partita.cluster import Cluster
from partita.cost.table import CostTable
from partita.errors import CaptureError, InfeasibleError, PlanError
from partita.graph.graph import Graph
from partita.plan import Constraints, Plan, Worker, cluster_fingerprint
from partita.planner.search import search
from partita.program import ProgramSet, Timeline, check, microbatch_verdict
from partita.runtime.overheads import measure_overheads
from partita.simulator import shared_bytes, simulate
from partita.training.job import Team
from partita.training.measuring import PartMeasurer, StepValues
from partita.training.optimizers import OptimizerFacts
from partita.training.update_costs import agreed_costs
from partita.units import proportional

# Seconds that measuring the ops of a new model may take; what is left over is estimated by the roofline.
WHOLE_GRAPH_BUDGET_S = 2.0
CANDIDATE_BUDGET_S = 1.0
NUM_OF_FIRST = 2  # plans of the first process alone, of each kind


def has_compiler() -> bool:
    """Whether Inductor can compile for the CPU: a C++ compiler is there."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


class Evaluator:
    """Prices plans by lowering and simulating them. On this machine, ops that were not measured yet are measured within
    a budget first; `refine` measures the plan's segments and updates."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        cost: CostTable,
        facts: OptimizerFacts,
        values: StepValues | None = None,
        measures_ops: bool = True,
    ) -> None:
        self.graph, self.cluster, self.cost, self.facts = graph, cluster, cost, facts
        self._measures_ops = measures_ops and cluster.is_here
        self._measurer = PartMeasurer(graph, cost, values or StepValues(), facts)
        if cluster.is_here:
            cost.measure_overheads(measure_overheads)

    def __call__(self, plan: Plan) -> Timeline:
        programs = self._lowered(plan)
        if self._measures_ops:
            modules = [segment.module for segment in programs.segments.values()]
            self.cost.measure(modules, plan.workers[0].cores, budget_s=CANDIDATE_BUDGET_S)
        return self._simulated(programs, plan)

    def refine(self, plan: Plan) -> Timeline:
        """Like a call, after measuring the plan's segments as a whole, as many at a time as there are workers."""
        programs = self._lowered(plan)
        if self.cluster.is_here:
            modules = [draw.module for draw in programs.draws]
            self.cost.measure(modules, plan.workers[0].cores, budget_s=CANDIDATE_BUDGET_S)
            self._measurer.measure(programs, plan)
        return self._simulated(programs, plan)

    def _lowered(self, plan: Plan) -> ProgramSet:
        programs = self.facts.lowered(self.graph, plan)
        check(programs)
        return programs

    def _simulated(self, programs: ProgramSet, plan: Plan) -> Timeline:
        timeline = simulate(
            programs, plan, self.cost, optimizer=self.facts.name, update_values=self.facts.update_values
        )
        shared = shared_bytes(
            self.graph, programs, optimizer_state_bytes_per_element=self.facts.state_bytes_per_element
        )
        return dataclasses.replace(timeline, shared_memory_bytes=shared)


def ranked_plans(
    graph: Graph,
    cluster: Cluster,
    cost: CostTable,
    constraints: Constraints,
    facts: OptimizerFacts,
    *,
    limit: int = 4,
    values: StepValues | None = None,
    refines: bool = True,
) -> tuple[Plan, ...]:
    """Plans best first, by simulation; plain PyTorch among them where the constraints allow it. `refines`: parts of the
    best are measured as a whole, which compiles them; there is no need where plans are run before one is adopted. The
    random state is left as it was. Of several processes, the best plans of the first one alone are among them as well:
    over a slow network, what the others add may take longer than it saves."""
    with torch.random.fork_rng(devices=[]):  # what is measured is made up, and some of it draws
        if len(cluster.processes) == 1 or not _may_use_one(constraints):
            return _ranked(graph, cluster, cost, constraints, facts, limit, values, refines)
        alone = _plans_of_first(graph, cluster, constraints, facts, values, refines)
        try:
            plans = _ranked(graph, cluster, cost, constraints, facts, limit, values, refines)
        except InfeasibleError:
            if not alone:
                raise
            return tuple(alone)
        return _merged(plans, alone)


def _may_use_one(constraints: Constraints) -> bool:
    """Whether the workers may all be those of one process."""
    mesh = {constraints.data, constraints.pipeline, constraints.tensor}
    if constraints.num_workers == 1:
        return mesh <= {None, 1}
    fixed = constraints.num_workers or constraints.fully_sharded or constraints.inputs or constraints.stage_starts
    return mesh == {None} and not fixed


def _plans_of_first(
    graph: Graph,
    cluster: Cluster,
    constraints: Constraints,
    facts: OptimizerFacts,
    values: StepValues | None,
    refines: bool,
) -> list[Plan]:
    """The best plans of the first process alone, compiled and not, as plans of the whole cluster."""
    first = cluster.processes[0]
    alone = msgspec.structs.replace(
        cluster, machines=(cluster.machines[first.machine],), processes=(msgspec.structs.replace(first, machine=0),)
    )
    limit = min(NUM_OF_FIRST, len(first.cores))  # on one core they hardly differ, and each must be compiled
    try:
        plans = _ranked(graph, alone, CostTable(alone), constraints, facts, limit, values, refines)
    except InfeasibleError:  # its memory is too small, or it has too few cores
        return []
    reason = f"one of {len(cluster.processes)} processes makes the steps; the others wait for its loss"
    return [
        msgspec.structs.replace(
            plan,
            cluster_fingerprint=cluster_fingerprint(cluster),
            workers=tuple(msgspec.structs.replace(worker, machine=first.machine) for worker in plan.workers),
            reasons=(*plan.reasons, reason),
        )
        for plan in plans
        if plan.mode == "graph"
    ]


def _merged(plans: tuple[Plan, ...], others: list[Plan]) -> tuple[Plan, ...]:
    """All of them, best first, under the lower of the two bounds."""
    found = list(plans)
    for other in others:
        slower = [place for place, plan in enumerate(found) if _time_s(plan) > _time_s(other)]
        found.insert(min(slower, default=len(found)), other)
    bound_s = min((plan.prediction.lower_bound_s for plan in found if plan.prediction is not None), default=0.0)
    return tuple(
        msgspec.structs.replace(plan, prediction=msgspec.structs.replace(plan.prediction, lower_bound_s=bound_s))
        if plan.prediction is not None
        else plan
        for plan in found
    )


def _time_s(plan: Plan) -> float:
    return plan.prediction.step_time_s if plan.prediction is not None else 0.0


def _ranked(
    graph: Graph,
    cluster: Cluster,
    cost: CostTable,
    constraints: Constraints,
    facts: OptimizerFacts,
    limit: int,
    values: StepValues | None,
    refines: bool,
) -> tuple[Plan, ...]:
    may_cut = (
        graph.batch_size > 1 and microbatch_verdict(graph, 2, local_statistics=constraints.local_statistics) is None
    )
    compares = not _leaves_one_plan(constraints, may_cut)
    if cluster.is_here and compares:
        for count in sorted({1, len(cluster.processes[0].cores)}):
            cost.measure([graph.module], cluster.processes[0].cores[:count], budget_s=WHOLE_GRAPH_BUDGET_S)
    evaluator = Evaluator(graph, cluster, cost, facts, values, measures_ops=compares)
    return search(
        graph,
        cluster,
        cost,
        constraints=constraints,
        optimizer=facts.name,
        optimizer_state_bytes_per_element=facts.state_bytes_per_element,
        limit=limit,
        microbatches=may_cut or (constraints.num_microbatches or 1) > 1,
        evaluate=evaluator,
        refine=evaluator.refine if cluster.is_here and refines else None,
    )


def _leaves_one_plan(constraints: Constraints, may_cut: bool) -> bool:
    """Whether the constraints decide everything: then no op has to be measured to compare plans."""
    fixed = (constraints.data, constraints.pipeline, constraints.threads_per_worker, constraints.compiled)
    if None in fixed or (may_cut and constraints.num_microbatches is None):
        return False
    staged = constraints.pipeline == 1 or constraints.stage_starts is not None
    return staged and (constraints.pipeline == 1 or constraints.schedule is not None or not may_cut)


def best_plan(
    graph: Graph,
    cluster: Cluster,
    constraints: Constraints,
    optimizer: torch.optim.Optimizer | None,
    values: StepValues | None = None,
) -> Plan:
    """The plan that is predicted to be fastest."""
    facts = OptimizerFacts.of(optimizer)
    if optimizer is not None and facts.kind == "parameter" and cluster.is_here and values is not None:
        costs = agreed_costs(optimizer, values.parameters, cluster, Team(), masters=False)
        facts = dataclasses.replace(facts, costs=costs)
    plans = ranked_plans(graph, cluster, CostTable(cluster), constraints, facts, values=values)
    if not plans:
        raise InfeasibleError("no plan satisfies the constraints: free one of them")
    return plans[0]


def block_plan(
    cluster: Cluster,
    *,
    graph: Graph | None,
    reasons: tuple[str, ...],
    compiled: bool = False,
    num_threads: int | None = None,
) -> Plan:
    """Plain PyTorch with all threads of process 0, or so many, as a plan."""
    process = cluster.processes[0]
    worker = Worker(index=0, process=0, machine=process.machine, cores=process.cores, stage=0, data=0)
    return Plan(
        mode="block",
        graph_fingerprint=graph.fingerprint if graph is not None else "",
        cluster_fingerprint=cluster_fingerprint(cluster),
        axes={"pipeline": 1, "data": 1},
        workers=(worker,),
        threads_per_worker=num_threads or len(process.cores),
        compiled=compiled,
        reasons=reasons,
    )


def fallback_reasons(error: CaptureError) -> tuple[str, ...]:
    """Why a model runs as one block, and what that costs."""
    return (
        f"the step could not be captured as one graph: {error}",
        "it runs as one block of plain PyTorch on all threads of one process; other processes wait for its loss",
    )


class TooFewRowsError(PlanError):
    """A batch cannot be dealt out to all data workers."""


def adapted_plan(plan: Plan, graph: Graph) -> Plan:
    """The same split for another batch shape: rows in the same proportion, fewer microbatches where there are too few.

    Raises:
        TooFewRowsError: the batch has fewer rows than the data axis has workers.
    """
    num_data = plan.axes.get("data", 1)
    if graph.batch_size < num_data:
        raise TooFewRowsError(
            f"the batch has {graph.batch_size} rows for {num_data} data workers; it runs as one block"
        )
    microbatches = plan.num_microbatches
    while microbatches > 1 and graph.batch_size < microbatches * num_data:
        microbatches -= 1
    return msgspec.structs.replace(
        plan,
        graph_fingerprint=graph.fingerprint,
        num_microbatches=microbatches,
        shares=proportional(graph.batch_size, plan.shares or (1,) * num_data) if num_data > 1 else (),
        compiled=False,
        prediction=None,
    )
