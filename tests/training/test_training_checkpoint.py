from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path, 1)
