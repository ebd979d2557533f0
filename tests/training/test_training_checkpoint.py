"""What checkpoints bring back, and which one is read."""

from __future__ import annotations

import copy
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_cases import ONE, Tied, Trap, build, flat_state, same, trained, write

import partita
from partita.errors import CheckpointError
from partita.training.checkpoint.loader import load, weights_of

# What comes back ---------------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: Path) -> None:
    saved, saved_optimizer = trained()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    path = write(tmp_path, 42, (saved, saved_optimizer), also={"counter": {"count": 3}})
    wanted = random.random(), float(np.random.rand()), float(torch.rand(()))
    model, optimizer = build(1)
    found = load(tmp_path, model, optimizer)
    assert (found.step, found.path, found.also) == (42, str(path), {"counter": {"count": 3}})
    assert same(model, saved) and flat_state(optimizer) == flat_state(saved_optimizer)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == wanted


def test_weights_are_a_plain_safetensors_file(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = write(tmp_path, 1, (model, optimizer))
    plain = load_file(path / "weights.safetensors")
    assert set(plain) == set(model.state_dict()) - {"head.weight"}
    other, _ = build(1)
    other.load_state_dict(weights_of(tmp_path))
    assert same(other, model)
    assert set(weights_of(tmp_path, ["scale"])) == {"scale"}


def test_the_order_of_parameters_in_groups_may_change(tmp_path: Path) -> None:
    saved, saved_optimizer = trained()
    write(tmp_path, 1, (saved, saved_optimizer))
    model, _ = build(1)
    groups = [{"params": [model.scale], "lr": 0.5}, {"params": [*model.norm.parameters(), model.embedding.weight]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    load(tmp_path, model, optimizer)
    for (name, one), other in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], saved_optimizer.state[other]["exp_avg"]), name
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.01]


