"""Checkpoints under one plan and number of processes, loaded under every other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import resharding_job
from plain_training import train_plain
from resharding_job import ALONE, NOT_SHARED, NUM_STEPS, TOGETHER, WITH_METHOD
from test_training_processes import run_job

from partita.training.checkpoint import folder as folders
from partita.training.checkpoint.loader import weights_of

SCRIPT = Path(resharding_job.__file__)
PLANS = [*ALONE, *TOGETHER]
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resharding")


def everywhere(base: Path, corner: str) -> Found:
    """What the processes of a job found, and this one alone."""
    told = base / f"of {corner}"
    told.mkdir()
    one, other = run_job(corner, told, SCRIPT)
    assert one == other
    return {**one, **resharding_job.act(corner, ALONE, base)}


@pytest.fixture(scope="module")
def saved(base: Path) -> Found:
    return everywhere(base, "save")


@pytest.fixture(scope="module")
def loaded(base: Path, saved: Found) -> Found:
    return everywhere(base, "load")


def plain() -> list[float]:
    model, optimizer = resharding_job.build(0)
    return train_plain(model, optimizer, map(resharding_job.batch_of, range(NUM_STEPS + 4)))


@pytest.mark.parametrize("name", [*PLANS, NOT_SHARED])
def test_saving_in_the_background_does_not_change_training(saved: Found, name: str) -> None:
    assert saved[name]["losses"] + saved[name]["later"] == pytest.approx(plain(), abs=1e-5)


@pytest.mark.parametrize("source", [*PLANS, NOT_SHARED])
@pytest.mark.parametrize("target", [*PLANS, NOT_SHARED])
def test_training_goes_on_under_every_other_plan(loaded: Found, source: str, target: str) -> None:
    assert loaded[target][source] == pytest.approx(plain()[NUM_STEPS:], abs=1e-5)


def test_error_feedback_goes_on_under_the_same_plan(saved: Found, loaded: Found) -> None:
    wanted = [saved[WITH_METHOD]["losses"][-1], *saved[WITH_METHOD]["later"]]
    assert loaded[WITH_METHOD][WITH_METHOD] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", [*PLANS, NOT_SHARED])
def test_what_is_written_is_whole_and_written_once(base: Path, saved: Found, name: str) -> None:
    (path,) = folders.complete(base / name)
    meta = folders.read_meta(path)
    folders.verify(path, meta, meta.files)
    model, _ = resharding_job.build(0)
    parameters = sum(value.nbytes for value in model.parameters())
    weights = sum(facts.num_bytes for file, facts in meta.files.items() if file.startswith("weights"))
    states = sum(facts.num_bytes for file, facts in meta.files.items() if file.startswith("optimizer/"))
    assert parameters < weights < parameters + 4096 and 2 * parameters < states < 2 * parameters + 8192
    num_files = sum(file.startswith("weights") for file in meta.files)
    assert num_files == {"data of processes": 2, "fully sharded": 2}.get(name, num_files)
    assert {key: value.shape for key, value in weights_of(base / name).items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert all(torch.isfinite(value).all() for value in weights_of(base / name).values())
