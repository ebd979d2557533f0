"""Small models of the kinds that people train: a chain, skips, a transformer, two chains that meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Case = tuple[nn.Module, Callable[[nn.Module, Any], torch.Tensor], Any]
WIDTH = 16


def chain() -> Case:
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers), lambda model, batch: model(batch).square().sum(), torch.randn(16, WIDTH)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class _Skips(nn.Module):
    """Residual blocks, and one skip over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(_Residual(), _Residual())
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        both = torch.cat([stem, self.blocks(stem)], dim=1)
        out: torch.Tensor = self.head(both.mean(dim=(2, 3)))
        return out


def skips() -> Case:
    batch = (torch.randn(8, 3, 6, 6), torch.randint(0, 5, (8,)))
    return _Skips(), lambda model, b: F.cross_entropy(model(b[0]), b[1], reduction="sum"), batch


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if memory is not None:
            k = v = memory
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + out


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = _Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attention(x, memory)
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class _Transformer(nn.Module):
    """Tied embeddings: the first and the last stage read the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(20, WIDTH), nn.Sequential(_Block(), _Block())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embedding(tokens)) @ self.embedding.weight.T


def transformer() -> Case:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")

    return _Transformer(), loss_fn, (torch.randint(0, 20, (8, 6)), torch.randint(0, 20, (8, 6)))


class _EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.first, self.second = _Block(), _Block(), _Block()
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory = self.encoder(source)
        out: torch.Tensor = self.head(self.second(self.first(target, memory), memory))
        return out


def encoder_decoder() -> Case:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        out: torch.Tensor = model(batch[0], batch[1]).square().sum()
        return out

    return _EncoderDecoder(), loss_fn, (torch.randn(8, 5, WIDTH), torch.randn(8, 6, WIDTH))


MODELS: dict[str, Callable[[], Case]] = {
    "chain": chain,
    "skips": skips,
    "transformer": transformer,
    "encoder_decoder": encoder_decoder,
}
