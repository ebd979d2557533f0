"""Plans of mode "layout": what `partita.plan` gives for described GPUs, and its explanations."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import partita
from partita.cost.networks import Fabric
from partita.errors import InfeasibleError, InputError, PlanError
from partita.plan import Constraints, Plan
from partita.plan_layout import Layout, MachineGroup, worker_of
from partita.planner.describe import comparison
from partita.planner.scale.as_plan import scale_constraints
from partita.planner.scale.helps import what_helps
from partita.planner.scale.plan import ScalePlanner
from partita.planner.scale.why import why_at_scale
from partita.planner.why import is_in, why_in_plan
from partita.training.described import described_plan
from tests.planner import scale_models as models

CLUSTER = partita.Cluster.preset("2x8xH100")
FABRIC = Fabric.of_cluster(CLUSTER)


@pytest.fixture(scope="module")
def planner() -> ScalePlanner:
    return ScalePlanner(*models.gpt())


@pytest.fixture(scope="module")
def plan(planner: ScalePlanner) -> Plan:
    return described_plan(planner, CLUSTER, Constraints(tensor=4, pipeline=2))


def test_the_public_call_gives_a_layout() -> None:
    found = partita.plan(*models.gpt(), cluster=CLUSTER, constraints=Constraints(pipeline=2, zero_stage=0))
    layout, prediction = found.layout, found.prediction
    assert layout is not None and prediction is not None and found.mode == "layout"
    assert found.axes["pipeline"] == 2 and found.zero_stage == 0
    assert found.axes["data"] * (found.micro_batch or 0) * found.num_microbatches == 64 == layout.global_batch
    assert sum(layout.num_layers) == 8 and prediction.lower_bound_s <= prediction.step_time_s
    assert found.num_workers == len(found.workers) == math.prod(found.axes.values())
    assert found.reasons and found.alternatives
    assert Plan.from_json(found.to_json()) == found


def test_plans_of_thousands_of_gpus_stay_small() -> None:
    model, loss_fn, _ = models.gpt()
    with torch.device("meta"):
        ids = torch.zeros(16384, 256, dtype=torch.long)
    many = partita.Cluster.preset("2048x8xH100")
    found = partita.plan(model, loss_fn, (ids, ids), cluster=many, constraints=Constraints(data=4096, pipeline=2))
    assert found.num_workers > 2000 and found.workers == ()
    assert len(found.to_json()) < 100_000
    assert Plan.from_json(found.to_json()) == found
    assert found.worker(found.num_workers - 1).stage == found.axes["pipeline"] - 1
    with pytest.raises(PlanError, match="no worker"):
        found.worker(found.num_workers)


@given(*(st.integers(1, 4) for _ in range(4)), st.integers(1, 8))
def test_every_coordinate_has_one_worker(tensor: int, context: int, data: int, pipeline: int, size: int) -> None:
    axes = {"tensor": tensor, "context": context, "data": data, "pipeline": pipeline}
    count = math.prod(axes.values())
    layout = Layout(
        machines=(MachineGroup(kind="H100", num_machines=-(-count // size), gpus_per_machine=size),),
        stages=((("a", "b"),),) * pipeline,
        num_layers=(1,) * pipeline,
        global_batch=data,
    )
    workers = [worker_of(layout, axes, rank) for rank in range(count)]
    assert len({(w.stage, w.data, w.context, w.tensor) for w in workers}) == count
    assert all((w.machine, w.gpu) == divmod(w.index, size) for w in workers)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layout": None}, "layout exactly"),
        ({"micro_batch": 3}, "must be the batch of 64"),
        ({"num_virtual_stages": 5}, "5 chunks"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"axes": {"pipeline": 2, "data": 64, "tensor": 4}}, "fit the 16 GPUs"),
    ],
)
def test_inconsistent_layouts_are_refused(plan: Plan, change: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        msgspec.structs.replace(plan, **change)


def test_a_listed_worker_must_lie_where_the_layout_says(plan: Plan) -> None:
    moved = (msgspec.structs.replace(plan.workers[0], machine=1), *plan.workers[1:])
    with pytest.raises(PlanError, match="worker 0"):
        msgspec.structs.replace(plan, workers=moved)


def test_the_runtime_refuses_what_it_does_not_have(plan: Plan) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: Any, batch: Any) -> Any:
        return model(batch).sum()

    with pytest.raises(PlanError, match="layout for described GPUs"):
        partita.parallelize(model, optimizer, loss_fn, torch.zeros(4, 4), plan=plan)
    with pytest.raises(InputError, match="zero_stage"):
        partita.parallelize(model, optimizer, loss_fn, torch.zeros(4, 4), plan=Constraints(zero_stage=1))
    with pytest.raises(InputError, match="recompute"):
        partita.plan(model, loss_fn, torch.zeros(4, 4), constraints=Constraints(recompute="full"))


def test_validate_compares_the_machines(plan: Plan) -> None:
    plan.validate(None, CLUSTER)
    with pytest.raises(PlanError, match="another cluster"):
        plan.validate(None, partita.Cluster.preset("4x8xH100"))


@pytest.mark.parametrize(
    ("constraints", "match"),
    [
        (Constraints(num_workers=4), "num_workers"),
        (Constraints(schedule="gpipe"), "gpipe"),
        (Constraints(num_microbatches=4), "must come with"),
        (Constraints(num_microbatches=5, data=2), "must be the batch"),
        (Constraints(fully_sharded=True, zero_stage=1), "zero_stage=3"),
        (Constraints(schedule="1f1b", num_virtual_stages=2), "one chunk"),
    ],
)
def test_constraints_that_described_gpus_do_not_have(constraints: Constraints, match: str) -> None:
    with pytest.raises(InputError, match=match):
        scale_constraints(constraints, 64)


def test_microbatches_give_the_third_factor_of_the_batch() -> None:
    assert scale_constraints(Constraints(num_microbatches=4, data=2), 64).micro_batch == 8
    assert scale_constraints(Constraints(num_microbatches=4, micro_batch=2), 64).data == 8


def test_what_does_not_fit_names_the_smallest_change() -> None:
    planner = ScalePlanner(*models.gpt(layers=48, hidden=4096, heads=32))
    with pytest.raises(InfeasibleError, match=r"smallest change .* times the memory .*, or \d+ such") as end:
        described_plan(planner, partita.Cluster.preset("1x4xA100-40"), Constraints())
    machines = int(str(end.value).rsplit("or ", 1)[1].split()[0])
    described_plan(planner, partita.Cluster.preset(f"{machines}x4xA100-40"), Constraints())
    with pytest.raises(InfeasibleError):
        described_plan(planner, partita.Cluster.preset(f"{machines - 1}x4xA100-40"), Constraints())


def test_exchanges_of_a_block_are_those_of_its_placements(plan: Plan, planner: ScalePlanner) -> None:
    found = why_in_plan(plan, "blocks.3.up.weight")
    assert list(found.placements) == ["blocks.*.up.weight"]
    gradients = [item for item in found.exchanges if item.axis == "data" and item.phase == "backward"]
    size = 512 * 2048 // plan.axes["tensor"]
    assert [item.num_bytes for item in gradients] == [planner.state.exchange_bytes * size]
    assert "instead" not in str(found)
    with pytest.raises(InputError, match=r"Nearest: .*blocks"):
        why_in_plan(plan, "blocks.3.upp")


def test_other_placements_have_prices(plan: Plan, planner: ScalePlanner) -> None:
    found = why_at_scale(plan, planner, FABRIC, "blocks.*.up.weight")
    assert {other.text for other in found.others} == {"R", "S(1)"}
    assert plan.prediction is not None
    for other in found.others:
        if other.time_s is not None and other.slower_s is not None:
            assert other.time_s - other.slower_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
    changed = msgspec.structs.replace(plan, graph_fingerprint="another")
    with pytest.raises(PlanError, match="must be of the given model"):
        why_at_scale(changed, planner, FABRIC, "head")


def test_more_of_a_resource_never_harms(planner: ScalePlanner) -> None:
    free = described_plan(planner, CLUSTER, Constraints())
    assert free.prediction is not None
    helps = what_helps(planner, FABRIC, free.prediction.step_time_s)
    assert len(helps) == 4 and all(0 <= one.saved_s <= one.saved_at_most_s for one in helps)
    assert [one.saved_s for one in helps] == sorted((one.saved_s for one in helps), reverse=True)
    slower = what_helps(planner, FABRIC, 2 * free.prediction.step_time_s)
    assert slower[0].change == "another plan on the same GPUs"


def test_names_match_patterns() -> None:
    assert is_in("layers.*.up.weight", "layers.3.up") and is_in("layers.*[1].up", "layers.0")
    assert not is_in("layers.*.up", "layers.3.upper") and not is_in("layers.*", "layers.3.up")


def test_the_difference_of_two_plans_is_told(plan: Plan, planner: ScalePlanner) -> None:
    other = described_plan(planner, CLUSTER, Constraints(tensor=2))
    text = comparison(plan, other)
    assert "predicted step: " in text and "axes[tensor]: 4 -> 2" in text and "times" in text
    assert comparison(plan, plan) == ""
    told = msgspec.structs.replace(plan, reasons=("other",))
    assert comparison(plan, told) == "predictions and explanations alone" and plan.hash == told.hash
