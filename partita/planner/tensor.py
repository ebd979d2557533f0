"""The placements of a tensor axis: the intra-stage integer programme on that axis, with this cluster's rates.

The programme decides for every op of the step how it runs over the workers of the axis, and with it which parameters
and tensors of the batch come in cut. It counts with rates (a roofline, a latency and a bandwidth); the plan that comes
of it is priced like all others, by simulating its programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partita.cluster.model import Cluster
from partita.cost.model import CollectiveKind, CostModel
from partita.cost.roofline import rates_of
from partita.graph.graph import Graph, InputKind
from partita.plan import Worker
from partita.planner.intra import Link, StageRates, solve_intra, stage_from_graph
from partita.sharding.placement import Shard
from partita.sharding.propagate import DECOMPOSED

TIME_LIMIT_S = 20.0
AXIS = "tensor"
_SMALL_BYTES, _LARGE_BYTES = 64 * 1024, 64 * 1024 * 1024
_OP_LATENCY_S = 5e-6  # a small op's own time, until it is measured


@dataclass(frozen=True)
class TensorPlacement:
    """Inputs that are cut and rules of ops, as `Plan` has them; `gap` is how far the programme is from its bound."""

    inputs: dict[str, dict[str, str]]
    rules: dict[str, dict[str, str]]
    gap: float


def place_on_tensor_axis(
    graph: Graph,
    workers: tuple[Worker, ...],
    cluster: Cluster,
    cost: CostModel,
    *,
    state_bytes_per_element: float,
    rows: bool = True,
) -> TensorPlacement:
    """The fastest placements over one group of `workers`, those of one tensor axis.

    Args:
        rows: whether the rows of the batch may be cut; not where microbatches or a data axis cut them.

    Raises:
        SolverError: the solver's answer does not hold when it is priced anew.
    """
    size = len(workers)
    costs = rates_on({AXIS: workers}, size, cluster, cost, state_bytes_per_element=state_bytes_per_element)
    stage = stage_from_graph(
        graph, {AXIS: size}, costs=costs, state_bytes_per_element=state_bytes_per_element, recompute=False,
        rows=rows,
    )  # fmt: skip
    solution = solve_intra(stage.problem, time_limit_s=TIME_LIMIT_S)
    decisions = stage.decisions(solution)
    named = {item.node: item.name for kind in (InputKind.PARAMETER, InputKind.BATCH) for item in graph.inputs_of(kind)}
    inputs = {
        named[node]: {AXIS: f"S({placement[0].dim})"}
        for node, placement in decisions.inputs.items()
        if node in named and isinstance(placement[0], Shard)
    }
    rules = {op: {AXIS: texts[0]} for op, texts in decisions.rules.items()}
    rules |= {op: {AXIS: DECOMPOSED} for op in decisions.taken_apart}
    return TensorPlacement(inputs, rules, solution.gap)


def rates_on(
    groups: Mapping[str, tuple[Worker, ...]],
    num_active: int,
    cluster: Cluster,
    cost: CostModel,
    *,
    state_bytes_per_element: float,
) -> StageRates:
    """What ops and exchanges take where `num_active` workers of a machine compute at the same time.

    Args:
        groups: axis -> one group of workers along it.
    """
    first = next(iter(groups.values()))[0]
    rates = rates_of(cluster.machines[first.machine], first, launch_s=_OP_LATENCY_S)
    return StageRates(
        flops_per_s=rates.flops_per_s * rates.efficiency,
        memory_bytes_per_s=min(rates.bytes_per_s, rates.machine_bytes_per_s / num_active),
        links={axis: _link(cost, workers) for axis, workers in groups.items()},
        op_latency_s=_OP_LATENCY_S,
        update_bytes_per_element=12 + 2 * state_bytes_per_element,
    )


def _link(cost: CostModel, workers: tuple[Worker, ...]) -> Link:
    """Latency and bandwidth that give the cost model's times of a small and a large exchange."""
    kind: CollectiveKind = "reduce_scatter"
    size = len(workers)
    if size < 2:
        return Link(size=1, latency_s=0.0, bytes_per_s=1.0)  # nothing is exchanged
    small_s = cost.collective_time_s(kind, _SMALL_BYTES, workers)
    large_s = cost.collective_time_s(kind, _LARGE_BYTES, workers)
    per_byte_s = max((large_s - small_s) / (_LARGE_BYTES - _SMALL_BYTES), 1e-15)
    rounds_s = max(small_s - _SMALL_BYTES * per_byte_s, 0.0)
    share = (size - 1) / size
    return Link(size=size, latency_s=rounds_s / (size - 1), bytes_per_s=share / per_byte_s)
