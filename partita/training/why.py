"""Explanations that need the model: `why` for plans for the machines here, and what would help them most."""

from __future__ import annotations

import msgspec
import torch

from partita.cluster import Cluster
from partita.constraints import Constraints
from partita.cost.table import CostTable
from partita.errors import InfeasibleError, InputError
from partita.graph.graph import Graph, InputKind
from partita.plan import Plan, Worker
from partita.planner.intra import solve_intra, stage_from_graph
from partita.planner.intra.from_graph import Stage
from partita.planner.intra.problem import IntraProblem
from partita.planner.intra.why import exchanges_of_ops, ops_in, other_ways, placements_of_ops, with_inputs
from partita.planner.scale.helps import MEMORY_FACTOR, RATE_FACTOR, Help
from partita.planner.tensor import rates_on
from partita.planner.why import Why, is_in, unknown
from partita.sharding.placement import Shard
from partita.training.optimizers import OptimizerFacts
from partita.training.planning import best_plan

TIME_LIMIT_S = 30.0


def why_here(
    plan: Plan, graph: Graph, cluster: Cluster, optimizer: torch.optim.Optimizer | None, name: str
) -> Why:
    """Placements of the ops of a module (or of one op, or those that read a parameter) over the data and tensor axes,
    derived again by the intra-stage programme with the plan's inputs placed as the plan says.

    Raises:
        PlanError: the plan is of another model or cluster.
        InputError: there is nothing called `name`.
    """
    plan.validate(graph, cluster)
    if plan.mode != "graph":
        raise InputError('--why needs a plan of mode "graph"; this one runs plain PyTorch as one block.')
    groups = _groups(plan)
    inputs = {item.name: axes for item in graph.inputs if (axes := plan.inputs.get(item.name)) is not None}
    if not groups:
        return Why(name=name, placements={}, exchanges=(), notes=("one worker a stage: nothing is cut or exchanged.",))
    facts = OptimizerFacts.of(optimizer)
    state = facts.state_bytes_per_element
    costs = rates_on(
        groups, len(plan.workers), cluster, CostTable(cluster), state_bytes_per_element=state
    )
    mesh = {axis: len(workers) for axis, workers in groups.items()}
    stage = stage_from_graph(graph, mesh, costs=costs, state_bytes_per_element=state, recompute=False)
    problem = _as_planned(stage, graph, plan)
    ops = _ops_of(stage, graph, name)
    solution = solve_intra(problem, time_limit_s=TIME_LIMIT_S)
    exchanges = exchanges_of_ops(stage, solution, ops)
    placed = {key: axes for key, axes in inputs.items() if is_in(key, name)}
    notes = (
        "derived for the whole batch from rates of this cluster (a roofline, latencies and bandwidths), "
        f"inputs placed as the plan says; the step by these rates: {solution.objective_s:.3g} s.",
    )
    return Why(
        name=name,
        placements={**placed, **placements_of_ops(stage, solution, ops)},
        exchanges=tuple(sorted(exchanges, key=lambda item: -item.time_s)),
        others=tuple(other_ways(stage, problem, solution, ops)),
        notes=notes,
    )


def _groups(plan: Plan) -> dict[str, tuple[Worker, ...]]:
    """One group of workers along every axis that has several, on the first stage."""
    first = [worker for worker in plan.workers if worker.stage == 0]
    found = {
        "data": tuple(worker for worker in first if worker.tensor == 0),
        "tensor": tuple(worker for worker in first if worker.data == 0),
    }
    return {axis: workers for axis, workers in found.items() if len(workers) > 1}


def _as_planned(stage: Stage, graph: Graph, plan: Plan) -> IntraProblem:
    """Inputs lie as the plan says: rows of the batch along the data axis, what `plan.inputs` names, all else whole."""
    named = {item.node: item for item in graph.inputs}

    def wanted(index: int, choice: int) -> bool:
        item = named.get(stage.names[index])
        if item is None or item.kind not in (InputKind.PARAMETER, InputKind.BATCH):
            return True
        for axis, placement in zip(stage.axes, stage.stored[index][choice].stored, strict=True):
            rows = item.kind is InputKind.BATCH and axis == "data" and graph.batch_size in item.shape[:1]
            text = plan.inputs.get(item.name, {}).get(axis, "S(0)" if rows else "R")
            if (f"S({placement.dim})" if isinstance(placement, Shard) else "R") != text:
                return False
        return True

    return with_inputs(stage.problem, wanted)


