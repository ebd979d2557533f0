"""Models and losses on which sharding is tried, one row each: (name, model, loss, batch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Case:
    model: nn.Module
    loss: Callable[..., torch.Tensor]
    batch: tuple[torch.Tensor, ...]


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.positions = nn.Embedding(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        hidden = self.embedding(x) + self.positions(torch.arange(length))
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        return self.head(self.layer(hidden, src_mask=mask))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.body(a, b)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.body = kind(4, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def batch_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def cross_entropy(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y, ignore_index=-1)


def token_loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=0)


def contrastive(model: Any, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    a, b = F.normalize(model(x), dim=-1), F.normalize(model(z), dim=-1)
    return F.cross_entropy(a @ b.t() / 0.1, torch.arange(a.shape[0]))


def mixed_losses(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x)
    spread = out.std() + out.logsumexp(0).sum() + out.var(0).mean()
    return F.binary_cross_entropy_with_logits(out, y.sigmoid()) + F.smooth_l1_loss(out, y) + F.mse_loss(out, y) + spread


def mixed_indexing(model: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    rows = model(i)
    picked = rows[torch.arange(rows.shape[0])[:, None], j].square().mean() + rows.gather(1, j[..., None]).sum()
    similar = torch.einsum("btd,bsd->bts", rows, rows).softmax(-1)
    return picked + torch.cumsum(rows, 1).mean() + similar.topk(2)[0].mean() + rows.sort(1)[0][:, 0].sum()


def u_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 4, 2, 2),
        nn.InstanceNorm2d(4, affine=True), nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip


def squares(model: Any, *inputs: torch.Tensor) -> torch.Tensor:
    return model(*inputs).square().mean()


CLASSES = torch.tensor([0, 1, 2, -1, 1, 0, 2])
CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(mlp(), cross_entropy, (torch.randn(7, 5), CLASSES)),
    "batch_norm_small": lambda: Case(
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)),
        cross_entropy,
        (torch.randn(7, 5), CLASSES),
    ),
    "batch_norm_large": lambda: Case(
        batch_norm_net(), cross_entropy, (torch.randn(33, 3, 32, 32), torch.randint(0, 3, (33,)))
    ),
    "language_model": lambda: Case(
        LanguageModel(), token_loss, (torch.randint(0, 11, (7, 6)), torch.randint(0, 11, (7, 6)))
    ),
    "transformer": lambda: Case(Translator(), squares, (torch.randn(7, 5, 8), torch.randn(7, 4, 8))),
    "lstm": lambda: Case(Recurrent(nn.LSTM), cross_entropy, (torch.randn(7, 9, 4), CLASSES)),
    "gru": lambda: Case(Recurrent(nn.GRU), cross_entropy, (torch.randn(7, 9, 4), CLASSES)),
    "contrastive": lambda: Case(mlp(), contrastive, (torch.randn(7, 5), torch.randn(7, 5))),
    "mixed_losses": lambda: Case(mlp(), mixed_losses, (torch.randn(7, 5), torch.randn(7, 3))),
    "mixed_indexing": lambda: Case(
        nn.Embedding(10, 4), mixed_indexing, (torch.randint(0, 10, (7, 3)), torch.randint(0, 3, (7, 3)))
    ),
    "u_net": lambda: Case(u_net(), squares, (torch.randn(7, 2, 6, 6),)),
    "conv_1d": lambda: Case(
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.ELU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 2, groups=4), nn.Softplus()),
        squares,
        (torch.randn(7, 2, 12),),
    ),
}
