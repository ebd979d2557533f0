"""Hoisted draws: the same numbers in the same order as the whole graph draws, and nothing that depends on data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from partita.graph.capture import capture
from partita.graph.graph import Graph, InputKind
from partita.graph.randomness import is_random
from partita.program.draws import hoist_draws

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def graph_of(loss: Loss) -> Graph:
    torch.manual_seed(0)
    return capture(nn.Linear(3, 3), loss, torch.randn(4, 3))


def noisy(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = nn.functional.dropout(model(x), 0.5)
    steps = torch.randint(0, 10, (x.shape[0], 1))
    return (y + torch.randn_like(y) * torch.rand(3) + steps + torch.empty(3).exponential_()).square().mean()


def sampled(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = torch.sigmoid(model(x + torch.randn_like(x)))
    return (y * torch.bernoulli(y.detach()) * torch.rand(3)).mean()


def values(graph: Graph) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        item.node: torch.ones(()) if item.kind is InputKind.SEED else torch.randn(item.shape) for item in graph.inputs
    }


def test_draws_and_rest_give_what_the_graph_gives() -> None:
    graph = graph_of(noisy)
    draws, rest = hoist_draws(graph)
    given = values(graph)
    torch.manual_seed(7)
    expected = graph.module(*given.values())
    torch.manual_seed(7)
    drawn = {draw.name: draw.module() for draw in draws}
    for draw in draws:
        assert (tuple(drawn[draw.name].shape), drawn[draw.name].dtype) == (draw.spec.shape, draw.spec.dtype)
    nodes = [node for node in rest.graph.nodes if node.op == "placeholder"]
    found = rest(*(drawn[n.meta["draw"]] if "draw" in n.meta else given[n.name] for n in nodes))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_all_independent_draws_leave_the_graph_in_order() -> None:
    graph = graph_of(noisy)
    draws, rest = hoist_draws(graph)
    assert len(draws) == 5
    assert [draw.name for draw in draws] == [node.name for node in graph.nodes if is_random(node)]
    assert not [node for node in rest.graph.nodes if is_random(node)]


def test_from_the_first_draw_that_reads_data_on_all_stay() -> None:
    graph = graph_of(sampled)
    draws, rest = hoist_draws(graph)
    kinds = [str(node.target) for node in rest.graph.nodes if is_random(node)]
    assert len(draws) == 1 and "randn" in draws[0].name
    assert kinds[0].startswith("aten.bernoulli") and kinds[1].startswith("aten.rand.")


def test_the_seed_is_a_constant_and_the_given_graph_stays_as_it_was() -> None:
    graph = graph_of(noisy)
    before = str(graph.module.graph)
    _, rest = hoist_draws(graph)
    seeds = {item.node for item in graph.inputs_of(InputKind.SEED)}
    assert str(graph.module.graph) == before
    assert seeds and not seeds & {node.name for node in rest.graph.nodes if node.op == "placeholder"}


def test_attention_without_dropout_is_not_random() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    tracer = torch.fx.Graph()
    q = tracer.placeholder("q")
    assert not is_random(tracer.call_function(flash, (q, q, q)))
    assert not is_random(tracer.call_function(flash, (q, q, q, 0.0)))
    assert is_random(tracer.call_function(flash, (q, q, q, 0.1)))
