"""Stages: forward values go up only, gradients go down only, whatever the cuts."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.graph.graph import Phase
from partita.graph.randomness import is_random
from partita.program.draws import hoist_draws
from partita.program.stages import StageCuts, assign_stages

sys.path.insert(0, str(Path(__file__).parent))
from program_cases import CASES, Case, captured, forward_ops

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


def gibbs(model: torch.nn.Linear, batch: torch.Tensor) -> torch.Tensor:
    """Two draws, the second from the result of the first."""
    hidden = torch.bernoulli(torch.sigmoid(model(batch)))
    visible = torch.bernoulli(torch.sigmoid(hidden @ model.weight))
    return (model(batch) - model(visible)).square().mean()


GIBBS = Case(lambda: torch.nn.Linear(4, 4), gibbs, lambda rows: torch.randn(rows, 4))


@functools.cache
def graph_of(case: str):
    graph = captured(GIBBS if case == "gibbs" else CASES[case], 4)[1]
    return graph, hoist_draws(graph)[1]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["mlp", "transformer", "partly", "lstm", "batch_norm"]), st.data())
def test_values_flow_up_in_forward_and_down_in_backward(case: str, data: st.DataObject) -> None:
    graph, module = graph_of(case)
    names = forward_ops(graph)
    count = data.draw(st.integers(1, 4))
    places = data.draw(st.sets(st.integers(1, len(names) - 1), min_size=count - 1, max_size=count - 1))
    cuts = StageCuts(graph, [names[place] for place in sorted(places)])
    staging = assign_stages(module, cuts, {item.node: item for item in graph.inputs}, {})
    assert staging.num_stages == count
    for node in module.graph.nodes:
        if node.name not in staging.stage:
            continue
        assert 0 <= staging.stage[node.name] < count
        for item in node.all_input_nodes:
            if item.name not in staging.stage or staging.phase[item.name] is not staging.phase[node.name]:
                continue
            if staging.phase[node.name] is Phase.FORWARD:
                assert staging.stage[item.name] <= staging.stage[node.name]
            else:
                assert staging.stage[item.name] >= staging.stage[node.name]


def test_every_op_of_a_stage_interval_is_on_that_stage() -> None:
    graph, module = graph_of("mlp")
    names = forward_ops(graph)
    middle = len(names) // 2
    staging = assign_stages(module, StageCuts(graph, [names[middle]]), {i.node: i for i in graph.inputs}, {})
    for place, name in enumerate(names):
        if name in staging.stage:
            assert staging.stage[name] == (place >= middle)


def test_draws_that_depend_on_data_run_on_one_stage() -> None:
    graph, module = graph_of("gibbs")
    names = forward_ops(graph)
    draws = [node for node in module.graph.nodes if is_random(node)]
    assert len(draws) == 2 and draws[1].name in names[names.index(draws[0].name) + 1 :]
    inputs = {item.node: item for item in graph.inputs}
    between = StageCuts(graph, [draws[1].name])
    staging = assign_stages(module, between, inputs, {})
    assert [staging.stage[node.name] for node in draws] == [1, 1]
    before = names[: names.index(draws[0].name)]
    assert {staging.stage[name] for name in before if name in staging.stage} == {0}, "the others stay"


def test_cuts_must_be_in_order_and_exist() -> None:
    graph, _ = graph_of("mlp")
    names = forward_ops(graph)
    with pytest.raises(PlanError, match="in the graph's order"):
        StageCuts(graph, [names[4], names[2]])
    with pytest.raises(PlanError, match="no op 'nothing'"):
        StageCuts(graph, ["nothing"])
