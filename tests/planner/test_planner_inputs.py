"""Placements of inputs, as the constraints ask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partita.errors import PlanError
from partita.graph.capture import capture
from partita.graph.graph import Graph
from partita.plan import Constraints
from partita.planner.inputs import placed_inputs


@pytest.fixture(scope="module")
def graph() -> Graph:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    return capture(model, lambda m, b: m(b).square().mean(), torch.randn(4, 6))


def test_patterns_choose_inputs_by_name(graph: Graph) -> None:
    wanted = Constraints(inputs={"0.*": {"tensor": "S(0)"}, "2.weight": {"tensor": "S(1)"}, "2.bias": {"tensor": "R"}})
    found = placed_inputs(graph, 1, 2, wanted, {})
    assert found == {
        "0.weight": {"tensor": "S(0)"}, "0.bias": {"tensor": "S(0)"}, "2.weight": {"tensor": "S(1)"}
    }  # fmt: skip


def test_an_axis_of_one_worker_cuts_nothing(graph: Graph) -> None:
    assert placed_inputs(graph, 1, 1, Constraints(inputs={"0.*": {"tensor": "S(0)"}}, fully_sharded=True), {}) == {}


def test_fully_sharded_leaves_the_tensor_axis_its_dim_and_small_parameters_whole(graph: Graph) -> None:
    wanted = Constraints(inputs={"0.*": {"tensor": "S(0)"}}, fully_sharded=True)
    found = placed_inputs(graph, 2, 2, wanted, {})
    assert found["0.weight"] == {"tensor": "S(0)", "data": "S(1)"}
    assert found["0.bias"] == {"tensor": "S(0)"}
    assert "2.bias" not in found and found["2.weight"] == {"data": "S(1)"}


def test_what_the_planner_chose_can_be_added_to(graph: Graph) -> None:
    found = placed_inputs(graph, 2, 2, Constraints(fully_sharded=True), {"0.weight": {"tensor": "S(1)"}})
    assert found["0.weight"] == {"tensor": "S(1)", "data": "S(0)"}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"1.*": {"tensor": "S(0)"}}, "fits none"),
        ({"2.weight": {"tensor": "S(0)"}}, "at least 2 entries"),
        ({"batch*": {"data": "S(0)"}}, "as they are"),
    ],
)
def test_impossible_placements_are_refused(graph: Graph, inputs: dict[str, dict[str, str]], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        placed_inputs(graph, 2, 2, Constraints(inputs=inputs), {})
