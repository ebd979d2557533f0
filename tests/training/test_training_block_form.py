"""Connections in blocks that are stored and multiplied alone: as masked weights, under every plan."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from clipping_job import batch_of, branching, build, loss_fn
from connecting_job import BY_BLOCKS, NUM_STEPS, OPTIONS, assert_alike, plain
from test_training_averages import PLANS

import partita
from partita import CheckpointError, InputError
from partita.connections import Magnitude, RigL, Static
from partita.search.blocks import Forms, forms
from partita.training import setup as setups

CORNERS = [name for name in PLANS if name != "block"]  # of graphs
WIN, LOSE = Forms(dense_s=2.0, masked_s=3.0, blocks_s=1.0), Forms(dense_s=1.0, masked_s=3.0, blocks_s=2.0)
RIGL = BY_BLOCKS["rigl by blocks"]


def one_worker() -> Any:
    return PLANS["one worker"]


def masked(method: Any) -> Any:
    return dataclasses.replace(method, form="masked")


@pytest.mark.parametrize("name", BY_BLOCKS)
@pytest.mark.parametrize("corner", CORNERS)
def test_under_every_plan(corner: str, name: str) -> None:
    method, plan = BY_BLOCKS[name], PLANS[corner]
    model, optimizer = build("AdamW")
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, connections=method) as step:  # type: ignore[arg-type]
        losses = [step(batch_of(index)).loss for index in range(NUM_STEPS)]
        assert any("computed by its blocks" in reason for reason in step.plan.reasons)
        assert_alike(model, step.connections, method)
    assert losses == pytest.approx(plain(method)[2], rel=1e-4)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "NAdam"])
def test_with_optimizers_of_elements(kind: str) -> None:
    model, optimizer = build(kind)
    with partita.parallelize(
        model,
        optimizer,
        loss_fn,
        batch_of(0),
        plan=PLANS["data"],
        connections=RIGL,  # type: ignore[arg-type]
    ) as step:
        for index in range(NUM_STEPS):
            step(batch_of(index))
        assert_alike(model, step.connections, RIGL, kind=kind)


def test_states_are_those_of_masked_weights() -> None:
    """Blocks that leave lose theirs, those that come have none."""
    found = []
    for method in (RIGL, masked(RIGL)):
        model, optimizer = build("AdamW")
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=method) as step:
            for index in range(7):  # the last change was after step 6
                step(batch_of(index))
            state = optimizer.state_dict()["state"]
            found.append(state)
            for place, mask in zip((0, 2, 4), step.connections.values(), strict=True):
                assert not state[place]["exp_avg"][~mask].any() and state[place]["exp_avg"][mask].any()
    for place, state in found[0].items():
        for name, value in state.items():
            torch.testing.assert_close(value, found[1][place][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("corner", ["data", "pipeline"])
def test_gradients_are_clipped_as_those_of_masked_weights(corner: str) -> None:
    model, optimizer = build("SGD")
    with partita.parallelize(
        model,
        optimizer,
        loss_fn,
        batch_of(0),
        plan=PLANS[corner],
        connections=RIGL,
        clip_grad_norm=0.3,  # type: ignore[arg-type]
    ) as step:
        for index in range(NUM_STEPS):
            step(batch_of(index))
        assert_alike(model, step.connections, RIGL, kind="SGD", limit=0.3)


def test_gradients_are_added_up() -> None:
    model, optimizer = build("AdamW")
    with partita.parallelize(
        model,
        optimizer,
        loss_fn,
        batch_of(0),
        plan=PLANS["data"],
        connections=RIGL,  # type: ignore[arg-type]
    ) as step:
        for index in range(2 * NUM_STEPS):
            step(batch_of(index), update=bool(index % 2))
        assert_alike(model, step.connections, RIGL, num_batches=2)


def test_averages_are_those_of_masked_weights() -> None:
    averages = []
    for method in (RIGL, masked(RIGL)):
        model, optimizer = build("AdamW")
        average = copy.deepcopy(model)
        with partita.parallelize(
            model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=method, ema=0.5
        ) as step:
            for index in range(NUM_STEPS):
                step(batch_of(index))
            step.ema_to(average)
        averages.append(average)
    for one, two in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_random_draws_are_those_of_masked_weights() -> None:
    losses = []
    for method in (RIGL, masked(RIGL)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.BatchNorm1d(12), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=method) as step:
            torch.manual_seed(4)
            losses.append([step(batch_of(index)).loss for index in range(NUM_STEPS)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradients_of_a_skipped_step_decide_nothing() -> None:
    model, optimizer = build("AdamW")
    x, y = batch_of(0)
    with partita.parallelize(
        model, optimizer, loss_fn, (x, y), plan=one_worker(), loss_scale="dynamic", check_finite="off", connections=RIGL
    ) as step:
        step((x, y))
        before = {name: mask.clone() for name, mask in step.connections.items()}
        assert step((x * float("inf"), y)).skipped
        assert all(torch.equal(mask, before[name]) for name, mask in step.connections.items())
        for _ in range(2):  # until connections are due again
            step((x, y))
        assert not all(torch.equal(mask, before[name]) for name, mask in step.connections.items())


# The user's model ----------------------------------------------------------------------------------------------------


def test_the_model_stays_dense_and_current() -> None:
    model, optimizer = build("AdamW")
    before = {name: (id(value), value.shape) for name, value in model.state_dict(keep_vars=True).items()}
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=RIGL) as step:
        for index in range(5):
            loss = loss_fn(model, batch_of(index)).item()  # by the weights of the step before
            assert step(batch_of(index)).loss == pytest.approx(loss, rel=1e-4)
        other = copy.deepcopy(model)
        step.sync_to(other)
        assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert {name: (id(value), value.shape) for name, value in model.state_dict(keep_vars=True).items()} == before
    assert all(type(layer) is nn.Linear and "forward" not in vars(layer) for layer in model[::2])


@pytest.mark.parametrize("num_before", [1, 2])  # the next step is one of masked weights, of blocks
def test_what_is_written_into_the_model_is_taken(num_before: int) -> None:
    model, optimizer = build("SGD")
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=RIGL) as step:
        for index in range(num_before):
            step(batch_of(index))
        with torch.no_grad():
            for name, mask in step.connections.items():
                model.get_parameter(name).copy_(0.5 * mask)
        expected = loss_fn(model, batch_of(5)).item()
        assert step(batch_of(5)).loss == pytest.approx(expected, rel=1e-4)
        for name, mask in step.connections.items():
            assert not model.get_parameter(name)[~mask].any()


def test_learning_rates_and_frozen_layers_are_followed() -> None:
    losses = []
    for method in (RIGL, masked(RIGL)):
        model, optimizer = build("AdamW")
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=method) as step:
            found = []
            for index in range(NUM_STEPS):
                if index == 4:
                    model[2].weight.requires_grad_(False)
                    kept = model[2].weight.clone()
                found.append(step(batch_of(index)).loss)
                schedule.step()
            assert torch.equal(model[2].weight[kept != 0], kept[kept != 0])
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_new_group_is_followed() -> None:
    losses = []
    for method in (RIGL, masked(RIGL)):
        model, _ = build("AdamW")
        optimizer = torch.optim.AdamW(model[:2].parameters(), lr=1e-2)
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=method) as step:
            found = [step(batch_of(index)).loss for index in range(3)]
            optimizer.add_param_group({"params": list(model[2:].parameters()), "lr": 1e-3})
            losses.append([*found, *(step(batch_of(index)).loss for index in range(3, NUM_STEPS))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_other_batches_and_plans_that_are_tried() -> None:
    model, optimizer = build("SGD")
    method = RIGL
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), compile=False, connections=method) as step:
        losses = [step(batch_of(index)).loss for index in range(NUM_STEPS)]
        assert_alike(model, step.connections, method, kind="SGD")
        few = batch_of(1)[0][:5], batch_of(1)[1][:5]
        loss = loss_fn(model, few).item()
        assert step(few).loss == pytest.approx(loss, rel=1e-4)
    assert losses == pytest.approx(plain(method, "SGD")[2], rel=1e-4)


def test_a_change_captures_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, made = [], []

    def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(1)
            return function(*args, **options)

        return call

    monkeypatch.setattr(setups, "capture", counted(setups.capture, captured))
    monkeypatch.setattr(setups, "GraphRunner", counted(setups.GraphRunner, made))
    model, optimizer = build("AdamW")
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=RIGL) as step:
        first = {name: mask.clone() for name, mask in step.connections.items()}
        for index in range(2):
            step(batch_of(index))
        counts, second = (len(captured), len(made)), {name: mask.clone() for name, mask in step.connections.items()}
        for index in range(2, NUM_STEPS):
            step(batch_of(index))
        assert (len(captured), len(made)) == counts == (2, 2)  # in blocks, masked
        assert not all(torch.equal(second[name], mask) for name, mask in first.items())
        assert not all(torch.equal(second[name], mask) for name, mask in step.connections.items())


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["blocks", "masked"])
def test_checkpoints_have_either_form(tmp_path: Path, before: str) -> None:
    methods = {"blocks": RIGL, "masked": masked(RIGL)}
    after = "masked" if before == "blocks" else "blocks"
    model, optimizer = build("AdamW")
    with partita.parallelize(
        model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=methods[before]
    ) as step:
        for index in range(5):
            step(batch_of(index))
        step.save(tmp_path)
    model, optimizer = build("AdamW")
    with partita.parallelize(
        model,
        optimizer,
        loss_fn,
        batch_of(0),
        plan=PLANS["data"],
        connections=methods[after],  # type: ignore[arg-type]
    ) as step:
        step.load(tmp_path)
        for index in range(5, NUM_STEPS):
            step(batch_of(index))
        assert_alike(model, step.connections, RIGL)


def test_a_checkpoint_of_more_blocks_is_refused(tmp_path: Path) -> None:
    model, optimizer = build("AdamW")
    more = Static(**OPTIONS | {"density": 0.7})
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=more) as step:
        step.save(tmp_path)
    model, optimizer = build("AdamW")
    with (
        partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=RIGL) as step,
        pytest.raises(CheckpointError, match="must keep their number"),
    ):
        step.load(tmp_path)


# Which form ----------------------------------------------------------------------------------------------------------


def reasons_of(method: Any, kind: str = "AdamW", function: Any = loss_fn, plan: Any = None) -> tuple[str, ...]:
    model, optimizer = build(kind)
    with partita.parallelize(
        model, optimizer, function, batch_of(0), plan=plan or one_worker(), connections=method
    ) as step:
        step(batch_of(0))
        return step.plan.reasons


def test_the_faster_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[tuple[int, int], Any] = {}

    def answer(num_rows: int, in_features: int, out_features: int, *args: Any, **options: Any) -> Forms:
        asked[in_features, out_features] = num_rows, *args, options
        return WIN if out_features == 12 else LOSE

    monkeypatch.setattr(forms, "fastest_form", answer)
    method = dataclasses.replace(RIGL, form="auto")  # type: ignore[type-var]
    found = reasons_of(method, plan=PLANS["data"])
    assert "0.weight is computed by its blocks: 2.0 times as fast (1e+03 ms by blocks, 2e+03 ms dense)" in found
    assert "4.weight is masked: it is at least as fast so (2e+03 ms by blocks, 1e+03 ms dense)" in found
    assert asked[6, 12] == (4, (3, 2), 2, {"needs_input_gradient": False, "num_threads": 1})  # a third of the rows
    assert asked[12, 12] == (4, (3, 2), 3, {"needs_input_gradient": True, "num_threads": 1})
    assert not any("blocks" in reason for reason in reasons_of(masked(RIGL)))


@pytest.mark.parametrize(
    ("method", "kind", "reason"),
    [
        (Magnitude(density=0.5, block=(3, 2), until=8), "AdamW", "magnitude changes how many blocks"),
        (dataclasses.replace(RIGL, form="auto"), "Muon", "Muon sees weights as wholes"),  # type: ignore[type-var]
    ],
)
def test_where_blocks_cannot_be_weights_are_masked(method: Any, kind: str, reason: str) -> None:
    assert any(f"masked, not in blocks: {reason}" in text for text in reasons_of(method, kind))


def with_penalty(model: nn.Module, batch: Any) -> torch.Tensor:
    weight: torch.Tensor = model[2].weight  # type: ignore[index, assignment]
    return loss_fn(model, batch) + weight.square().sum()


def with_penalty_on_list(model: nn.Module, batch: Any) -> torch.Tensor:
    weight: torch.Tensor = model.penalized[0]  # type: ignore[index, assignment]
    return loss_fn(model, batch) + weight.square().sum()


@pytest.mark.parametrize("with_penalty", [with_penalty, with_penalty_on_list])
def test_a_weight_that_is_read_otherwise_is_masked(with_penalty: Callable[..., torch.Tensor]) -> None:
    model, optimizer = build("AdamW")
    model.penalized = [model[2].weight]  # type: ignore[index, assignment]
    with partita.parallelize(model, optimizer, with_penalty, batch_of(0), plan=one_worker(), connections=RIGL) as step:
        assert "2.weight is masked: it is not read by its layer alone" in step.plan.reasons
        assert any("0.weight is computed by its blocks" in reason for reason in step.plan.reasons)
        for _ in range(3):
            loss = with_penalty(model, batch_of(0)).item()
            assert step(batch_of(0)).loss == pytest.approx(loss, rel=1e-4)


def test_a_given_plan_decides_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "fastest_form", lambda *args, **options: WIN)
    auto = dataclasses.replace(RIGL, form="auto")  # type: ignore[type-var]
    for method, words in ((RIGL, "computed by its blocks"), (masked(RIGL), "is one of masked weights")):
        model, optimizer = build("AdamW")
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=one_worker(), connections=method) as step:
            plan = step.plan
        assert any(words in reason for reason in reasons_of(auto, plan=plan))


def test_other_types_are_masked_unless_blocks_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_autocast(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[0])
        return nn.functional.cross_entropy(logits.float(), batch[1])

    monkeypatch.setattr(forms, "fastest_form", lambda *args, **options: WIN)
    found = reasons_of(dataclasses.replace(RIGL, form="auto"), function=with_autocast)  # type: ignore[type-var]
    assert "0.weight is masked: it is not computed in float32, which is not measured" in found
    losses = []
    for method in (RIGL, masked(RIGL)):
        model, optimizer = build("SGD")
        with partita.parallelize(
            model, optimizer, with_autocast, batch_of(0), plan=one_worker(), connections=method
        ) as step:
            losses.append([step(batch_of(index)).loss for index in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": branching}, "needs layers that can be computed by their blocks"),
        ({"kind": "Muon"}, "Muon sees weights as wholes"),
        ({"method": Static(density=1.0, block=(3, 2), form="blocks")}, "0.weight has all its blocks"),
    ],
)
def test_blocks_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reasons_of(**{"method": RIGL, **options})


def test_methods_without_blocks_have_no_form_of_blocks() -> None:
    with pytest.raises(InputError, match="single elements"):
        RigL(density=0.5, until=8, form="blocks")
    with pytest.raises(InputError, match="fewer and fewer"):
        Magnitude(density=0.5, until=8, block=(2, 2), form="blocks")
    with pytest.raises(InputError, match="form must be one of"):
        Static(density=0.5, form="dense")  # type: ignore[arg-type]