def _ops_of(stage: Stage, graph: Graph, name: str) -> list[int]:
    parameters = {item.node for item in graph.inputs_of(InputKind.PARAMETER) if item.name == name}
    if parameters:
        readers = [
            index
            for index, item in enumerate(stage.items)
            if item is not None and any(value.name in parameters for value, _ in item.inputs)
        ]
        return readers
    found = ops_in(stage, lambda module, op: is_in(module, name) or op == name)
    if not found:
        items = [item for item in stage.items if item is not None]
        modules = [item.op.info.module for item in items if item.op.info is not None]
        raise unknown(name, [*modules, *(item.op.name for item in items), *(i.name for i in graph.inputs)])
    return found


def what_helps_here(
    plan: Plan, graph: Graph, cluster: Cluster, optimizer: torch.optim.Optimizer | None, constraints: Constraints
) -> tuple[Help, ...]:
    """More memory, faster links, one more process: the search again on the changed cluster, without measuring it.

    Raises:
        PlanError: the plan is of another model or cluster.
    """
    plan.validate(graph, cluster)
    described = msgspec.structs.replace(cluster, is_here=False)
    now = _best_s(graph, described, optimizer, constraints)
    if now is None:
        raise InfeasibleError("no plan fits the cluster as it is")
    found = []
    for change, changed in _changes(described):
        after = _best_s(graph, changed, optimizer, constraints)
        if after is not None:
            found.append(
                Help(
                    change=change,
                    saved_s=max(0.0, now[0] - after[0]),
                    saved_at_most_s=max(0.0, now[0] - after[1]),
                    way=after[2],
                )
            )
    return tuple(sorted(found, key=lambda one: -one.saved_s))


def _best_s(
    graph: Graph, cluster: Cluster, optimizer: torch.optim.Optimizer | None, constraints: Constraints
) -> tuple[float, float, str] | None:
    from partita.planner.describe import title

    try:
        plan = best_plan(graph, cluster, constraints, optimizer)
    except InfeasibleError:
        return None
    assert plan.prediction is not None
    return plan.prediction.step_time_s, plan.prediction.lower_bound_s, title(plan)


def _changes(cluster: Cluster) -> list[tuple[str, Cluster]]:
    update = msgspec.structs.replace
    more = tuple(update(one, memory_bytes=int(MEMORY_FACTOR * one.memory_bytes)) for one in cluster.processes)
    faster = tuple(update(one, memory_bytes_per_s=RATE_FACTOR * one.memory_bytes_per_s) for one in cluster.machines)
    quick = tuple(
        update(one, flops_per_s_per_core=RATE_FACTOR * one.flops_per_s_per_core) for one in cluster.machines
    )
    changes = [
        (f"{MEMORY_FACTOR:g} times the memory of every process", update(cluster, processes=more)),
        (f"{RATE_FACTOR:g} times the memory bandwidth of every machine", update(cluster, machines=faster)),
        (f"{RATE_FACTOR:g} times the arithmetic of every core", update(cluster, machines=quick)),
    ]
    if len(cluster.processes) > 1:
        network = update(cluster.network, bytes_per_s=RATE_FACTOR * cluster.network.bytes_per_s)
        loop = update(cluster.process_link, bytes_per_s=RATE_FACTOR * cluster.process_link.bytes_per_s)
        changes.append((f"{RATE_FACTOR:g} times the bandwidth between processes",
                        update(cluster, network=network, process_link=loop)))  # fmt: skip
    last = cluster.processes[-1]
    machine = len(cluster.machines)
    twin = update(cluster.machines[last.machine], name=f"{cluster.machines[last.machine].name}+")
    process = update(last, rank=len(cluster.processes), machine=machine)
    changes.append(
        (
            "one more machine with a process like the last",
            update(cluster, machines=(*cluster.machines, twin), processes=(*cluster.processes, process)),
        )
    )
    return changes


