"""Models whose ops have no written rules: found rules keep them sharded, and the results agree with the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from partita.sharding.lockstep import run_sharded
from partita.sharding.placement import Shard
from partita.sharding.shard import ShardedGraph, shard

sys.path.insert(0, str(Path(__file__).parent))
from captured import joint_graph

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


class FourierMixer(nn.Module):
    """Mixes tokens by the real part of a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.second(torch.fft.irfft(torch.fft.rfft(self.first(x_BTD), dim=1), n=5, dim=1)).squeeze(-1)


class Whitening(nn.Module):
    """A batch of small systems solved by Cholesky factors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x_BTD)
        factor = torch.linalg.cholesky(hidden.mT @ hidden + torch.eye(6))
        return torch.linalg.solve_triangular(factor, hidden.mT, upper=False)


class Pooling(nn.Module):
    """Rows of every sample are summed by group."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.register_buffer("group", torch.tensor([0, 1, 1, 0, 2]))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x_BTD)
        return torch.zeros(hidden.shape[0], 3, 4).index_add(1, self.group, hidden).tanh()


class Patches(nn.Module):
    """A convolution written as `unfold` and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 9) / 3)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return (self.weight @ nn.functional.unfold(x_BTD.unsqueeze(1), 3)).relu()


def split(model: nn.Module, sizes: tuple[int, ...]) -> tuple[ShardedGraph, tuple[torch.Tensor, ...], dict[str, object]]:
    x = torch.randn(sum(sizes), 5, 6)
    module, flat, names = joint_graph(model, lambda net, batch: net(batch[0]).square().mean(), (x,))
    sharded = shard(module, {names[0]: Shard(0, sizes)}, axis="data", size=len(sizes))
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    return sharded, module(*flat), dict(zip(placeholders, flat, strict=True))


@pytest.mark.parametrize("sizes", [(4, 3), (1, 2, 3)])
@pytest.mark.parametrize("kind", [FourierMixer, Whitening, Pooling, Patches])
def test_same_result_without_gathering(kind: type[nn.Module], sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sharded, expected, inputs = split(kind(), sizes)
    for whole, got in zip(expected, run_sharded(sharded, inputs), strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)
    assert sharded.gathered == () and sharded.exchanges == ()
