"""Whole-matrix optimizers, float32 masters and a scaled loss: as loops of plain PyTorch, under every plan."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import precision_job
from clipping_job import branching_of
from precision_job import (
    BASE,
    DECAY,
    LIMIT,
    NUM_STEPS,
    batch_of,
    build,
    build_scaled,
    counted,
    loss_fn,
    plain,
    plain_masters,
    plain_scaled,
    scaled_loss,
    updates_by_process,
)
from test_training_processes import run_job

import partita
from partita import Constraints
from partita.errors import InputError, NonFiniteLossError

PLANS: dict[str, Constraints | None] = {
    "one worker": Constraints(**BASE, num_workers=1),
    "data": Constraints(**BASE, data=2, num_workers=2, num_microbatches=1),
    "pipeline": Constraints(**BASE, data=1, pipeline=2, num_microbatches=2),
    "block": None,
}
pytestmark = pytest.mark.filterwarnings("ignore::partita.FallbackWarning")


def parallel(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, function: Any, **options: Any) -> Any:
    plan: Any = PLANS[name] or "auto"
    function = function if PLANS[name] is not None else branching_of(function)
    return partita.parallelize(model, optimizer, function, batch_of(0), plan=plan, **options)


def assert_close(model: nn.Module, other: nn.Module, tolerance: float) -> None:
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=0, atol=tolerance)


def moved(model: nn.Module, dtype: torch.dtype) -> float:
    """How far the weights are from where they began."""
    first = build("sgd", dtype)[0]
    pairs = zip(model.parameters(), first.parameters(), strict=True)
    return max(float((one.detach().float() - two.detach().float()).abs().max()) for one, two in pairs)


# Whole matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["muon", "shampoo", "mixed"])
@pytest.mark.parametrize("name", PLANS)
def test_whole_matrix_optimizers_are_those_of_plain_torch(name: str, kind: str) -> None:
    model, optimizer = build(kind)
    with parallel(name, model, optimizer, loss_fn) as step:
        losses = [step(batch_of(index)).loss for index in range(NUM_STEPS)]
        if name == "data":
            assert set(counted(updates_by_process(step)).values()) == {1}
    wanted, reference = plain(kind)
    assert losses == pytest.approx(wanted, abs=1e-3 if kind != "shampoo" else 1e-5)
    assert_close(model, reference, 2e-3 if kind != "shampoo" else 1e-4)  # Muon turns in bfloat16


# Masters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adamw", "shampoo", "coupled"])
@pytest.mark.parametrize("name", PLANS)
def test_masters_are_those_of_an_explicit_loop(name: str, kind: str) -> None:
    model, optimizer = build(kind, torch.bfloat16)
    average = copy.deepcopy(model).float()
    options: dict[str, Any] = {"ema": DECAY, "clip_grad_norm": LIMIT, "master_weights": True}
    with parallel(name, model, optimizer, loss_fn, **options) as step:
        losses = [step(batch_of(index)).loss for index in range(NUM_STEPS)]
        step.ema_to(average)
        optimizer.state_dict()  # brings the state in
    wanted, reference, masters, mean = plain_masters(kind, torch.bfloat16, limit=LIMIT)
    # Gradients of bfloat16 are off by 1/256 of themselves, whatever they are added up in.
    tolerance = 0.05 * moved(reference, torch.bfloat16)
    assert losses == pytest.approx(wanted, abs=1e-2)
    assert_close(average, mean, tolerance)
    for weight, master in zip(model.parameters(), masters.parameters(), strict=True):
        state = optimizer.state[weight]
        assert weight.dtype == torch.bfloat16
        assert torch.equal(state["master"].to(torch.bfloat16), weight)
        torch.testing.assert_close(state["master"], master.detach(), rtol=0, atol=tolerance)
        assert all(value.dtype == torch.float32 for value in state.values() if isinstance(value, torch.Tensor))


def test_one_worker_has_the_masters_of_the_loop_to_the_last_digits() -> None:
    model, optimizer = build("sgd", torch.bfloat16)
    with parallel("one worker", model, optimizer, loss_fn, master_weights=True) as step:
        for index in range(NUM_STEPS):
            step(batch_of(index))
        optimizer.state_dict()
    *_, masters, _ = plain_masters("sgd", torch.bfloat16)
    for weight, master in zip(model.parameters(), masters.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[weight]["master"], master.detach(), rtol=1e-6, atol=1e-6)


def test_updates_that_are_too_small_for_the_weights_add_up_in_the_masters() -> None:
    def trained(masters: bool) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1, bias=False).bfloat16()
        nn.init.constant_(model.weight, 0.5)
        before = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        batch = torch.ones(2, 4, dtype=torch.bfloat16)
        plan = Constraints(**BASE, num_workers=1)
        mean = lambda model, batch: model(batch).float().mean()  # noqa: E731
        with partita.parallelize(model, optimizer, mean, batch, plan=plan, master_weights=masters) as step:
            for _ in range(50):
                step(batch)
        return model, before

    model, before = trained(False)
    assert torch.equal(model.weight, before.weight)
    model, before = trained(True)
    torch.testing.assert_close(model.weight.float(), before.weight.float() - 50e-4, rtol=0, atol=2e-3)
    assert not torch.equal(model.weight, before.weight)


@pytest.mark.parametrize(("first", "second"), [("data", "pipeline"), ("pipeline", "block"), ("block", "data")])
def test_masters_go_on_from_a_checkpoint_under_another_plan(first: str, second: str, tmp_path: Path) -> None:
    def train(name: str, start: int, end: int) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
        model, optimizer = build("adamw", torch.bfloat16)
        with parallel(name, model, optimizer, loss_fn, master_weights=True, ema=DECAY) as step:
            if start:
                step.load(tmp_path)
            loaded = [s["master"].clone() for s in optimizer.state_dict()["state"].values() if start]
            for index in range(start, end):
                step(batch_of(index))
            step.save(tmp_path)
            saved = [state["master"].clone() for state in optimizer.state_dict()["state"].values()]
        return model, loaded, saved

    _, _, saved = train(first, 0, 3)
    model, loaded, _ = train(second, 3, NUM_STEPS)
    assert all(torch.equal(one, two) for one, two in zip(saved, loaded, strict=True))
    _, reference, *_ = plain_masters("adamw", torch.bfloat16)
    assert_close(model, reference, 0.06 * moved(reference, torch.bfloat16) + 1 / 256)


def test_masters_while_plans_are_tried() -> None:
    model, optimizer = build("sgd", torch.bfloat16)
    options: dict[str, Any] = {"compile": False, "master_weights": True}
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), **options) as step:
        losses = [step(batch_of(index % 5)).loss for index in range(12)]
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(optimizer.state[weight]["master"].to(torch.bfloat16), weight) for weight in model.parameters()
    )


def test_masters_that_cannot_be_are_refused() -> None:
    model, optimizer = build("adamw")
    with pytest.raises(InputError, match="needs parameters of torch.bfloat16"):
        parallel("data", model, optimizer, loss_fn, master_weights=True)
    with pytest.raises(InputError, match="must be True or False"):
        parallel("data", model, optimizer, loss_fn, master_weights="yes")
    model, optimizer = build("adamw", torch.bfloat16)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(InputError, match="step hooks"):
        parallel("data", model, optimizer, loss_fn, master_weights=True)
    model, optimizer = build("adamw", torch.bfloat16)
    with pytest.raises(InputError, match="train as one"):
        parallel("data", model, optimizer, loss_fn, master_weights=True, sync="diloco")


# A scaled loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("name", PLANS)
def test_a_dynamic_scale_is_that_of_grad_scaler(name: str, limit: float | None) -> None:
    model, optimizer = build_scaled()
    with parallel(name, model, optimizer, scaled_loss, loss_scale="dynamic", clip_grad_norm=limit) as step:
        results = [step(batch_of(index)) for index in range(8)]
        assert step.num_steps == 8
    losses, scales, reference = plain_scaled(8, limit=limit)
    assert scales[0] > scales[-1]  # some steps are skipped, and others are not
    assert [result.loss_scale for result in results] == scales
    skipped = [one > two for one, two in itertools.pairwise(scales)]
    assert [result.skipped for result in results[:-1]] == skipped and not all(skipped)
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-3)
    assert_close(model, reference, 1e-4)


def test_a_skipped_step_changes_nothing_but_the_scale() -> None:
    model, optimizer = build_scaled()
    before = copy.deepcopy(model)
    with parallel("data", model, optimizer, scaled_loss, loss_scale=2.0**40) as step:
        result = step(batch_of(0))
        assert result.skipped and result.loss_scale == 2.0**40
        assert step(batch_of(1)).loss_scale == 2.0**40  # a fixed one
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before.parameters(), strict=True))
    assert not any(optimizer.state.values())


def test_a_fixed_scale_changes_no_result() -> None:
    model, optimizer = build("adamw")
    with parallel("data", model, optimizer, loss_fn, loss_scale=1000.0) as step:
        results = [step(batch_of(index)) for index in range(NUM_STEPS)]
    losses, reference = plain("adamw")
    assert [result.loss for result in results] == pytest.approx(losses, abs=1e-5)
    assert_close(model, reference, 1e-4)


def test_gradients_of_several_batches_are_scaled_alike() -> None:
    updates = [True, True, True, True, False, True, False, False, True]
    model, optimizer = build_scaled()
    with parallel("data", model, optimizer, scaled_loss, loss_scale="dynamic") as step:
        results = [step(batch_of(index), update=update) for index, update in enumerate(updates)]
    _, scales, reference = plain_scaled(len(updates), updates=updates)
    assert [result.loss_scale for result in results] == scales
    assert_close(model, reference, 1e-4)


def test_float16_weights_with_masters_and_a_scale(tmp_path: Path) -> None:
    def train(name: str, start: int, end: int) -> tuple[nn.Module, list[float | None]]:
        model, optimizer = build("sgd", torch.float16)
        with parallel(name, model, optimizer, loss_fn, loss_scale="dynamic", master_weights=True) as step:
            if start:
                step.load(tmp_path)
            scales = [step(batch_of(index)).loss_scale for index in range(start, end)]
            step.save(tmp_path)
        return model, scales

    _, first = train("data", 0, 4)
    model, second = train("one worker", 4, 9)
    skipped = sum(one != two for one, two in zip(first, [*first[1:], second[0]], strict=True))
    assert second[0] == 2.0**16 / 2**skipped  # of the checkpoint
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert moved(model, torch.float16) > 0


def test_a_loss_that_is_not_finite_is_an_error_with_a_scale_too() -> None:
    model, optimizer = build_scaled()
    bad = torch.full((12, 6), float("nan")), batch_of(0)[1]
    with parallel("data", model, optimizer, scaled_loss, loss_scale="dynamic") as step:
        with pytest.raises(NonFiniteLossError):
            step(bad)
        assert step(batch_of(0)).loss_scale == 2.0**16
    with parallel("data", model, optimizer, scaled_loss, loss_scale="dynamic", check_finite="off") as step:
        assert step(bad).skipped
        assert step(batch_of(0)).loss_scale == 2.0**15


def test_scales_that_cannot_be_are_refused() -> None:
    model, optimizer = build_scaled()
    for wrong in (0, -1.0, float("inf"), True, "static"):
        with pytest.raises(InputError, match="loss_scale must be"):
            parallel("data", model, optimizer, scaled_loss, loss_scale=wrong)
    for sync in ("powersgd", "diloco"):
        with pytest.raises(InputError, match="loss_scale must go with"):
            parallel("data", model, optimizer, scaled_loss, loss_scale=2.0, sync=sync)


# Processes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job("", tmp_path_factory.mktemp("precision"), Path(precision_job.__file__))


@pytest.mark.parametrize("kind", ["muon", "shampoo", "mixed"])
def test_matrices_have_one_owner_in_a_job(found: list[dict[str, Any]], kind: str) -> None:
    losses, reference = plain(kind)
    tolerance = 1e-4 if kind == "shampoo" else 2e-3
    counts = counted(found[0][kind]["updated"])
    assert {name: count for name, count in counts.items() if "weight" in name} == dict.fromkeys(
        ("0.weight", "2.weight", "4.weight"), 1
    )
    assert all("weight" in " ".join(names) for names in found[0][kind]["updated"])  # both have some
    assert found[0][kind]["held"] == found[1][kind]["held"]  # to the last bit
    num_trained = 3 if kind == "muon" else 6
    for one in found:
        assert one[kind]["losses"] == pytest.approx(losses, abs=1e-3)
        assert one[kind]["states"] == num_trained
        for value, wanted in zip(one[kind]["weights"], reference.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", ["adamw, data", "adamw, sharded", "sgd, data", "muon, data", "coupled, data"])
def test_masters_in_a_job(found: list[dict[str, Any]], case: str) -> None:
    kind = case.partition(",")[0]
    losses, reference, masters, average = plain_masters(kind, torch.bfloat16, limit=LIMIT)
    # Newton-Schulz turns small singular values of a gradient, and what they are off by, into large ones.
    tolerance = (0.3 if kind == "muon" else 0.06) * moved(reference, torch.bfloat16)
    name = f"masters of {case}"
    assert found[0][name]["weights"] == found[1][name]["weights"]
    for one in found:
        assert one[name]["losses"] == pytest.approx(losses, abs=2e-2)
        trained = [value for value in one[name]["types"] if value is not None]
        assert trained == ["torch.float32"] * (3 if kind == "muon" else 6)
        rows = zip(one[name]["masters"], one[name]["average"], masters.parameters(), average.parameters(), strict=True)
        for master, mean, wanted, wanted_mean in rows:
            if master is not None:
                torch.testing.assert_close(torch.tensor(master), wanted.detach(), rtol=0, atol=tolerance)
                torch.testing.assert_close(torch.tensor(mean), wanted_mean.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_a_scaled_loss_in_a_job(found: list[dict[str, Any]], limit: float | None) -> None:
    losses, scales, reference = plain_scaled(8, limit=limit)
    for one in found:
        told = one[f"scaled, {limit}"]
        assert told["scales"] == scales
        assert told["skipped"] == found[0][f"scaled, {limit}"]["skipped"] and any(told["skipped"])
        assert told["losses"] == pytest.approx(losses, rel=1e-3)
        for value, wanted in zip(told["weights"], reference.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted.detach(), rtol=0, atol=1e-4)
