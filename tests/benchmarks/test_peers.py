"""The race of peers: its verdicts on rows made by hand, the choice of settings, JAX twins beside their torch models."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import disturbance, families
from benchmarks.peers import options as peer_options
from benchmarks.peers import verdict
from benchmarks.peers.choose import Variant, fastest
from benchmarks.peers.field import Field
from benchmarks.peers.fsdp import blocks_of
from benchmarks.peers.plain import plain_step
from benchmarks.peers.race import race
from benchmarks.peers.roster import BY_NAME, PAIRS, PEERS, parse_pairs
from benchmarks.peers.workload import Workload, load_arrays, save_arrays
from benchmarks.processes import Child

JAX_PYTHON = os.environ.get(peer_options.INTERPRETERS["jax"], sys.executable)
TWINS = ("mlp_batchnorm", "mixture_density", "conv1d", "unet", "masked_tokens")


def row_of(pair: str, **times_s: float) -> dict[str, Any]:
    rounds = {name.replace("_", " "): [[time_s]] for name, time_s in times_s.items()}
    return {"pair": pair, **verdict.judge(rounds)}


# --- the verdict


def test_a_pair_is_judged_by_medians_of_rounds() -> None:
    rounds = {"eager 1": [[3.0, 3.0], [3.2]], "compiled all": [[2.0], [2.2]], "partita": [[1.0, 1.1], [1.1]]}
    row = verdict.judge(rounds)
    assert row["best_peer"] == "compiled all" and row["ratio"] == pytest.approx(1.075 / 2.1)
    assert row["ratio_of_fastest"] == pytest.approx(0.5)
    assert row["best_single_core"] == "eager 1" and row["speed_up"] == pytest.approx(3.1 / 1.075)
    assert row["compute_bound"]


def test_the_single_core_base_is_the_fastest_of_all_single_core_peers() -> None:
    row = row_of("a:large", eager_1=0.3, compiled_1=0.2, jax_1=0.15, ddp=0.11, partita=0.1)
    assert row["best_single_core"] == "jax 1" and row["speed_up"] == pytest.approx(1.5)
    assert row["best_peer"] == "ddp"


def test_the_mean_of_ratios_is_geometric() -> None:
    rows = [row_of(f"{i}:large", eager_1=1.0, partita=ratio) for i, ratio in enumerate([0.25, 0.5, 0.5] * 4)]
    summary, misses = verdict.summarise(rows)
    assert summary["geometric_mean_ratio"] == pytest.approx((0.25 * 0.5 * 0.5) ** (1 / 3))
    assert summary["wins"] == {"eager 1": 12} and misses == []


@pytest.mark.parametrize(
    ("rows", "miss"),
    [
        ([row_of(f"{i}:large", eager_1=1.0, eager_all=0.7, partita=0.5) for i in range(12)], "geometric mean"),
        ([row_of(f"{i}:large", eager_1=1.0, partita=0.1) for i in range(11)], "at least 12 families"),
        ([row_of(f"a:{i}", eager_1=1.0, partita=0.1) for i in range(12)], "at least 12 families"),
        ([row_of(f"{i}:tiny", eager_1=0.001, partita=0.0001) for i in range(12)], "but none does"),
        ([row_of("slow:tiny", eager_1=0.001, partita=0.00101)], "slow:tiny: partita / eager 1 must be at most 1.0"),
        (
            [row_of("a:large", eager_1=1.0, eager_all=0.99, partita=0.53)],
            "a:large: speed over eager 1 must be at least",
        ),
        ([row_of("a:large", partita=0.53)], "a:large: not compared"),
        ([{**row_of("a:large", eager_1=1.0, partita=0.5), "errors": {"ddp": "x"}}], "every peer must finish"),
        ([], "geometric mean"),
    ],
)
def test_every_limit_can_be_missed(rows: list[dict[str, Any]], miss: str) -> None:
    assert any(miss in text for text in verdict.summarise(rows)[1])


def test_peers_that_train_something_else_are_told() -> None:
    row = row_of("a:large", eager_1=1.0, jax=0.9, partita=0.5)
    losses = {"eager 1": 2.0, "jax": 2.0001, "partita": 2.0, "ddp": 1.7}  # ddp's rows need not weigh the same
    assert not any("first loss" in miss for miss in verdict.summarise([{**row, "first_losses": losses}])[1])
    losses["jax"] = 2.01
    assert any("but is 2.01 for jax" in miss for miss in verdict.summarise([{**row, "first_losses": losses}])[1])
    assert not any("2.01" in miss for miss in verdict.summarise([{**row, "first_losses": losses, "draws": True}])[1])


# --- who takes part


def test_the_default_pairs_span_families_and_scales() -> None:
    assert len({family for family, _ in PAIRS}) >= verdict.SMALLEST_NUM_FAMILIES
    assert {scale for _, scale in PAIRS} == {"tiny", "small", "large"}
    assert all(families.get(family) for family, _ in PAIRS)
    assert parse_pairs("gpt2, vit:large,") == (("gpt2", "small"), ("vit", "large"))
    assert set(verdict.WHOLE_BATCH) < set(BY_NAME)


def test_options_refuse_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families")
    peer_options.add_peer_options(parser, pairs=PAIRS)
    options = parser.parse_args([])
    assert peer_options.pairs_of(parser, options) == PAIRS
    assert peer_options.names_of(parser, options) == tuple(peer.name for peer in PEERS)
    assert peer_options.names_of(parser, parser.parse_args(["--peers", "ddp"])) == ("ddp", "partita")
    options = parser.parse_args(["--families", "unet"])
    assert peer_options.pairs_of(parser, options) == (("unet", "small"), ("unet", "large"))
    for arguments, asked in (
        (["--pairs", "gpt2:huge"], peer_options.pairs_of),
        (["--peers", "x"], peer_options.names_of),
    ):
        with pytest.raises(SystemExit):
            asked(parser, parser.parse_args(arguments))
    assert "gpt2:huge" in capsys.readouterr().err


def test_a_peer_whose_package_is_missing_is_absent_with_the_reason(tmp_path: Path) -> None:
    interpreters = {"jax": str(tmp_path / "none"), "deepspeed": sys.executable}
    field = Field(("jax", "jax 1", "eager 1"), interpreters=interpreters, timeout_s=10)
    assert field.names == ("eager 1",) and set(field.absent) == {"jax", "jax 1"}
    assert "none" in field.absent["jax"]
    field.close()


# --- the choice of settings


def sleeping(time_s: float, loss: float) -> Variant:
    def step(batch: object) -> float:
        time.sleep(time_s)
        return loss

    return Variant(f"{time_s} s", lambda: step)


def refused() -> Variant:
    def build() -> Any:
        raise ValueError("not with this model")

    return Variant("refused", build)


def test_the_fastest_setting_is_chosen_and_the_others_are_recorded() -> None:
    prepared = fastest([refused(), sleeping(0.02, 1.0), sleeping(0.002, 2.0)], [0], label="all, ")
    assert prepared.plan == "all, 0.002 s" and prepared.step(0) == 2.0
    assert prepared.first_loss == 1.0  # of the first that works: later ones may share its weights
    assert prepared.trials_s["refused"] == "ValueError: not with this model"
    slow_s = prepared.trials_s["0.02 s"]
    assert isinstance(slow_s, float) and slow_s >= 0.02
    with pytest.raises(RuntimeError, match="none does: .*not with this model"):
        fastest([refused()], [0])


def test_ranks_choose_alike() -> None:
    """Another rank is slow with the setting that is fast here: the largest time of both decides."""
    answers = iter([0.03, 0.03, 0.5, 0.5])  # for each variant: one step, then the median
    prepared = fastest([sleeping(0.01, 1.0), sleeping(0.001, 1.0)], [0], agree=lambda _: next(answers))
    assert prepared.plan == "0.01 s"


def test_units_of_sharding_are_blocks_and_never_containers() -> None:
    blocks = blocks_of(families.get("gpt2").task().model)
    assert len(blocks) == 2 and not any(isinstance(block, torch.nn.ModuleList) for block in blocks)
    nested = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(1, 1)]), torch.nn.ReLU()])
    assert [type(block) for block in blocks_of(nested)] == [torch.nn.Linear]


# --- JAX twins


def run_jax(code: str, *arguments: object) -> Any:
    """What a program prints last, as JSON; skips where JAX is not installed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    probe = subprocess.run([JAX_PYTHON, "-c", "import jax"], capture_output=True, env=environment, timeout=120)
    if probe.returncode:
        pytest.skip(f"no JAX in {JAX_PYTHON}; name a Python that has it by ${peer_options.INTERPRETERS['jax']}")
    command = [JAX_PYTHON, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LOSSES = """
import json, sys
import jax
from benchmarks.peers.jax_data import mesh_step
from benchmarks.peers.workload import Workload
jax.config.update("jax_num_cpu_devices", 2)
step = mesh_step(Workload(sys.argv[1], sys.argv[2], sys.argv[3]), int(sys.argv[4]))
print(json.dumps([step(index) for index in (0, 1, 2, 3, 0)]))
"""


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("family", TWINS)
def test_a_twin_has_the_losses_of_its_torch_model(family: str, num_devices: int, tmp_path: Path) -> None:
    workload = Workload(family, "tiny", str(tmp_path / "arrays.npz"))
    save_arrays(workload, tmp_path / "arrays.npz")
    losses = run_jax(LOSSES, family, "tiny", workload.arrays, num_devices)
    task = workload.task()
    step = plain_step(families.make_optimizer("AdamW", task), task.loss_fn, task.model)
    batches = workload.batches(task)
    expected = [step(batches[index]) for index in (0, 1, 2, 3, 0)]
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert abs(expected[-1] - expected[0]) > 1e-3  # the updates are seen


UPDATES = """
import json, sys
import jax.numpy as jnp
from benchmarks.peers.jax_data import adamw, first_state
given = json.load(open(sys.argv[1]))
state = first_state({"w": jnp.array(given["weights"], jnp.float32)})
for gradient in given["gradients"]:
    state = adamw(state, {"w": jnp.array(gradient, jnp.float32)}, given["rate"])
print(json.dumps(state[0]["w"].tolist()))
"""


def test_the_update_is_that_of_torch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(40, generator=generator)
    gradients = torch.randn(6, 40, generator=generator) * torch.logspace(-6, 2, 40)
    given = {"weights": weights.tolist(), "gradients": gradients.tolist(), "rate": 0.03}
    (tmp_path / "given.json").write_text(json.dumps(given))
    updated = run_jax(UPDATES, tmp_path / "given.json")
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.03)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(torch.tensor(updated), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_every_twin_is_tested() -> None:
    code = "import json; from benchmarks.peers.jax_twins import TWINS; print(json.dumps(sorted(TWINS)))"
    assert run_jax(code) == sorted(TWINS)


def test_arrays_hold_shared_weights_once_and_batches_by_key(tmp_path: Path) -> None:
    workload = Workload("masked_tokens", "tiny")
    save_arrays(workload, tmp_path / "arrays.npz")
    weights, batches, rate = load_arrays(str(tmp_path / "arrays.npz"))
    task = workload.task()
    assert sum(value.size for value in weights.values()) == task.num_parameters
    assert len(batches) == 4 and set(batches[0]) == {"tokens", "labels"}
    assert (batches[3]["tokens"] == task.batches(3)["tokens"].numpy()).all() and rate == 1e-3


# --- disturbance


def test_a_neighbour_takes_about_half_of_one_core() -> None:
    with Child("benchmarks.peers.neighbour", "burn") as neighbour:
        taken: dict[str, Any] = {}
        with disturbance.disturbed(neighbour, max(os.sched_getaffinity(0)), taken):
            time.sleep(1.0)
    assert taken["wall_s"] >= 1.0
    assert 0.05 < taken["cpu_s"] / taken["wall_s"] < 0.65  # less than half where others share the core


def test_slow_downs_are_judged_by_the_capacity_that_was_taken() -> None:
    pairings = {"partita": [(1.0, 1.3, 0.25), (2.0, 2.7, 0.25)], "ddp": [(1.0, 1.6, 0.25)]}
    row = {"pair": "a:small", **disturbance.judge(pairings)}
    assert row["slow_down"] == pytest.approx(0.325) and row["limit"] == pytest.approx(0.40)
    assert row["least_peer"] == "ddp" and row["least_peer_slow_down"] == pytest.approx(0.6)
    assert row["free_spread_slow_down"] == pytest.approx(1 / 3)
    assert disturbance.summarise([row])[1] == []
    slow = {"pair": "b:small", **disturbance.judge({"partita": [(1.0, 1.41, 0.25)]})}
    assert "b:small: partita may slow by 40% at most" in disturbance.summarise([slow])[1][0]
    idle = {"pair": "c:small", **disturbance.judge({"partita": [(1.0, 1.0, 0.01)]})}
    assert "the neighbour must take 10%" in disturbance.summarise([idle])[1][0]
    assert "not measured" in disturbance.summarise([{"pair": "d:small"}])[1][0]
    assert disturbance.summarise([])[1] and math.isnan(disturbance.summarise([])[0]["median_slow_down"])


@pytest.mark.slow
def test_a_race_of_plain_and_distributed_peers() -> None:
    field = Field(("eager 1", "ddp"), interpreters={}, timeout_s=120)
    try:
        row = race(field, "mixture_density", "tiny", num_rounds=2, turn_s=0.02)
    finally:
        field.close()
    assert row["errors"] is None
    assert row["first_losses"]["ddp"] == pytest.approx(row["first_losses"]["eager 1"], rel=1e-5)
    assert len(row["rounds"]["ddp"]) == 2 and row["eager 1"] > 0
    assert set(row["trials_s"]["eager 1"]) == {"for-loop optimizer", "foreach optimizer", "fused optimizer"}
