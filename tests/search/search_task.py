"""A small search that the tests run: two classes of points that a small network separates."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def data() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 8, generator=generator)
    y = ((x[:, 0] * x[:, 1] + x[:, 2]) > 0).long()
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def build(trial: Any) -> nn.Module:
    width = trial.suggest_int("width", 4, 64, log=True)
    act = trial.suggest_categorical("activation", ["relu", "tanh"])
    return nn.Sequential(nn.Linear(8, width), nn.ReLU() if act == "relu" else nn.Tanh(), nn.Linear(width, 2))


def batch_size(trial: Any) -> int:
    return 50


def build_or_die(trial: Any) -> nn.Module:
    """The first process that comes here is killed."""
    marker = Path(os.environ["SEARCH_TASK_MARKER"])
    if not marker.exists():
        marker.write_text("x")
        os.kill(os.getpid(), 9)
    return build(trial)


def broken(trial: Any) -> nn.Module:
    raise RuntimeError("broken on purpose")


def slow_build(trial: Any) -> nn.Module:
    time.sleep(3600)
    return build(trial)
