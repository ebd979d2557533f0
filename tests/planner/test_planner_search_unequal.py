"""Plans for unequal machines against enumeration: of forced corners by the formula, and of all placements by simulating
their programs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import fx

import partita
from partita.cluster.model import Cluster, Link, Machine, Process
from partita.cost.table import CostTable, is_free
from partita.errors import InfeasibleError, PlanError
from partita.graph.capture import capture
from partita.graph.graph import Graph
from partita.plan import Constraints, Plan
from partita.planner import search, worker_layout
from partita.planner.work import measure_work
from partita.program import check, lower
from partita.simulator import simulate
from partita.units import split_evenly
from tests.planner.models import MODELS
from tests.planner.test_planner_search import SimpleCost


class UnequalCost(SimpleCost):
    """FLOPs at a rate of each machine; links take no time, so that nothing of the simulation is outside the formula."""

    def __init__(self, speeds: tuple[float, ...], link_s: float = 0.0) -> None:
        super().__init__(link_s=link_s)
        self.speeds = speeds

    def op_time_s(self, node: fx.Node, place: Any, *, num_active: float = 1) -> float:
        if is_free(node):
            return 0.0
        return 1e-6 + float(node.meta["op"].flops) * 1e-6 / self.speeds[place.machine] / len(place.cores)


def cluster_of(memory_bytes: tuple[int, ...], speeds: tuple[float, ...], cores: int = 1) -> Cluster:
    machines = tuple(
        Machine(
            name=str(i), cores=tuple(range(cores)), memory_bytes=num_bytes or 2**40, flops_per_s_per_core=1e9 * speed,
            memory_bytes_per_s=1e9 * speed,
        )
        for i, (num_bytes, speed) in enumerate(zip(memory_bytes, speeds, strict=True))
    )  # fmt: skip
    link = Link(bytes_per_s=1e9, latency_s=1e-5)
    return Cluster(
        machines=machines,
        network=link,
        process_link=link,
        processes=tuple(
            Process(rank=i, machine=i, cores=machine.cores, memory_bytes=memory_bytes[i])
            for i, machine in enumerate(machines)
        ),
    )


def graph_of(name: str) -> Graph:
    torch.manual_seed(0)
    return capture(*MODELS[name]())


def time_of(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_time_s


def simulated_s(graph: Graph, plan: Plan, cost: Any) -> float:
    programs = lower(graph, plan)
    check(programs)
    return simulate(programs, plan, cost).step_time_s


def everywhere(graph: Graph, cluster: Cluster, template: Plan) -> Iterator[Plan]:
    """The plan with every order of processes, every number of workers, all shares, and all stage boundaries through
    which gradients flow (behind others only the loss is left, and the formula lets the other stages wait for it)."""
    work = measure_work(graph)
    cuts = [name for name, num_bytes in zip(work.names, work.back_bytes, strict=True) if num_bytes > 0]
    ranks = [process.rank for process in cluster.processes]
    pipeline, data = template.axes["pipeline"], template.axes["data"]
    total = pipeline * data
    rooms = [range(1, len(process.cores) + 1) for process in cluster.processes]
    for order, counts in product(permutations(ranks), product(*rooms)):
        if sum(counts) != total:
            continue
        deal = tuple((rank, counts[rank]) for rank in order)
        workers = worker_layout(cluster, data, pipeline, total, 1, deal=deal)
        for shares in product(range(1, graph.batch_size), repeat=data) if data > 1 else [(graph.batch_size,)]:
            if sum(shares) == graph.batch_size:
                for starts in combinations(cuts, pipeline - 1):
                    yield msgspec.structs.replace(template, workers=workers, shares=shares, stage_starts=starts)


@pytest.mark.parametrize("speeds", [(1.0, 4.0), (3.0, 1.0)])
@pytest.mark.parametrize(("schedule", "num_microbatches"), [("1f1b", 4), ("gpipe", 4), ("1f1b", 2), ("1f1b", 1)])
def test_no_order_and_no_boundaries_simulate_faster(
    speeds: tuple[float, ...], schedule: Any, num_microbatches: int
) -> None:
    graph, cluster, cost = graph_of("chain"), cluster_of((0, 0), speeds), UnequalCost(speeds)
    wanted = Constraints(
        pipeline=2, data=1, num_microbatches=num_microbatches, schedule=schedule, compiled=False, threads_per_worker=1
    )
    found = search(graph, cluster, cost, constraints=wanted, microbatches=True, limit=1)[0]
    times = [simulated_s(graph, plan, cost) for plan in everywhere(graph, cluster, found)]
    assert len(times) >= 16
    assert time_of(found) <= min(times) * (1 + 1e-3)
    assert time_of(found) == pytest.approx(simulated_s(graph, found, cost), rel=1e-3)
    assert found.prediction is not None and found.prediction.gap == pytest.approx(0.0, abs=1e-6)


def test_no_shares_simulate_faster() -> None:
    speeds = (1.0, 3.0)
    graph, cluster, cost = graph_of("chain"), cluster_of((0, 0), speeds), UnequalCost(speeds)
    wanted = Constraints(pipeline=1, data=2, num_microbatches=1, compiled=False, threads_per_worker=1)
    found = search(graph, cluster, cost, constraints=wanted, limit=1)[0]
    times = [simulated_s(graph, plan, cost) for plan in everywhere(graph, cluster, found)]
    assert len(times) == 2 * 15
    assert found.shares == (4, 12)
    assert time_of(found) == pytest.approx(min(times), rel=1e-3)


def test_no_division_of_the_workers_simulates_faster() -> None:
    """Three workers on two machines of two cores: two of them on the fast one."""
    speeds = (1.0, 2.0)
    graph, cluster, cost = graph_of("chain"), cluster_of((0, 0), speeds, cores=2), UnequalCost(speeds)
    wanted = Constraints(pipeline=3, data=1, num_microbatches=4, schedule="1f1b", compiled=False, threads_per_worker=1)
    found = search(graph, cluster, cost, constraints=wanted, microbatches=True, limit=1)[0]
    times = [simulated_s(graph, plan, cost) for plan in everywhere(graph, cluster, found)]
    assert sorted(worker.process for worker in found.workers) == [0, 1, 1]
    assert time_of(found) == pytest.approx(min(times), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 4.0)])
@pytest.mark.parametrize("memory", [(0, 0), (30_000, 60_000)])
def test_equals_the_best_of_all_forced_corners(name: str, speeds: tuple[float, ...], memory: tuple[int, ...]) -> None:
    """Forced stage boundaries are priced without the solver; the best of all corners is what the free search finds."""
    graph, cluster, cost = graph_of(name), cluster_of(memory, speeds), UnequalCost(speeds, link_s=2e-4)

    def best(**fixed: Any) -> Plan | None:
        wanted = Constraints(compiled=False, threads_per_worker=1, num_workers=2, **fixed)
        try:
            plans = search(
                graph, cluster, cost, constraints=wanted, microbatches=True, limit=1,
                optimizer_state_bytes_per_element=8,
            )  # fmt: skip
        except InfeasibleError:
            return None
        return plans[0]

    names = measure_work(graph).names
    starts = [(name,) for name in names[1 :: max(len(names) // 25, 1)]]
    found = best()
    forced = []
    for m, schedule in product((1, 2, 4, 8), ("1f1b", "gpipe")):
        forced.append(best(pipeline=1, data=2, num_microbatches=m, schedule=schedule))
        corner = best(pipeline=2, data=1, num_microbatches=m, schedule=schedule)
        split = [
            best(pipeline=2, data=1, num_microbatches=m, schedule=schedule, stage_starts=start) for start in starts
        ]
        if corner is not None:
            split.append(best(pipeline=2, num_microbatches=m, schedule=schedule, stage_starts=corner.stage_starts))
        times = [time_of(plan) for plan in split if plan is not None]
        assert (corner is None) == (not times)
        if corner is not None:
            assert time_of(corner) == pytest.approx(min(times), rel=1e-9)
        forced.append(corner)
    possible = [time_of(plan) for plan in forced if plan is not None]
    if found is None:
        assert not possible
        return
    assert time_of(found) <= min(possible) * (1 + 1e-9)
    assert found.prediction is not None
    assert found.prediction.lower_bound_s <= time_of(found) * (1 + 1e-9)
    assert found.prediction.lower_bound_s >= time_of(found) * (1 - 1e-6)
    if found.num_microbatches in (1, 2, 4, 8):
        assert time_of(found) == pytest.approx(min(possible), rel=1e-9)


def test_small_memory_on_the_fast_machine_moves_the_boundary() -> None:
    graph, speeds = graph_of("chain"), (4.0, 1.0)
    wanted = Constraints(pipeline=2, data=1, num_microbatches=4, compiled=False)
    free = search(graph, cluster_of((0, 0), speeds), UnequalCost(speeds), constraints=wanted, microbatches=True)[0]
    tight = cluster_of((6_000, 0), speeds)
    held = search(graph, tight, UnequalCost(speeds), constraints=wanted, microbatches=True)[0]
    assert held.prediction is not None and free.prediction is not None
    assert held.prediction.memory_bytes["0"] <= 6_000 < free.prediction.memory_bytes["0"]
    assert time_of(held) > time_of(free)
    none = cluster_of((500, 500), speeds)
    with pytest.raises(InfeasibleError, match="smallest change"):
        search(graph, none, UnequalCost(speeds), constraints=wanted, microbatches=True)


@pytest.mark.parametrize("name", MODELS)
def test_plan_of_a_cluster_file(name: str, tmp_path: Path) -> None:
    """The public way: a described cluster of a fast and a slow machine; the plan runs in the simulator and says so."""
    cluster_of((2**30, 2**30), (8.0, 1.0), cores=2).save(tmp_path / "cluster.toml")
    cluster = Cluster.load(tmp_path / "cluster.toml")
    torch.manual_seed(0)
    model, loss_fn, batch = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = Constraints(pipeline=2, num_workers=2, compiled=False)
    plan = partita.plan(model, loss_fn, batch, optimizer=optimizer, cluster=cluster, constraints=wanted)
    graph = capture(model, loss_fn, batch)
    plan.validate(graph, cluster)
    assert {worker.process for worker in plan.workers} == {0, 1}
    assert simulated_s(graph, plan, CostTable(cluster)) == pytest.approx(time_of(plan), rel=1e-6)
    work = measure_work(graph)
    place = work.names.index(plan.stage_starts[0])
    fast = next(worker.stage for worker in plan.workers if worker.machine == 0)
    held = place if fast == 0 else len(work.names) - place
    assert held > len(work.names) / 2
    assert plan.prediction is not None and plan.prediction.lower_bound_s <= time_of(plan)
    assert "orders" in plan.explain()


def test_shares_are_even_where_columns_are() -> None:
    """Two columns of a fast and a slow worker each: nothing to gain from uneven shares."""
    speeds = (4.0, 1.0)
    cluster, graph = cluster_of((0, 0), speeds, cores=2), graph_of("chain")
    wanted = Constraints(pipeline=2, data=2, num_microbatches=2, compiled=False, threads_per_worker=1)
    found = search(graph, cluster, UnequalCost(speeds), constraints=wanted, microbatches=True, limit=1)[0]
    assert found.shares == split_evenly(graph.batch_size, 2)
    with pytest.raises(PlanError):
        lower(graph, msgspec.structs.replace(found, shares=(20, 20)))


def test_stages_of_one_process_share_its_memory() -> None:
    """Every stage alone would fit; together they must as well, or the plan says what is missing."""
    graph = graph_of("chain")
    wanted = Constraints(pipeline=2, data=1, num_microbatches=4, compiled=False, threads_per_worker=1)

    def plan_in(memory_bytes: int) -> Plan:
        cluster = cluster_of((memory_bytes,), (1.0,), cores=2)
        return search(graph, cluster, UnequalCost((1.0,)), constraints=wanted, microbatches=True)[0]

    free = plan_in(0).prediction
    assert free is not None
    need = free.memory_bytes["0"]
    held = plan_in(need).prediction
    assert held is not None and held.memory_bytes["0"] <= need
    assert held.lower_bound_s <= held.step_time_s
    with pytest.raises(InfeasibleError, match="smallest change"):
        plan_in(need // 2)
