"""What would be best with other resources, and the report of a search, from made-up candidates of real networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from partita import InputError
from partita.cluster import Cluster
from partita.search.candidates import Aims, Candidate
from partita.search.curves import Point
from partita.search.deadline import Budget
from partita.search.resources import resources
from partita.search.result import SearchResult
from partita.search.task import Task, default_loss, suggested_adamw
from partita.search.trials import SearchTrial
from partita.search.what_if import what_if

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


def test_resources_in_words() -> None:
    here = Cluster.detect()
    machines = resources("1, 2,4 machines at 100 Mbit/s", here)
    assert [len(one.machines) for one in machines.values()] == [1, 2, 4]
    assert machines["2 machines"].network.bytes_per_s == 12.5e6
    assert [len(one.processes) for one in machines.values()] == [1, 2, 4]
    assert resources("1 cores", here)["1 core"].num_cores == 1
    for wrong in ("many machines", "1,2", "0 machines", "9999 cores", "2 machines at 3 bananas"):
        with pytest.raises(InputError, match="resources must be"):
            resources(wrong, here)


@pytest.mark.slow
def test_with_slow_networks_nothing_is_gained_and_what_is_measured_corrects_what_is_predicted() -> None:
    fast, better = candidate(0, 16, 0.05, 1e-3), candidate(1, 256, 0.0, 4e-3)
    found = what_if(result(fast, better), resources("1,2 machines at 1 kbit/s", Cluster.detect()))
    one, two = found.outcomes["1 machine"], found.outcomes["2 machines"]
    assert {row.candidate for row in one} == {0, 1} and not found.left_out
    by_number = {row.candidate: row for row in one}
    for row in two:
        alone_s = by_number[row.candidate].step_time_s  # ops are measured in between, beside whatever else runs
        assert alone_s / 4 < row.step_time_s < alone_s * 4, "an exchange over this network would take a thousand steps"
    # A step here is measured to take so long; other plans of this machine are in proportion.
    doubled = what_if(
        result(dataclasses.replace(fast, step_time_s=2e-3, samples_per_s=32_000.0), better),
        resources("1 machines", Cluster.detect()),
    )
    assert found.ratios[0] < doubled.ratios[0] < 4 * found.ratios[0]
    assert one[0].candidate == 1 and one[0].score >= one[1].score
    assert "Measured: learning curves" in str(found) and "2 machines" in str(found)


def test_the_report_tells_what_mattered_and_what_to_try_next() -> None:
    made = [candidate(i, 16 * (i + 1), 0.03 * i, 1e-3) for i in range(12)]
    made[0] = dataclasses.replace(made[0], params={"width": 8, "learning_rate": 0.01})
    made += [Candidate(number=20 + i, state="rejected", why="it is too large") for i in range(8)]
    found = result(*made[:12])
    found = dataclasses.replace(found, trials=tuple(made))
    text = found.explain()
    assert sum(found.importance.values()) == pytest.approx(1)
    assert "8 rejected" in text and "the last one as it is too large" in text
    assert "500 ms before the deadline" in text
    assert "candidate 0: width 8" in text
    if found.importance["width"] > 0.1:
        assert "values of width below 8" in text


def test_the_front_has_whom_nobody_beats() -> None:
    small, large = candidate(0, 16, 0.05, 1e-3), candidate(1, 64, 0.0, 4e-3)
    beaten = dataclasses.replace(candidate(2, 64, 0.2, 5e-3), num_parameters=10**6)
    found = result(small, large, beaten)
    assert {one.number for one in found.pareto} == {0, 1}
    assert found.importance == {}, "three candidates tell nothing"
