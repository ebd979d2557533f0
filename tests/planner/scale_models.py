"""Small models whose plans at scale are tested, on ``meta``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.families.scale import Gpt, Llama, next_token_loss
from partita.cluster.presets import GPU_KINDS
from partita.cost.networks import Fabric, NodeGroup


def gpt(layers: int = 8, hidden: int = 512, heads: int = 8) -> tuple[nn.Module, Any, Any]:
    """Model, loss and a batch of 64 sequences of 256 tokens."""
    return _tokens(lambda: Gpt(layers, hidden, heads, 1024, 256))


def llama(layers: int = 8, hidden: int = 512, heads: int = 8, kv_heads: int = 4) -> tuple[nn.Module, Any, Any]:
    """The same with grouped-query attention."""
    return _tokens(lambda: Llama(layers, hidden, heads, kv_heads, 1536, 1024))


def _tokens(make: Any) -> tuple[nn.Module, Any, Any]:
    with torch.device("meta"):
        model = make().to(torch.bfloat16)
        ids = torch.zeros(64, 256, dtype=torch.long)
    return model, next_token_loss, (ids, ids)


class ConvNet(nn.Module):
    """Repeated convolutions with batch norm."""

    def __init__(self, channels: int = 32, layers: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return y


def conv_net() -> tuple[nn.Module, Any, Any]:
    with torch.device("meta"):
        batch = (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
        return ConvNet(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch


def fabric(kind: str, num_gpus: int) -> Fabric:
    return Fabric(groups=(NodeGroup.of(GPU_KINDS[kind], num_gpus),))
