"""Replicas as real processes: whole training steps, checkpoints, and what comes out of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import replica_job
from sync_cases import plain_losses
from test_training_processes import run_job

EXACT = ("local sgd, H=1", "diloco, H=1", "streaming, H=1", "stale 0", "gossip with all")
BY_CHANCE = ("gossip", "stale 2", "streaming")  # what is on its way, or whose turn it is, differs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job("", tmp_path_factory.mktemp("replicas"), Path(replica_job.__file__))


def plain() -> tuple[list[float], list[list[float]]]:
    model = replica_job.build()
    return plain_losses(model, replica_job.loss_fn, replica_job.loader()), replica_job.values_of(model)


@pytest.mark.parametrize("name", ["exact", *EXACT])
def test_switched_off_training_is_exact(found: list[dict[str, Any]], name: str) -> None:
    losses, values = plain()
    mean = [(a + b) / 2 for a, b in zip(*(one[name]["losses"] for one in found), strict=True)]
    assert mean == pytest.approx(losses, abs=1e-5)
    for one, wanted in zip(found[0][name]["merged"], values, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", replica_job.METHODS)
def test_what_comes_out_is_equal_everywhere(found: list[dict[str, Any]], name: str) -> None:
    assert found[0][name]["merged"] == found[1][name]["merged"]
    assert all(one[name]["kept"] for one in found)


@pytest.mark.parametrize("name", replica_job.METHODS)
def test_training_goes_on_from_a_checkpoint_as_it_went_on_before(found: list[dict[str, Any]], name: str) -> None:
    for one in found:
        tolerance = 0.2 if name in BY_CHANCE else 1e-5
        assert one[name]["again"] == pytest.approx(one[name]["later"], abs=tolerance)
        assert one[name]["num_steps"] == 16


def test_the_first_steps_of_post_local_sgd_are_exact(found: list[dict[str, Any]]) -> None:
    losses, _ = plain()
    assert found[0]["post-local"]["losses"][:4] == pytest.approx(losses[:4], abs=1e-5)
    assert found[0]["post-local"]["losses"][4] != pytest.approx(losses[4], abs=1e-5)  # of its own rows


def test_local_methods_send_now_and_then(found: list[dict[str, Any]]) -> None:
    sent = found[0]["diloco"]["bytes"]
    assert [bool(number) for number in sent] == [step % 3 == 0 for step in range(1, 9)]
