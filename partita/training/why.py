"""Explanations that need the model: `why` for plans for the machines here, and what would help them most."""

from __future__ import annotations

import math

import msgspec
import torch

from partita.cluster import Cluster
from partita.constraints import Constraints
from partita.cost.model import CollectiveKind
from partita.cost.table import CostTable
from partita.errors import InfeasibleError, InputError
from partita.graph.graph import Graph, InputKind, OutputKind
from partita.plan import Plan, Worker
from partita.plan_layout import Exchange
from partita.planner.intra import solve_intra, stage_from_graph
from partita.planner.intra.from_graph import Stage
from partita.planner.intra.why import exchanges_of_ops, in_full, ops_in, other_ways, placements_of_ops, with_rules
from partita.planner.scale.helps import MEMORY_FACTOR, RATE_FACTOR, Help
from partita.planner.tensor import rates_on
from partita.planner.why import Other, Why, is_in, unknown
from partita.training.optimizers import OptimizerFacts
from partita.training.planning import best_plan
from partita.units import format_time

TIME_LIMIT_S = 30.0


def why_here(plan: Plan, graph: Graph, cluster: Cluster, optimizer: torch.optim.Optimizer | None, name: str) -> Why:
    """How the ops of a module (or one op, or those that read a parameter) are placed, and why.

    Along the tensor axis the intra-stage programme is set up again, with ops run by the plan's rules; along the data
    axis every op has its rows, and the gradients of parameters are reduced (and sharded parameters gathered).

    Raises:
        PlanError: the plan is of another model or cluster.
        InputError: there is nothing called `name`.
    """
    plan.validate(graph, cluster)
    if plan.mode != "graph":
        raise InputError('--why needs a plan of mode "graph"; this one runs plain PyTorch as one block.')
    facts, cost = OptimizerFacts.of(optimizer), CostTable(cluster)
    first = [worker for worker in plan.workers if worker.stage == 0]
    tensor = tuple(worker for worker in first if worker.data == 0)
    data = tuple(worker for worker in first if worker.tensor == 0)
    state = facts.state_bytes_per_element
    groups = {"tensor": tensor} if len(tensor) > 1 else {"tensor": tensor[:1]}
    costs = rates_on(groups, len(plan.workers), cluster, cost, state_bytes_per_element=state)
    mesh = {axis: len(workers) for axis, workers in groups.items()}
    stage = stage_from_graph(graph, mesh, costs=costs, state_bytes_per_element=state, recompute=False)
    ops = _ops_of(stage, graph, name)
    parameters = _parameters_of(stage, graph, ops, name)
    placed = {one: plan.inputs.get(one, {}) for one in parameters}
    exchanges = _of_data(plan, graph, parameters, data, cost)
    others: list[Other] = []
    notes = ["along the data axis every worker has its rows of the batch."] if len(data) > 1 else []
    if len(tensor) > 1:
        planned = with_rules(stage, plan.rules)
        solution = solve_intra(planned, time_limit_s=TIME_LIMIT_S)
        taken = in_full(stage, planned, solution)
        exchanges += exchanges_of_ops(stage, solution, ops)
        others = other_ways(stage, taken, solution.objective_s, ops)
        placed |= placements_of_ops(stage, taken, ops)
        notes.append(
            "the tensor axis is priced for the whole batch by rates of this cluster (a roofline, latencies and "
            f"bandwidths), by which the step takes {format_time(solution.objective_s)} with the plan's rules."
        )
    return Why(
        name=name,
        placements=placed,
        exchanges=tuple(sorted(exchanges, key=lambda item: -item.time_s)),
        others=tuple(others),
        notes=tuple(notes or ["one worker a stage: nothing is cut or exchanged."]),
    )


def _ops_of(stage: Stage, graph: Graph, name: str) -> list[int]:
    nodes = {item.node for item in graph.inputs_of(InputKind.PARAMETER) if item.name == name}
    if nodes:
        seen = {value for item in stage.items if item is not None for value, _ in item.inputs if value.name in nodes}
        for item in stage.items:  # views of the parameter stand for it
            if item is not None and item.is_view and item.op.inputs[0] in seen:
                seen |= {value for value in item.op.outputs if value is not None}
        return [
            index
            for index, item in enumerate(stage.items)
            if item is not None and not item.is_view and any(value in seen for value, _ in item.inputs)
        ]
    found = ops_in(stage, lambda module, op: is_in(module, name) or op == name)
    if not found:
        items = [item for item in stage.items if item is not None]
        modules = [item.op.info.module for item in items if item.op.info is not None]
        raise unknown(name, [*modules, *(item.op.name for item in items), *(i.name for i in graph.inputs)])
    return found


def _parameters_of(stage: Stage, graph: Graph, ops: list[int], name: str) -> list[str]:
    """The parameter called `name`, those of the module, or those that the op reads."""
    names = {item.node: item.name for item in graph.inputs_of(InputKind.PARAMETER)}
    inside = [one for one in names.values() if is_in(one, name)]
    items = [stage.items[index] for index in ops]
    read = [names[v.name] for item in items if item is not None for v, _ in item.inputs if v.name in names]
    return inside or list(dict.fromkeys(read))


def _of_data(
    plan: Plan, graph: Graph, parameters: list[str], group: tuple[Worker, ...], cost: CostTable
) -> list[Exchange]:
    """Gradients' sums over the data axis; sharded parameters are gathered as well."""
    if len(group) < 2:
        return []
    inputs = {item.name: item for item in graph.inputs_of(InputKind.PARAMETER)}
    trained = {output.target for output in graph.outputs_of(OutputKind.GRADIENT)}
    tensor, found = plan.axes.get("tensor", 1), []
    across = len({worker.process for worker in group}) > 1
    for name in parameters:
        placed = plan.inputs.get(name, {})
        item = inputs[name]
        num_bytes = math.prod(item.shape) * item.dtype.itemsize // (tensor if "tensor" in placed else 1)
        kinds: list[tuple[str, CollectiveKind]] = []
        if "data" in placed:
            kinds = [("forward", "all_gather"), *([("backward", "reduce_scatter")] if name in trained else [])]  # type: ignore[list-item]
        elif name in trained:
            kinds = [("backward", "all_reduce" if across else "reduce_scatter")]
        for phase, kind in kinds:
            found.append(
                Exchange(
                    block="", value=name, module=name.rpartition(".")[0], phase=phase, axis="data", kind=kind,
                    source=placed.get("data", "R") if kind == "all_gather" else "P",
                    target="R" if kind != "reduce_scatter" else "S", num_bytes=float(num_bytes),
                    time_s=cost.collective_time_s(kind, num_bytes, group), count=1,
                )
            )  # fmt: skip
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
    quick = tuple(update(one, flops_per_s_per_core=RATE_FACTOR * one.flops_per_s_per_core) for one in cluster.machines)
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
