"""A shallow capture stands for the whole model: same ops times the number of blocks, and the model stays as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from partita.graph.capture import capture
from partita.graph.shallow import shallow_capture


class Block(nn.Module):
    def __init__(self, width: int, index: int = -1) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        if index >= 0:
            self.layer_idx = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).relu()


class Odd(Block):
    """Behaves by its position, which only a run can tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.layer_idx > 5 else super().forward(x)


class Stack(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], by_number: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.num_layers, self.by_number = len(blocks), by_number
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(self.num_layers if self.by_number else len(self.blocks)):
            x = self.blocks[index](x)
        return self.head(x)


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def ops(graph: Any) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("by_number", [False, True])
def test_ops_grow_by_one_block_for_each_block(by_number: bool) -> None:
    def counts(layers: int) -> tuple[Counter[str], Any]:
        model = Stack([Block(8) for _ in range(layers)], by_number)
        return ops(capture(model, loss_fn, torch.zeros(4, 8))), shallow_capture(model, loss_fn, torch.zeros(4, 8))

    whole, shallow = counts(12)
    two, _ = counts(2)
    three, _ = counts(3)
    assert shallow.reason == "" and ops(shallow.graph) == two
    assert whole == Counter({name: two[name] + 10 * (three[name] - two[name]) for name in three})
    assert shallow.lists[0].count(0) == 12


def test_kinds_may_alternate() -> None:
    model = Stack([Block(8) if i % 2 else nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for i in range(10)])
    shallow = shallow_capture(model, loss_fn, torch.zeros(4, 8))
    assert shallow.lists[0].kinds == (0, 1) * 5 and len(shallow.lists[0].captured) == 4


def test_a_block_that_behaves_by_position_is_captured_whole() -> None:
    model = Stack([Odd(8, index) for index in range(8)])
    shallow = shallow_capture(model, loss_fn, torch.zeros(4, 8))
    assert "'blocks.0' and 'blocks.7'" in shallow.reason and len(shallow.lists[0].captured) == 8


def test_the_model_is_left_as_it_was() -> None:
    model = Stack([Block(8, index) for index in range(6)], by_number=True)
    before = {name: id(module) for name, module in model.named_modules()}
    shallow_capture(model, loss_fn, torch.zeros(4, 8))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.num_layers == 6 and all(p.grad is None for p in model.parameters())


def test_one_module_in_many_places_is_not_shortened() -> None:
    block = Block(8)
    shallow = shallow_capture(Stack([block] * 5), loss_fn, torch.zeros(4, 8))
    assert shallow.lists == () and ops(shallow.graph)["aten.addmm.default"] == 6
