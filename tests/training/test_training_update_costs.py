"""Costs of updates: of every parameter, larger for larger matrices, the same on all processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from precision_job import MuonWithAdam

from partita import Cluster
from partita.training import update_costs
from partita.training.job import Team
from partita.training.update_costs import agreed_costs, update_times_s


def named(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(*shape)) for name, shape in shapes.items()}


def test_every_parameter_has_a_time_and_each_shape_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measured(optimizer: Any, options: Any, shape: Any, dtype: torch.dtype) -> float:
        seen.append((tuple(shape), dtype))
        return 1.0 * len(seen)

    monkeypatch.setattr(update_costs, "_TIMES_S", {})
    monkeypatch.setattr(update_costs, "_measured_s", measured)
    parameters = named(a=(4, 6), b=(4, 6), c=(6, 4), other=(3,))
    optimizer = torch.optim.Muon([parameters[name] for name in "abc"], lr=0.01)
    found = update_times_s(optimizer, parameters)
    assert found == {"a": 1.0, "b": 1.0, "c": 2.0, "other": 0.0}
    assert seen == [((4, 6), torch.float32), ((6, 4), torch.float32)]
    half = {"w": nn.Parameter(torch.zeros(4, 6).bfloat16())}
    update_times_s(torch.optim.Muon(half.values(), lr=0.01), half, masters=True)
    assert len(seen) == 2  # of the master
    update_times_s(torch.optim.Muon(half.values(), lr=0.01), half)
    assert seen[-1] == ((4, 6), torch.bfloat16)


def test_large_shapes_go_on_as_a_power_of_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_costs, "_TIMES_S", {})
    monkeypatch.setattr(update_costs, "_measured_s", lambda _, options, shape, dtype: 1e-9 * float(shape[0]) ** 3)
    parameters = named(large=(2048, 1024))
    found = update_times_s(torch.optim.Muon(parameters.values(), lr=0.01), parameters)
    assert found["large"] == pytest.approx(1e-9 * 2048**3, rel=1e-6)


def test_groups_of_one_class_are_measured_each_by_its_own_options() -> None:
    parameters = named(matrix=(256, 256), table=(256, 256))
    groups = [{"params": [parameters["matrix"]], "is_muon": True}, {"params": [parameters["table"]]}]
    found = update_times_s(MuonWithAdam(groups), parameters)
    assert found["matrix"] > found["table"] > 0


def test_nothing_is_told_of_an_optimizer_that_cannot_update_made_up_values() -> None:
    class Stubborn(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("not on these")

    parameters = named(a=(2, 2))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert update_times_s(Stubborn(parameters.values(), lr=0.1), parameters) == {}
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


@pytest.mark.parametrize(("preset", "shares"), [("1x1xcpu-2", False), ("2x1xcpu-2", True)])
def test_only_several_processes_have_a_link(preset: str, shares: bool) -> None:
    parameters = named(a=(4, 4))
    optimizer = torch.optim.Muon(parameters.values(), lr=0.01)
    cluster = Cluster.preset(preset)
    costs = agreed_costs(optimizer, parameters, cluster, Team(), masters=False)
    assert [name for name, _ in costs.time_s] == ["a"]
    assert costs.bytes_per_s == (cluster.network.bytes_per_s if shares else 0.0)