@pytest.mark.parametrize("kind", ["lbfgs", "muon"])
def test_states_that_are_not_only_tensors(tmp_path: Path, kind: str) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2, bias=False)
        return model, torch.optim.LBFGS(model.parameters()) if kind == "lbfgs" else torch.optim.Muon(model.parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = (model(torch.eye(3)) - 1.0).pow(4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    saved = make(0)
    step(*saved)
    write(tmp_path, 1, saved)
    found = make(1)
    load(tmp_path, *found)
    step(*saved)
    step(*found)
    assert same(found[0], saved[0])


def test_numbers_of_numpy_come_back_as_pythons(tmp_path: Path) -> None:
    saved = trained()
    saved[1].param_groups[0]["lr"] = np.float64(0.25)
    write(tmp_path, 1, saved)
    model, optimizer = build(1)
    load(tmp_path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    write(tmp_path, 1)
    model, optimizer = trained()
    optimizer.state[model.scale]["trap"] = Trap()  # type: ignore[index]
    with pytest.raises(CheckpointError, match="must consist of tensors, numbers"):
        write(tmp_path, 2, (model, optimizer))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and not Trap.sprung


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_weights_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.tensor([0.0, 1.0, 1.0]).to(dtype))
        return model, torch.optim.SGD(model.parameters())

    saved, found = make(), make()
    saved[0].table = torch.tensor([1.0, 0.0, 1.0]).to(dtype)
    write(tmp_path, 1, saved)
    load(tmp_path, *found)
    assert found[0].table.dtype == dtype
    assert torch.equal(
        found[0].table.float() if dtype.is_floating_point else found[0].table,
        saved[0].table.float() if dtype.is_floating_point else saved[0].table,
    )


def test_a_state_of_a_module_that_is_no_tensor(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> int:
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    def make() -> tuple[Any, torch.optim.Optimizer]:
        model = Counting(2, 2)
        return model, torch.optim.SGD(model.parameters())

    saved, found = make(), make()
    saved[0].count = 9
    write(tmp_path, 1, saved)
    load(tmp_path, *found)
    assert found[0].count == 9


# Which is read -----------------------------------------------------------------------------------------------------


def test_the_latest_counts_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 99_999_999, 100_000_000):
        write(tmp_path, step)
    assert load(tmp_path, *build()).step == 100_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]


def test_a_step_that_is_saved_again_counts_and_the_older_one_is_not_touched_before(tmp_path: Path) -> None:
    for turn in range(1, 5):
        made = trained(turn)
        path = write(tmp_path, 7, made)
        model, optimizer = build(9)
        load(tmp_path, model, optimizer)
        assert same(model, made[0]), path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007.002", "step-00000007.003"]


FILES = ("checkpoint.json", "weights.safetensors", "optimizer/optimizer.safetensors", "rest.pt")


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_latest_one_falls_back_to_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    made = trained(3)
    write(tmp_path, 1, made)
    latest = write(tmp_path, 2)
    content = bytearray((latest / name).read_bytes())
    for place in (0, len(content) // 2, len(content) - 1) if how == "flipped" else (len(content) // 2,):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (latest / name).write_bytes(damaged if how == "flipped" else content[:place])
        if how == "gone":
            (latest / name).unlink()
        model, optimizer = build(9)
        assert load(tmp_path, model, optimizer).step == 1
        assert same(model, made[0])


def test_nothing_readable_names_every_problem(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has none"):
        load(tmp_path, *build())
    for step in (3, 4):
        (write(tmp_path, step) / "weights.safetensors").write_bytes(b"rubbish")
    before, _ = made = build(9)
    kept = copy.deepcopy(before)
    with pytest.raises(CheckpointError, match=r"step-00000004: weights.*7 bytes.*step-00000003"):
        load(tmp_path, *made)
    assert same(before, kept)


@pytest.mark.parametrize("text", ["[1]", "3", "", '{"sha256": "0", "content": {"format": 2}}', "\xff"])
def test_what_is_no_description_of_a_checkpoint_falls_back_to_the_one_before(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "checkpoint.json").write_text(text, encoding="latin-1")
    assert load(tmp_path, *build()).step == 1


def test_half_written_folders_are_never_read_and_go_when_they_are_old(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".writing-old", ".writing-new", "step-00000009"):
        (tmp_path / name).mkdir()
    (tmp_path / ".writing-old" / "file").write_text("")
    for path in (tmp_path / ".writing-old" / "file", tmp_path / ".writing-old"):
        os.utime(path, (0, 0))
    assert load(tmp_path, *build()).step == 1
    write(tmp_path, 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".writing-new", "step-00000001", "step-00000002", "step-00000009"}


# Of another model --------------------------------------------------------------------------------------------------


def test_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    other = Tied()
    other.norm = nn.BatchNorm1d(4, track_running_stats=False)  # type: ignore[assignment]
    groups = [{"params": [other.scale]}, {"params": [other.embedding.weight, *other.norm.parameters()]}]
    with pytest.raises(CheckpointError, match="belong to this model.*running_mean"):
        load(tmp_path, other, torch.optim.AdamW(groups))


def square(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def parts(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [parameter]} for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("make_optimizer", "match"),
    [
        (lambda model: torch.optim.AdamW(model.parameters()), r"\(AdamW\), but holds that of SGD"),
        (lambda model: torch.optim.SGD(parts(model), lr=0.1), r"\[1, 1\] parameters.*\[2\]"),
        (lambda model: torch.optim.SGD([model.weight], lr=0.1), r"\[1\] parameters.*\[2\]"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_before_anything_changes(
    tmp_path: Path, make_optimizer: Any, match: str
) -> None:
    batch = torch.randn(4, 3)
    model = nn.Linear(3, 1)
    saved = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with partita.parallelize(model, saved, square, batch, plan=ONE) as step:
        step(batch)
        step.save(tmp_path)
    other = nn.Linear(3, 1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with partita.parallelize(other, make_optimizer(other), square, batch, plan=ONE) as step:
        with pytest.raises(CheckpointError, match=match):
            step.load(tmp_path)
        assert step.num_steps == 0
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        step(batch)
