from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import partita
from partita import Constraints
from partita.errors import CheckpointError
from partita.training.checkpoint import read_checkpoint, write_checkpoint


class Trap:
    """Unpickling it would call something."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Trap, "sprung", True)


def write(folder: Path, step: int, value: float = 0.0) -> Path:
    shared = torch.full((2, 3), value)
    return write_checkpoint(
        folder,
        step=step,
        weights={
            "embedding.weight": shared,
            "head.weight": shared,
            "bias": torch.arange(3.0) + value,
            "count": torch.tensor(step),
        },
        optimizer_state={
            "state": {0: {"step": torch.tensor(float(step))}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        extra={"random_state": torch.get_rng_state()},
    )


def test_round_trip_with_tied_weights(tmp_path: Path) -> None:
    write(tmp_path, 7, 1.5)
    found = read_checkpoint(tmp_path)
    assert found.step == 7
    assert set(found.weights) == {"embedding.weight", "head.weight", "bias", "count"}
    assert torch.equal(found.weights["head.weight"], torch.full((2, 3), 1.5))
    assert int(found.weights["count"]) == 7
    assert found.optimizer_state["param_groups"][0]["lr"] == 0.1
    assert torch.equal(found.extra["random_state"], torch.get_rng_state())


def test_the_latest_counts_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    assert read_checkpoint(tmp_path).step == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("damage", ["weights.safetensors", "optimizer.pt", "meta.json"])
def test_a_damaged_latest_one_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    latest = write(tmp_path, 2)
    content = (latest / damage).read_bytes()
    (latest / damage).write_bytes(content[: len(content) // 2])
    assert read_checkpoint(tmp_path).step == 1


def test_nothing_readable_names_every_problem(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has none"):
        read_checkpoint(tmp_path)
    path = write(tmp_path, 4)
    (path / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="step-00000004"):
        read_checkpoint(tmp_path)


def test_a_crash_while_writing_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_step_that_is_saved_again_counts_and_the_older_one_is_not_touched_before(tmp_path: Path) -> None:
    for turn in range(1, 5):
        path = write(tmp_path, 7, value=float(turn))
        assert read_checkpoint(tmp_path).weights["bias"][0] == turn, path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007.002", "step-00000007.003"]


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    torch.save({"optimizer": Trap(), "extra": {}}, path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="step-00000001"):
        read_checkpoint(tmp_path)
    assert not Trap.sprung


def test_half_written_folders_are_never_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / "step-00000009").mkdir()  # killed between files: no meta.json yet
    assert read_checkpoint(tmp_path).step == 1


def test_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="belong to this model"):
        read_checkpoint(tmp_path, like={"other": torch.zeros(2)})


@pytest.mark.parametrize("text", ["[1]", "3", '{"format": 1, "step": 2, "aliases": []}', '{"format": 1, "step": null}'])
def test_what_is_no_description_of_a_checkpoint_falls_back_to_the_one_before(tmp_path: Path, text: str) -> None:
    first = write(tmp_path, 1)
    latest = write(tmp_path, 2)
    (latest / "meta.json").write_text(text)
    assert read_checkpoint(tmp_path).step == 1
    (first / "meta.json").write_text(text)
    with pytest.raises(CheckpointError, match="can be read"):
        read_checkpoint(tmp_path)


def square(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


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
    batch, plan = torch.randn(4, 3), Constraints(num_workers=1, compiled=False)
    model = nn.Linear(3, 1)
    saved = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with partita.parallelize(model, saved, square, batch, plan=plan) as step:
        step(batch)
        step.save(tmp_path)
    other = nn.Linear(3, 1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with partita.parallelize(other, make_optimizer(other), square, batch, plan=plan) as step:
        with pytest.raises(CheckpointError, match=match):
            step.load(tmp_path)
        assert step.num_steps == 0
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        step(batch)


def test_a_checkpoint_without_the_optimizers_class_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({key: meta[key] for key in ("format", "step", "aliases")}))
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    assert read_checkpoint(tmp_path, optimizer=adam).optimizer is None


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path, 1)
