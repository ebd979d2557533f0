"""Memory of plain PyTorch, against what torch holds in a step; weights, batch and state by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "program"))
sys.path.insert(0, str(Path(__file__).parent.parent / "graph"))
from live_storages import LiveStorages
from program_cases import CASES, captured

from partita.cost.memory import batch_bytes, block_bytes, state_bytes, weight_bytes
from partita.graph.graph import InputKind

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


def test_what_outlives_a_step() -> None:
    model, graph, batches = captured(CASES["batch_norm"], 6)
    tensors = [*model.parameters(), *model.buffers()]
    assert weight_bytes(graph) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert batch_bytes(graph) == sum(leaf.numel() * leaf.element_size() for leaf in batches[0])
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert block_bytes(graph, 8.0) - block_bytes(graph, 0.0) == 8 * trained
    assert (state_bytes(4 * 10, 8.0), state_bytes(8 * 10, 8.0)) == (80, 160), "float32 and float64"


@pytest.mark.parametrize("name", ["batch_norm", "denoise", "dropout", "mlp", "transformer"])
def test_a_plain_step_needs_about_as_much(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd and the loss function hold some values a little longer than the graph's order needs."""
    model, graph, batches = captured(CASES[name], 64)
    monkeypatch.setattr("partita.graph.storages.workspace_bytes", lambda node: 0)  # torch does not tell those
    live = LiveStorages()
    with live.watch():
        CASES[name].loss(model, batches[0]).backward()
    constants = sum(torch.Size(item.shape).numel() * 4 for item in graph.inputs_of(InputKind.CONSTANT))
    predicted = block_bytes(graph, 0.0) - weight_bytes(graph) - batch_bytes(graph) + constants
    assert predicted == pytest.approx(live.peak_bytes, rel=0.25)
