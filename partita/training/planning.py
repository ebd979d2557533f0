"""From a captured graph to ranked plans: measured op times, exact search, and simulation of the best."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch

from partita.cluster import Cluster
from partita.cost.memory import STATE_ELEMENTS
from partita.cost.table import CostTable
from partita.errors import CaptureError, InfeasibleError
from partita.graph.graph import Graph
from partita.plan import Constraints, Plan, Worker, cluster_fingerprint
from partita.planner import search
from partita.program import Timeline, check, lower, microbatch_verdict
from partita.simulator import shared_bytes, simulate

# Seconds that measuring the ops of a new model may take; what is left over is estimated by the roofline.
WHOLE_GRAPH_BUDGET_S = 2.0
CANDIDATE_BUDGET_S = 1.0
SEGMENT_BUDGET_S = 3.0


@dataclass(frozen=True)
class OptimizerFacts:
    """What planning needs to know of an optimizer."""

    name: str = "SGD"
    state_bytes_per_element: float = 0.0

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer | None) -> OptimizerFacts:
        if optimizer is None:
            return cls()
        name = type(optimizer).__name__
        states = STATE_ELEMENTS.get(name, 2)
        if name == "SGD" and any(group.get("momentum", 0) for group in optimizer.param_groups):
            states = 1
        return cls(name, 4.0 * states)


def has_compiler() -> bool:
    """Whether Inductor can compile for the CPU: a C++ compiler is there."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


class Evaluator:
    """Prices plans by lowering and simulating them; on this machine, ops and segments that were not measured yet are
    measured within a budget."""

    def __init__(self, graph: Graph, cluster: Cluster, cost: CostTable, facts: OptimizerFacts) -> None:
        self.graph, self.cluster, self.cost, self.facts = graph, cluster, cost, facts

    def __call__(self, plan: Plan) -> Timeline:
        programs = lower(self.graph, plan)
        check(programs)
        if self.cluster.is_here:
            self._measure(plan, [segment.module for segment in programs.segments.values()])
        timeline = simulate(programs, plan, self.cost, optimizer=self.facts.name)
        shared = shared_bytes(
            self.graph, programs, optimizer_state_bytes_per_element=self.facts.state_bytes_per_element
        )
        return Timeline(
            events=timeline.events,
            step_time_s=timeline.step_time_s,
            peak_memory_bytes=timeline.peak_memory_bytes,
            shared_memory_bytes=shared,
            bytes_sent=timeline.bytes_sent,
        )

    def refine(self, plan: Plan) -> Timeline:
        """Like a call, after measuring the plan's uncompiled segments as a whole, as many at a time as there are
        workers."""
        programs = lower(self.graph, plan)
        if self.cluster.is_here and not plan.compiled:
            cores = [worker.cores for worker in plan.workers if worker.process == plan.workers[0].process]
            modules = {key: segment.module for key, segment in programs.segments.items()}
            self.cost.measure_segments(modules, cores, compiled=False, budget_s=SEGMENT_BUDGET_S)
        return self(plan)

    def _measure(self, plan: Plan, modules: list[torch.fx.GraphModule]) -> None:
        worker: Worker = plan.workers[0]
        self.cost.measure(modules, worker.cores, budget_s=CANDIDATE_BUDGET_S)


def ranked_plans(
    graph: Graph,
    cluster: Cluster,
    cost: CostTable,
    constraints: Constraints,
    facts: OptimizerFacts,
    *,
    limit: int = 4,
) -> tuple[Plan, ...]:
    """Plans best first, by simulation; plain PyTorch among them where the constraints allow it."""
    if cluster.is_here:
        for count in sorted({1, len(cluster.processes[0].cores)}):
            cost.measure([graph.module], cluster.processes[0].cores[:count], budget_s=WHOLE_GRAPH_BUDGET_S)
    may_cut = (
        graph.batch_size > 1 and microbatch_verdict(graph, 2, local_statistics=constraints.local_statistics) is None
    )
    return search(
        graph,
        cluster,
        cost,
        constraints=constraints,
        optimizer=facts.name,
        optimizer_state_bytes_per_element=facts.state_bytes_per_element,
        limit=limit,
        microbatches=may_cut or (constraints.num_microbatches or 1) > 1,
        evaluate=Evaluator(graph, cluster, cost, facts),
    )


def best_plan(
    graph: Graph, cluster: Cluster, constraints: Constraints, optimizer: torch.optim.Optimizer | None
) -> Plan:
    """The plan that is predicted to be fastest."""
    plans = ranked_plans(graph, cluster, CostTable(cluster), constraints, OptimizerFacts.of(optimizer))
    if not plans:
        raise InfeasibleError("no plan satisfies the constraints: free one of them")
    return plans[0]


def block_plan(cluster: Cluster, *, graph: Graph | None, reasons: tuple[str, ...], compiled: bool = False) -> Plan:
    """Plain PyTorch with all threads of process 0, as a plan."""
    process = cluster.processes[0]
    worker = Worker(index=0, process=0, machine=process.machine, cores=process.cores, stage=0, data=0)
    return Plan(
        mode="block",
        graph_fingerprint=graph.fingerprint if graph is not None else "",
        cluster_fingerprint=cluster_fingerprint(cluster),
        axes={"pipeline": 1, "data": 1},
        workers=(worker,),
        threads_per_worker=len(process.cores),
        compiled=compiled,
        reasons=reasons,
    )


def fallback_reasons(error: CaptureError) -> tuple[str, ...]:
    """Why a model runs as one block, and what that costs."""
    return (
        f"the step could not be captured as one graph: {error}",
        "it runs as one block of plain PyTorch on all threads of one process; other processes wait for its loss",
    )
