"""Connections that are learnt while training: under every plan as by plain PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import connecting_job
from clipping_job import batch_of, branching, build, loss_fn
from connecting_job import ALL, CASES, CASES_BY_BLOCKS, METHODS, NUM_STEPS, WIDTHS, assert_alike, plain
from test_training_averages import PLANS
from test_training_processes import run_job

import partita
from partita import CheckpointError, Constraints, InputError
from partita.connections import RigL
from partita.search.connections.crossing import num_crossing
from partita.training.connecting import Cut
from partita.training.events import ConnectionsChanged


@pytest.mark.filterwarnings("ignore::partita.FallbackWarning")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("corner", PLANS)
def test_under_every_plan(corner: str, name: str) -> None:
    method, plan = METHODS[name], PLANS[corner]
    model, optimizer = build("AdamW")
    function = loss_fn if plan is not None else branching
    step = partita.parallelize(model, optimizer, function, batch_of(0), plan=plan or "auto", connections=method)
    with step:
        losses = [step(batch_of(index)).loss for index in range(NUM_STEPS)]
        assert_alike(model, step.connections, method)
    assert losses == pytest.approx(plain(method)[2], rel=1e-4)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "Adafactor", "Muon", "Coupled"])
@pytest.mark.parametrize("corner", ["data", "tensor"])
def test_with_every_kind_of_optimizer(corner: str, kind: str) -> None:
    method = METHODS["rigl"]
    model, optimizer = build(kind)
    with partita.parallelize(
        model,
        optimizer,
        loss_fn,
        batch_of(0),
        plan=PLANS[corner],
        connections=method,  # type: ignore[arg-type]
    ) as step:
        for index in range(NUM_STEPS):
            step(batch_of(index))
        assert_alike(model, step.connections, method, kind=kind)


@pytest.mark.parametrize("corner", ["data", "tensor", "pipeline"])
def test_only_gradients_of_connections_are_clipped(corner: str) -> None:
    method = METHODS["rigl"]
    model, optimizer = build("SGD")
    with partita.parallelize(
        model,
        optimizer,
        loss_fn,
        batch_of(0),
        plan=PLANS[corner],
        connections=method,
        clip_grad_norm=0.3,  # type: ignore[arg-type]
    ) as step:
        for index in range(NUM_STEPS):
            step(batch_of(index))
        assert_alike(model, step.connections, method, kind="SGD", limit=0.3)


@pytest.mark.filterwarnings("ignore::partita.FallbackWarning")
@pytest.mark.parametrize("corner", ["data", "tensor", "block"])
def test_gradients_are_filtered_when_they_are_added_up(corner: str) -> None:
    method, plan = METHODS["rigl"], PLANS[corner]
    model, optimizer = build("AdamW")
    function = loss_fn if plan is not None else branching
    step = partita.parallelize(model, optimizer, function, batch_of(0), plan=plan or "auto", connections=method)
    with step:
        for index in range(2 * NUM_STEPS):
            step(batch_of(index), update=bool(index % 2))
        assert_alike(model, step.connections, method, num_batches=2)


def test_masters_and_averages_have_the_connections_as_well() -> None:
    plan: Any = PLANS["data"]
    model, optimizer = build("AdamW")
    model.bfloat16()
    batch = batch_of(0)[0].bfloat16(), batch_of(0)[1]
    average = copy.deepcopy(model)
    with partita.parallelize(
        model,
        optimizer,
        loss_fn,
        batch,
        plan=plan,
        master_weights=True,
        ema=0.5,
        loss_scale=8.0,
        connections=METHODS["rigl"],
    ) as step:
        first = {name: mask.clone() for name, mask in step.connections.items()}
        for _ in range(NUM_STEPS):
            step(batch)
            for name, mask in step.connections.items():
                assert not model.get_parameter(name)[~mask].any()
        step.ema_to(average)
        for name, mask in step.connections.items():
            assert not average.get_parameter(name)[~mask].any()
            assert not torch.equal(mask, first[name])


@pytest.mark.parametrize("name", ["rigl", "magnitude"])
def test_gradients_of_a_skipped_step_decide_nothing(name: str) -> None:
    plan: Any = PLANS["one worker"]
    method = METHODS[name]
    model, optimizer = build("AdamW")
    x, y = batch_of(0)
    with partita.parallelize(
        model, optimizer, loss_fn, (x, y), plan=plan, loss_scale="dynamic", check_finite="off", connections=method
    ) as step:
        due = next(number for number in range(1, NUM_STEPS) if method.is_due(number))
        for _ in range(due - 1):
            step((x, y))
        before = {name: mask.clone() for name, mask in step.connections.items()}
        assert step((x * float("inf"), y)).skipped
        same = all(torch.equal(mask, before[name]) for name, mask in step.connections.items())
        assert same == method.needs_gradients


def test_while_plans_are_tried() -> None:
    method = METHODS["rigl"]
    model, optimizer = build("SGD")
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), compile=False, connections=method) as step:
        for index in range(NUM_STEPS):
            step(batch_of(index))
        assert_alike(model, step.connections, method, kind="SGD")


def test_a_checkpoint_has_the_connections(tmp_path: Path) -> None:
    method = METHODS["set"]
    plan: Any = PLANS["data"]
    model, optimizer = build("AdamW")
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, connections=method) as step:
        for index in range(5):
            step(batch_of(index))
        step.save(tmp_path)
    model, optimizer = build("AdamW")
    plan = PLANS["tensor"]
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, connections=method) as step:
        step.load(tmp_path)
        for index in range(5, NUM_STEPS):
            step(batch_of(index))
        assert_alike(model, step.connections, method)
    other = METHODS["magnitude"]  # keeps other layers dense
    with (
        partita.parallelize(*build("AdamW"), loss_fn, batch_of(0), plan=plan, connections=other) as step,
        pytest.raises(CheckpointError, match="saved connections must be those"),
    ):
        step.load(tmp_path)


def test_weights_of_a_dense_checkpoint_lose_what_is_not_there(tmp_path: Path) -> None:
    plan: Any = PLANS["one worker"]
    model, optimizer = build("AdamW")
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan) as step:
        step(batch_of(0))
        step.save(tmp_path)
    model, optimizer = build("AdamW")
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, connections=METHODS["static"]) as step:
        step.load(tmp_path)
        for name, mask in step.connections.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any() and weight[mask].all()


def test_changes_are_told() -> None:
    told: list[ConnectionsChanged] = []
    end = partita.subscribe(lambda event: told.append(event) if isinstance(event, ConnectionsChanged) else None)
    try:
        plan: Any = PLANS["one worker"]
        model, optimizer = build("AdamW")
        with partita.parallelize(
            model, optimizer, loss_fn, batch_of(0), plan=plan, connections=METHODS["rigl"]
        ) as step:
            for index in range(NUM_STEPS):
                before = {name: mask.clone() for name, mask in step.connections.items()}
                num_told = len(told)
                step(batch_of(index))
                left = sum(int((before[name] & ~mask).sum()) for name, mask in step.connections.items())
                assert (left > 0) == (len(told) > num_told and told[-1].left > 0)
    finally:
        end()
    assert [event.step for event in told] == [2, 4, 6]
    assert all(event.left == event.come and event.density == pytest.approx(0.4, abs=0.02) for event in told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connections": "rigl"}, "connections must be a method"),
        ({"connections": METHODS["rigl"], "sync": "powersgd"}, "must go with processes that train as one"),
        ({"connections": METHODS["rigl"], "sync": "auto"}, "must go with processes that train as one"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        partita.parallelize(*build("AdamW"), loss_fn, batch_of(0), **options)


PRICED = RigL(density=0.3, until=40, every=2, fraction=1.0, crossing=50.0)


def crossing_after(method: RigL, inputs: Any, num_steps: int = 30) -> tuple[int, tuple[str, ...]]:
    """Inputs of the second layer that cross, where its widths are cut in halves, and what the plan tells."""
    plan = Constraints(compiled=False, threads_per_worker=1, data=1, tensor=2, pipeline=1, inputs=inputs)
    with partita.parallelize(*build("SGD"), loss_fn, batch_of(0), plan=plan, connections=method) as step:
        for index in range(num_steps):
            step(batch_of(index % 4))
        return num_crossing(step.connections["2.weight"], Cut((6, 6), (6, 6))), step.plan.reasons


@pytest.mark.parametrize("options", [{}, {"block": (2, 2), "form": "blocks", "dense": ("4.*",)}])
def test_inputs_that_cross_devices_have_a_price(options: Any) -> None:
    priced, reasons = crossing_after(dataclasses.replace(PRICED, **options), WIDTHS)
    free, _ = crossing_after(dataclasses.replace(PRICED, **options, crossing=0.0), WIDTHS)
    assert priced < free
    assert "new connections of 2.weight are priced by the inputs that they make cross devices" in reasons


def test_a_plan_that_cuts_no_widths_makes_nothing_cross() -> None:
    priced, reasons = crossing_after(PRICED, PLANS["tensor"].inputs, 9)  # type: ignore[union-attr]
    free, others = crossing_after(dataclasses.replace(PRICED, crossing=0.0), PLANS["tensor"].inputs, 9)  # type: ignore[union-attr]
    assert priced == free
    assert any("crossing has no effect" in reason for reason in reasons)
    assert not any("cross" in reason for reason in others)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    processes = [
        run_job(kind, tmp_path_factory.mktemp("connecting"), Path(connecting_job.__file__))
        for kind in ("masked", "by blocks")
    ]
    return [one | two for one, two in zip(*processes, strict=True)]


@pytest.mark.parametrize(("name", "corner"), [*CASES, *CASES_BY_BLOCKS])
def test_in_a_job(found: list[dict[str, Any]], name: str, corner: str) -> None:
    model, masks, losses = plain(ALL[name])
    for one in (process[f"{name}, {corner}"] for process in found):
        assert one["losses"] == pytest.approx(losses, rel=1e-4)
        assert {key: torch.tensor(mask).tolist() for key, mask in one["masks"].items()} == {
            key: mask.tolist() for key, mask in masks.items()
        }
        for value, wanted in zip(one["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["static", "rigl", "static by blocks", "rigl by blocks", "some by blocks"])
def test_gradients_of_connections_alone_travel(found: list[dict[str, Any]], name: str) -> None:
    method = ALL[name]
    model, masks, _ = plain(method)
    there = sum(int(mask.sum()) for mask in masks.values())
    others = sum(item.numel() for key, item in model.named_parameters() if key not in masks)
    everything = sum(item.numel() for item in model.parameters())
    for process in found:
        for step, sent in enumerate(process[f"{name}, data"]["bytes"], start=1):
            wanted = everything if method.needs_gradients and method.is_due(step) else there + others
            assert sent == pytest.approx(4 * wanted, abs=64), step  # and the loss
