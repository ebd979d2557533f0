"""What the benchmark of learning connections trains on and judges by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.connection_tasks import TASKS, Task
from benchmarks.connections import summarise


def row(method: str, score: float, **values: Any) -> dict[str, Any]:
    return {"task": "digits, 97 %", "method": method, "score": score, **values}


def test_limits_are_held_against_the_rows() -> None:
    rows = [row("rigl", 90.0), row("set", 75.0), row("static", 61.0)]
    summary, misses = summarise(rows)
    assert summary["holds"] == {
        "digits, 97 %: RigL >= 89": True,
        "digits, 97 %: SET >= 70": True,
        "digits, 97 %: static <= 60": False,
    }
    assert len(misses) == 1 and "static <= 60" in misses[0]


def test_repeated_rows_must_be_those_of_one_worker() -> None:
    how = {"workers": 2, "processes": 1, "dtype": "float64"}
    assert not summarise([row("set", 75.0, **how, same_masks=True, same_score=True)])[1]
    assert len(summarise([row("set", 75.0, **how, same_masks=False, same_score=True)])[1]) == 1
    single = {**how, "dtype": "float32"}
    assert not summarise([row("set", 75.0, **single, same_masks=False, same_score=True)])[1]
    assert "broke" in summarise([row("set", 75.0, errors="broke")])[1][0]


@pytest.mark.parametrize("num_parameters", [517, 1350])
def test_small_dense_networks_have_as_many_parameters(num_parameters: int) -> None:
    task = Task("digits", 0.1)
    model = task.model(0, task.small_widths(num_parameters))
    assert sum(item.numel() for item in model.parameters()) == pytest.approx(num_parameters, rel=0.05)


def test_true_connections_are_counted() -> None:
    task = TASKS["teacher"]
    x, y, truth = task._data(3)
    assert truth.sum(1).tolist() == [5] * 50 and len(x) == len(y) == 2000
    model = task.model(3)
    assert task.judge(model, {"0.weight": truth}, 3) == {"precision": 1.0, "recall": 1.0}
    half = truth & (torch.arange(200) < 100)
    found = task.judge(model, {"0.weight": half}, 3)
    assert found["precision"] == 1.0 and found["recall"] == pytest.approx(float(half.sum() / truth.sum()))
    with torch.no_grad():
        model[0].weight.copy_(truth * 1.0)
    assert task.judge(model, {}, 3)["recall"] == 1.0  # the largest weights are taken


def test_noise_is_as_spread_as_pixels() -> None:
    x, _, judged, _ = TASKS["noisy digits, 98 %"]._data(0)
    assert x.shape[1] == judged.shape[1] == 512
    assert math.isclose(float(x[:, 64:].std()), float(x[:, :64].std()), rel_tol=0.01)
