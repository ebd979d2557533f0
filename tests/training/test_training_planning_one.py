"""Where the network is slow, one of several processes may be faster alone."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

import partita
from partita import Cluster, Constraints
from partita.cluster.model import Link
from partita.cost.table import CostTable
from partita.graph import capture
from partita.planner.describe import explanation
from partita.simulator import simulate
from partita.training.optimizers import OptimizerFacts
from partita.training.parallelize import _finalists
from partita.training.planning import ranked_plans

BATCH = torch.randn(64, 64), torch.randint(0, 8, (64,))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)), nn.Linear(64, 8))


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def cluster(bytes_per_s: float, latency_s: float, preset: str = "3x1xcpu-2") -> Cluster:
    return msgspec.structs.replace(Cluster.preset(preset), network=Link(bytes_per_s=bytes_per_s, latency_s=latency_s))


def processes_of(plan: partita.Plan) -> set[int]:
    return {worker.process for worker in plan.workers}


def test_over_a_slow_network_one_process_works() -> None:
    model, where = net(), cluster(1e5, 1e-3)
    graph, facts = capture(model, loss_fn, BATCH), OptimizerFacts.of(torch.optim.AdamW(model.parameters()))
    plan = next(plan for plan in ranked_plans(graph, where, CostTable(where), Constraints(), facts, refines=False)
                if plan.mode == "graph")  # fmt: skip
    assert processes_of(plan) == {0}
    plan.validate(graph, where)
    assert "one of 3 processes makes the steps" in explanation(plan)
    assert plan.prediction is not None and plan.prediction.bytes_sent == 0


def test_over_a_fast_one_all_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(4)))
    batch = (torch.randn(8192, 512), torch.randint(0, 512, (8192,)))
    plan = partita.plan(model, loss_fn, batch, cluster=cluster(1e11, 1e-7))
    assert processes_of(plan) == {0, 1, 2}


@pytest.mark.parametrize("bytes_per_s", [1e5, 1e11])
def test_plans_of_one_are_among_the_candidates_under_one_bound(bytes_per_s: float) -> None:
    model, where = net(), cluster(bytes_per_s, 1e-4)
    graph, facts = capture(model, loss_fn, BATCH), OptimizerFacts.of(torch.optim.AdamW(model.parameters()))
    plans = ranked_plans(graph, where, CostTable(where), Constraints(), facts, refines=False)
    alone = [plan for plan in plans if plan.mode == "graph" and processes_of(plan) == {0}]
    assert {plan.compiled for plan in alone} == {False, True}
    bounds = {plan.prediction.lower_bound_s for plan in plans if plan.prediction is not None}
    assert len(bounds) == 1
    for plan in alone:  # the simulator agrees on all of the cluster
        programs = facts.lowered(graph, plan)
        told = simulate(programs, plan, CostTable(where), optimizer=facts.name, update_values=facts.update_values)
        assert plan.prediction is not None
        assert plan.prediction.step_time_s == pytest.approx(told.step_time_s, rel=1e-6)
    assert any(plan.compiled and processes_of(plan) == {0} for plan in _finalists(plans) if plan.mode == "graph")


def test_whoever_fixes_the_mesh_gets_it() -> None:
    model, where = net(), cluster(1e5, 1e-3)
    plan = partita.plan(model, loss_fn, BATCH, cluster=where, constraints=Constraints(data=3, pipeline=1))
    assert processes_of(plan) == {0, 1, 2}
    plan = partita.plan(model, loss_fn, BATCH, cluster=where, constraints=Constraints(num_workers=1))
    assert processes_of(plan) == {0} and plan.num_workers == 1
