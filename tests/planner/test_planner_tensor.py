"""The tensor axis placed by the intra-stage programme."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from partita.cluster import Cluster
from partita.cost.table import CostTable
from partita.graph.capture import capture
from partita.planner.layout import worker_layout
from partita.planner.tensor import place_on_tensor_axis

sys.path.insert(0, str(Path(__file__).parent))


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_large_weights_and_few_rows_are_split_like_megatron() -> None:
    """Rows of the first weight, columns of the second, or the other way round: never both alike."""
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 4))
    graph = capture(model, loss_fn, (torch.randn(8, 512), torch.randint(0, 4, (8,))))
    cluster = Cluster.preset("1x1xcpu-4")
    workers = worker_layout(cluster, 1, 1, 2, 1, 2)
    found = place_on_tensor_axis(graph, workers, cluster, CostTable(cluster), state_bytes_per_element=8.0)
    assert found.gap < 1e-6
    assert {found.inputs["0.weight"]["tensor"], found.inputs["2.weight"]["tensor"]} == {"S(0)", "S(1)"}
    assert all(set(by_axis) == {"tensor"} for by_axis in found.rules.values())


def test_many_rows_and_small_weights_cut_the_batch() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    graph = capture(model, loss_fn, (torch.randn(65536, 16), torch.randint(0, 4, (65536,))))
    cluster = Cluster.preset("1x1xcpu-4")
    workers = worker_layout(cluster, 1, 1, 2, 1, 2)
    found = place_on_tensor_axis(graph, workers, cluster, CostTable(cluster), state_bytes_per_element=8.0)
    assert found.inputs["batch[0]"] == {"tensor": "S(0)"}
    whole = place_on_tensor_axis(graph, workers, cluster, CostTable(cluster), state_bytes_per_element=8.0, rows=False)
    assert "batch[0]" not in whole.inputs  # others cut its rows
