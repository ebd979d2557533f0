"""Graphs split along one axis are split along the next, exchanges included, alike for all workers of the first axis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from partita.sharding import communication
from partita.sharding.calls import OpCall, Slot, TensorSpec
from partita.sharding.placement import Shard
from partita.sharding.ruleset import rules_of
from partita.sharding.shard import ShardedGraph, shard


def call_of(
    target: Callable[..., torch.Tensor], shape: tuple[int, ...], result: tuple[int, ...], **options: object
) -> OpCall:
    device = torch.device("cpu")
    inputs, outputs = (TensorSpec(s, torch.float32, device) for s in (shape, result))
    return OpCall(target, (Slot(0),), {"axis": "tensor", **options}, (inputs,), (outputs,), False)


def texts(call: OpCall) -> set[str]:
    return {rule.text() for rule in rules_of(call)}


def test_an_exchange_is_cut_in_the_dims_that_it_leaves_alone() -> None:
    gather = call_of(communication.all_gather, (4, 3, 6), (4, 6, 6), dim=1, sizes=(3, 3))
    assert gather.is_exchange and texts(gather) == {"S0 -> S0", "S2 -> S2", "P -> P"}
    reduce = call_of(communication.all_reduce, (4, 3), (4, 3))
    assert texts(reduce) == {"S0 -> S0", "S1 -> S1", "P -> P"}
    turn = call_of(communication.all_to_all, (4, 3, 6), (4, 6, 3), dim=1, sizes=(3, 3), new_dim=2, new_sizes=(3, 3))
    assert texts(turn) == {"S0 -> S0", "P -> P"}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(torch.relu(self.up(x)))).square().mean()


def graph_and_inputs() -> tuple[torch.fx.GraphModule, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Mlp()
    names = ["x", *(name.replace(".", "_") for name, _ in model.named_parameters())]
    values = [torch.randn(4, 5, 6), *(p.detach() for p in model.parameters())]

    def step(x: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        loss = torch.func.functional_call(model, named, (x,))
        return [loss, *torch.autograd.grad(loss, parameters)]

    module = make_fx(step, tracing_mode="fake")(*[value.requires_grad_(value.dim() < 3) for value in values])
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.name = name
    return module, {name: value.detach() for name, value in zip(names, values, strict=True)}


def nested(tensor: ShardedGraph, rows: tuple[int, ...], count: int) -> list[list[ShardedGraph]]:
    seeds = {"x": Shard(0, rows)}
    first = shard(tensor.local(0), seeds, axis="data", size=count)
    others = [
        shard(tensor.local(c), seeds, axis="data", size=count, decisions=first.decisions) for c in range(1, tensor.size)
    ]
    return [[first, *others]]


@pytest.mark.parametrize(("rows", "halves"), [((2, 2), (4, 4)), ((3, 1), (5, 3))])
def test_decisions_of_the_first_worker_hold_on_all(rows: tuple[int, ...], halves: tuple[int, ...]) -> None:
    module, _ = graph_and_inputs()
    seeds = {"up_weight": Shard(0, halves), "up_bias": Shard(0, halves), "down_weight": Shard(1, halves)}
    wanted = {1: seeds["up_weight"], 2: seeds["up_bias"], 3: seeds["down_weight"]}
    tensor = shard(module, seeds, axis="tensor", size=2, must_replicate=frozenset({0}), wanted=wanted)
    [graphs] = nested(tensor, rows, 2)
    kinds = [
        [(node.target.__name__, node.kwargs["axis"], node.name) for node in graph.local(0).graph.nodes
         if node.target in communication.COMMUNICATION_OPS]
        for graph in graphs
    ]  # fmt: skip
    assert kinds[0] == kinds[1] and any(axis == "tensor" for _, axis, _ in kinds[0])
    assert graphs[0].output_placements == graphs[1].output_placements
