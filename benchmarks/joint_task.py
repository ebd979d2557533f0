"""A joint space of networks and training settings, in which speed decides: the next character of Python's own sources.

Causal convolutions or a transformer, of any width and depth, with a learning rate and rows of a batch. Large ones learn
more from each character, small ones see more characters in the same time; what is best depends on the cores and on how
long they train. `Config` says what a network is made of; `suggest` asks any trial of partita's or Optuna's for one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.method_tasks import CONTEXT, NUM_CHARS, text, windows

KINDS = ("convolution", "transformer")
NUM_TRAINED, NUM_JUDGED, NUM_TESTED = 40_000, 256, 1024  # windows of `CONTEXT` characters
APART = 500  # characters from one judged window to the next; the tested ones are between them
BATCH_SIZES = (8, 16, 32, 64, 128, 256)
HEAD_WIDTH = 16
KERNEL = 4
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A network and its training settings; `width` is that of each of `depth` blocks in units of `HEAD_WIDTH`."""

    kind: str
    width: int
    depth: int
    learning_rate: float
    batch_size: int

    @classmethod
    def of(cls, params: dict[str, Any]) -> Config:
        """Of suggested values."""
        return cls(**{item.name: params[item.name] for item in dataclasses.fields(cls)})

    def __str__(self) -> str:
        rate = f"{self.learning_rate:.2g}"
        return f"{self.kind} {self.depth} x {self.width * HEAD_WIDTH}, rate {rate}, {self.batch_size} rows"


def suggest(trial: Any) -> Config:
    """A point of the whole space."""
    return Config(
        kind=trial.suggest_categorical("kind", KINDS),
        width=trial.suggest_int("width", 1, 20, log=True),
        depth=trial.suggest_int("depth", 1, 5),
        learning_rate=trial.suggest_float("learning_rate", 3e-4, 3e-2, log=True),
        batch_size=trial.suggest_categorical("batch_size", BATCH_SIZES),
    )


def data() -> tuple[Batch, Batch]:
    """(training part, judged part), each (characters, next characters) of [N, T]."""
    learnt, held = text()
    starts = torch.randint(0, len(learnt) - CONTEXT - 1, (NUM_TRAINED,), generator=torch.Generator().manual_seed(0))
    return windows(learnt, starts), windows(held, torch.arange(NUM_JUDGED) * APART)


def test_loss(model: nn.Module) -> float:
    """On characters that nobody has learnt from, or has chosen by."""
    with torch.no_grad():
        return float(loss_fn(model.eval(), windows(text()[1], torch.arange(NUM_TESTED) * APART + APART // 2)))


# What partita is given ------------------------------------------------------------------------------------------------


def build(trial: Any) -> nn.Module:
    return network(suggest(trial))


def optimizer(trial: Any, model: nn.Module) -> torch.optim.Optimizer:
    return adam(suggest(trial), model)


def batch_size(trial: Any) -> int:
    return suggest(trial).batch_size


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of a character, in nats."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


# Networks -------------------------------------------------------------------------------------------------------------


def adam(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)


def network(config: Config) -> nn.Module:
    """[B, T] of characters -> [B, T, characters]."""
    width = config.width * HEAD_WIDTH
    kinds = {"convolution": _Convolution, "transformer": _Attention}
    return _Decoder(width, [kinds[config.kind](width, index) for index in range(config.depth)])


class _Decoder(nn.Module):
    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(NUM_CHARS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*blocks)
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_CHARS)
        nn.init.normal_(self.characters.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.1)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.characters(x_BT) + self.places.weight[: x_BT.shape[1]]
        return self.head(self.last(self.blocks(x_BTD)))


class _Convolution(nn.Module):
    """Adds what a causal convolution finds; its taps are 1, 2, 4, ... characters apart."""

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.apart = 2 ** (index % 4)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Conv1d(width, width, KERNEL, dilation=self.apart)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BDT = F.pad(self.norm(x_BTD).transpose(1, 2), ((KERNEL - 1) * self.apart, 0))
        return x_BTD + self.out(F.gelu(self.mix(x_BDT).transpose(1, 2)))


class _Attention(nn.Module):
    """A causal transformer block with heads of `HEAD_WIDTH`."""

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(self.first(x_BTD)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x_BTD + self.narrow(F.gelu(self.wide(self.second(x_BTD))))
