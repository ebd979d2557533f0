"""Methods that add gradients between real processes, in whole training steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import sync_job
from sync_cases import plain_losses
from test_training_processes import run_job

from partita.training.sync import method_of
from partita.training.sync.method import Part, Peers

IN_THE_GRAPH = ("0.bias", "1.weight", "1.bias")  # batch normalisation's exact statistics have summed them already
SWITCHED_OFF = ("fp32", "full rank", "all elements", "no momentum", "all components", "no masks")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job("2", tmp_path_factory.mktemp("sync"), Path(sync_job.__file__))


def plain() -> list[float]:
    return plain_losses(sync_job.build(), sync_job.loss_fn, sync_job.batches())


@pytest.mark.parametrize("name", ["exact", *SWITCHED_OFF])
def test_with_compression_switched_off_training_is_exact(found: list[dict[str, Any]], name: str) -> None:
    assert found[0][name]["losses"] == pytest.approx(plain(), abs=1e-5)
    for one, exact in zip(found[0][name]["weights"], found[0]["exact"]["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sync_job.METHODS)
def test_all_processes_end_with_the_same_bits_and_bytes_are_those_of_the_formula(
    found: list[dict[str, Any]], name: str
) -> None:
    one, other = found[0][name], found[1][name]
    assert one["weights"] == other["weights"] and one["losses"] == other["losses"]
    parameters = sync_job.build().named_parameters()
    parts = [Part(key, tuple(value.shape)) for key, value in parameters if key not in IN_THE_GRAPH]
    for rank in range(2):
        peers = Peers((0, 1), rank)
        saved = [a - b for a, b in zip(found[rank]["exact"]["bytes"], found[rank][name]["bytes"], strict=True)]
        exact = method_of("exact").sent_bytes(parts, peers)
        assert set(saved) == {exact - method_of(sync_job.METHODS[name]).sent_bytes(parts, peers)}


@pytest.mark.parametrize("name", ["exact", "bf16", "int8", "powersgd", "topk", "demo"])
def test_plans_are_predicted_to_send_what_the_method_sends(found: list[dict[str, Any]], name: str) -> None:
    measured = sum(process[name]["bytes"][-1] for process in found)
    # The share that a method sends is that of all parameters; those of `IN_THE_GRAPH` are sent whole.
    assert found[0][name]["predicted"] == found[1][name]["predicted"] == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("name", sync_job.METHODS)
def test_bytes_are_told_by_where_they_go(found: list[dict[str, Any]], name: str) -> None:
    for rank in range(2):
        one = found[rank][name]
        assert one["sent_to"] == [{str(1 - rank): num_bytes} for num_bytes in one["bytes"]]


@pytest.mark.parametrize("name", ["bf16", "int8", "powersgd", "topk"])
def test_compressed_training_stays_close(found: list[dict[str, Any]], name: str) -> None:
    losses = found[0][name]["losses"]
    assert losses != found[0]["exact"]["losses"]
    assert losses == pytest.approx(plain(), abs=0.25)
