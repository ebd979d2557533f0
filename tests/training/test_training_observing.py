"""Predictions from the steps of the adopted plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
import torch

import partita
from partita.cluster import Cluster
from partita.cost.table import CostTable
from partita.graph import capture
from partita.plan import Constraints, Plan
from partita.program import ProgramSet, lower
from partita.program.instructions import Run, Update
from partita.program.timeline import Timeline
from partita.simulator import simulate
from partita.training.job import Team
from partita.training.observing import keep, observed_plan
from partita.training.optimizers import OptimizerFacts
from tests.training.test_training_adopt import adam, batches, loss_fn, net, train

FACTS = OptimizerFacts.of(torch.optim.Adam([torch.zeros(1)]))


@pytest.fixture(scope="module")
def here() -> Cluster:
    return Cluster.detect()


def planned(cluster: Cluster, **constraints: Any) -> tuple[Plan, ProgramSet]:
    model, data = net(), batches(1)
    plan = partita.plan(
        model, loss_fn, data[0], cluster=cluster, constraints=Constraints(compiled=False, **constraints)
    )
    return plan, lower(capture(model, loss_fn, data[0]), plan)


def slowed(programs: ProgramSet, plan: Plan, cost: CostTable, factor: float) -> Timeline:
    """A step in which every segment and update takes `factor` times what the simulator says."""
    timeline = simulate(programs, plan, cost, optimizer=FACTS.name)
    events = [
        dataclasses.replace(event, end_s=event.start_s + factor * event.time_s)
        if event.kind in ("Run", "Update")
        else event
        for event in timeline.events
    ]
    return dataclasses.replace(timeline, events=tuple(events))


@pytest.mark.parametrize("constraints", [{"data": 2, "pipeline": 1}, {"data": 1, "pipeline": 2}])
def test_what_steps_took_is_what_is_predicted(here: Cluster, constraints: dict[str, int]) -> None:
    plan, programs = planned(here, **constraints)
    cost = CostTable(here)
    busy_s = simulate(programs, plan, cost, optimizer=FACTS.name).busy_time_s(0)
    steps = [slowed(programs, plan, cost, factor) for factor in (3.0, 50.0, 3.0)]  # one step was disturbed
    found = observed_plan(plan, programs, steps, here, FACTS, Team())
    again = CostTable(here)
    keep(again, plan, programs, steps, FACTS.name)
    assert simulate(programs, plan, again, optimizer=FACTS.name).busy_time_s(0) == pytest.approx(3 * busy_s, rel=0.25)
    assert plan.prediction is not None and found.prediction is not None
    assert found.prediction.uncertainty == cost.refined_uncertainty
    assert found.prediction.step_time_s > 1.5 * busy_s
    assert found.hash == plan.hash and found.prediction.memory_bytes == plan.prediction.memory_bytes


def test_every_segment_and_update_is_known_afterwards(here: Cluster) -> None:
    plan, programs = planned(here, data=2, pipeline=1)
    cost = CostTable(here)
    keep(cost, plan, programs, [slowed(programs, plan, cost, 1.0)], FACTS.name)
    for program in programs.programs:
        for item in program.instructions:
            if isinstance(item, Run):
                assert cost.knows_segment(item.segment, num_threads=1, compiled=False, num_active=2)
            if isinstance(item, Update):
                sizes = tuple(part.num_elements for part in item.slices)
                assert cost.knows_update(sizes, FACTS.name, num_threads=1, num_active=2)


def test_an_adopted_plan_is_predicted_from_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Plan, int]] = []

    def recorded(plan: Plan, programs: ProgramSet, timelines: list[Timeline], *rest: Any) -> Plan:
        calls.append((plan, len(timelines)))
        return observed_plan(plan, programs, timelines, *rest)

    monkeypatch.setattr("partita.training.parallelize.observed_plan", recorded)
    made, _, _ = train(batches(7))
    if made.plan.mode == "block":  # fastest here and now; nothing of it can be simulated
        assert not calls
        return
    ((plan, num_steps),) = calls
    assert num_steps == 5 and made.plan.hash == plan.hash
    assert (
        made.plan.prediction is not None
        and made.plan.prediction.uncertainty == CostTable(Cluster.detect()).refined_uncertainty
    )


def test_recording_for_the_prediction_is_not_the_users_timeline() -> None:
    model, data = net(), batches(60)
    with partita.parallelize(model, adam(model), loss_fn, data[0], compile=False) as step:
        for batch in data:
            step(batch)
            if step.is_settled:
                break
        assert step.timeline() is None


def test_a_plan_without_prediction_stays_as_it_is(here: Cluster) -> None:
    plan, programs = planned(here, data=2, pipeline=1)
    bare = msgspec.structs.replace(plan, prediction=None)
    steps = [slowed(programs, plan, CostTable(here), 2.0)]
    assert observed_plan(bare, programs, steps, here, FACTS, Team()) == bare
