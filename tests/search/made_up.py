"""Searches that were never run: made-up candidates of real networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from partita.search.candidates import Aims, Candidate
from partita.search.curves import Point
from partita.search.deadline import Budget
from partita.search.result import SearchResult
from partita.search.task import Task, default_loss, suggested_adamw
from partita.search.trials import SearchTrial

BUDGET = Budget(start_s=0.0, deadline_s=100.0, final_share=0.4)


def data() -> tuple[Any, Any]:
    part = torch.randn(256, 16), torch.zeros(256).long()
    return part, part


def build(trial: SearchTrial) -> nn.Module:
    width = trial.suggest_int("width", 8, 512, log=True)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def candidate(number: int, width: int, floor: float, step_time_s: float) -> Candidate:
    """One that learns towards a score of 1 - floor, at 64 rows a step."""
    rate = 64 / step_time_s
    points = tuple(Point(n, n / rate, 1 - floor - 30 / n) for n in (100.0, 200.0, 400.0, 800.0, 1600.0))
    return Candidate(
        number=number, params={"width": width, "learning_rate": 0.01}, state="waiting", rung=1, points=points,
        samples_per_s=rate, step_time_s=step_time_s, num_parameters=width**2, batch_size=64, plan="plain PyTorch",
    )  # fmt: skip


def result(*candidates: Candidate) -> SearchResult:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    width = optuna.distributions.IntDistribution(8, 512, log=True)
    rate = optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    for one in candidates:
        kinds = {"width": width, "learning_rate": rate}
        study.add_trial(optuna.create_trial(params=one.params, distributions=kinds, values=[one.points[-1].score]))
    task = Task(
        build=build, data=data, loss_fn=default_loss, score=None, direction="maximize", optimizer=suggested_adamw,
        batch_size=64, connections=None,
    )  # fmt: skip
    return SearchResult(
        best=candidates[0], score=0.99, trials=candidates, weights=Path("w"), folder=Path("f"), budget=BUDGET,
        delivered_s=99.5, aims=Aims(objectives=("score",), maximize=True, bound=1.0), task=task, study=study,
    )  # fmt: skip
