"""Which layer reads which layer's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partita.graph import capture
from partita.graph.feeds import feeding_weights
from partita.search.blocks import BlockLinear


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.down(self.up(x).relu()) + x)
        return result


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.again(self.again(self.first(x)))
        return result


MODELS = {
    "pointwise": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.Dropout(0.1), nn.GELU(), nn.Linear(6, 5, bias=False), nn.Linear(5, 2)
        ),
        {"3.weight": "0.weight", "4.weight": "3.weight"},
    ),
    "blocks": (
        lambda: nn.Sequential(BlockLinear(4, 6, (3, 2), num_inputs=1), nn.ReLU(), nn.Linear(6, 2)),
        {"2.weight": "0.weight"},
    ),
    "a norm mixes": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), {}),
    "a sum keeps": (Residual, {"down.weight": "up.weight", "head.weight": "down.weight"}),
    "several sources": (Shared, {}),
}


@pytest.mark.parametrize("shape", [(8, 4), (8, 3, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_inputs_that_are_outputs(name: str, shape: tuple[int, ...]) -> None:
    build, expected = MODELS[name]
    graph = capture(build(), lambda model, batch: model(batch).square().mean(), torch.randn(shape))
    assert feeding_weights(graph) == expected
