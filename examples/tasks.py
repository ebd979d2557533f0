"""Three tasks for the demo: a small GPT on Python's own sources, a convolution net and an LSTM on handwritten digits.

Each function returns a `Task`: an ordinary model and optimizer, a loss function and an endless stream of batches.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[nn.Module, Batch], torch.Tensor]
    batches: Iterator[Batch]


class GptBlock(nn.Module):
    """Pre-norm transformer block with causal attention. Shapes: B batch, T tokens, D model dim."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.num_heads, D // self.num_heads).unbind(2)
        heads = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BTD = x_BTD + self.proj(attended.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class Gpt(nn.Module):
    """A byte-level language model; the embedding and the output layer share their weight."""

    def __init__(
        self, dim: int = 128, num_layers: int = 4, num_heads: int = 4, num_tokens: int = 64, vocab: int = 256
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(torch.zeros(num_tokens, dim))
        self.blocks = nn.ModuleList(GptBlock(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(tokens_BT) + self.position[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class ConvNet(nn.Module):
    """Two convolutions with batch normalisation, then a classifier, for 8x8 digits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Linear(2 * width * 16, 10)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images_BCHW).flatten(1))


class RowLstm(nn.Module):
    """Reads a digit row by row."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(width, 10)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        states_BTD, _ = self.lstm(images_BCHW.squeeze(1))
        return self.classifier(states_BTD[:, -1])


def python_sources(max_bytes: int = 2_000_000) -> torch.Tensor:
    """Bytes of Python's own standard library, as one tensor of int64 tokens."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:max_bytes]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _text_batches(batch_size: int, num_tokens: int, seed: int) -> Iterator[Batch]:
    tokens = python_sources()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - num_tokens - 1, (batch_size,), generator=generator)
        rows = torch.stack([tokens[start : start + num_tokens + 1] for start in starts.tolist()])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _digit_batches(batch_size: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch over the 1,797 digits; the last batch of an epoch is a partial one."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
            yield images[rows], labels[rows]


def language_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    tokens_BT, targets_BT = batch
    return F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())


def class_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    images_BCHW, labels_B = batch
    return F.cross_entropy(model(images_BCHW), labels_B)


def gpt(seed: int = 0) -> Task:
    torch.manual_seed(seed)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Task("gpt", model, optimizer, language_loss, _text_batches(16, 64, seed))


def conv_net(seed: int = 0) -> Task:
    torch.manual_seed(seed)
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Task("conv net", model, optimizer, class_loss, _digit_batches(128, seed))


def lstm(seed: int = 0) -> Task:
    torch.manual_seed(seed)
    model = RowLstm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return Task("lstm", model, optimizer, class_loss, _digit_batches(128, seed))


TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "conv net": conv_net, "lstm": lstm}
