"""The tasks of `benchmarks.methods`: small models on real data, trained from given seeds.

digits    64-100-50-10 perceptron on scikit-learn's digits (1,437 to learn from, 360 to judge by)
conv      two convolutions and a linear layer on the same images
chars     a decoder of two blocks (120,000 parameters) on Python's own sources, character by character

Every task deals its batches so that replica r of R finds its rows at r/R to (r+1)/R of the batch. "sorted" deals digits
by their labels: each replica then sees a few kinds of digits only.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NUM_CHARS = 96
CONTEXT = 64
Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Task:
    """What is trained. `inner` names the optimizer of most methods."""

    name: str
    steps: int
    rows: int  # of a global batch
    inner: str
    lr: float

    def model(self, seed: int) -> Any:
        import torch

        torch.manual_seed(seed)
        return {"digits": _perceptron, "conv": _convolutions, "chars": _decoder}[self.name]()

    def batches(self, seed: int, num_replicas: int, *, by_label: bool = False) -> Iterator[Batch]:
        """Global batches for ever."""
        if self.name == "chars":
            return _text_batches(seed, self.rows)
        return _digit_batches(seed, self.rows, num_replicas, by_label=by_label, images=self.name == "conv")

    def judge(self, model: Any) -> dict[str, float]:
        """Loss, and for digits the share that is right, in percent, on data that was not learnt from."""
        import torch
        import torch.nn.functional as F

        model.eval()
        with torch.no_grad():
            if self.name == "chars":
                _, held = text()
                x, y = windows(held, torch.arange(0, 64 * 500, 500))
                return {"loss": float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))}
            _, _, x, y = digits(self.name == "conv")
            out = model(x)
            right = float((out.argmax(1) == y).float().mean())
            return {"loss": float(F.cross_entropy(out, y)), "accuracy": 100 * right}

    def optimizer(self, model: Any, *, momentum: float | None = None, name: str = "", lr: float = 0.0) -> Any:
        import torch

        name, lr = name or self.inner, lr or self.lr
        if name == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9 if momentum is None else momentum)


TASKS = {
    "digits": Task("digits", 900, 64, "SGD", 0.05),
    "conv": Task("conv", 400, 64, "SGD", 0.02),
    "chars": Task("chars", 300, 64, "AdamW", 3e-3),
}


def loss_of(model: Any, batch: Batch) -> Any:
    import torch.nn.functional as F

    out, y = model(batch[0]), batch[1]
    return F.cross_entropy(out.flatten(0, 1), y.flatten()) if out.dim() == 3 else F.cross_entropy(out, y)


# Digits --------------------------------------------------------------------------------------------------------------


@cache
def digits(images: bool) -> tuple[Any, Any, Any, Any]:
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    if images:
        x = x.view(-1, 1, 8, 8)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def _digit_batches(seed: int, rows: int, num_replicas: int, *, by_label: bool, images: bool) -> Iterator[Batch]:
    import torch

    x, y, _, _ = digits(images)
    generator = torch.Generator().manual_seed(1000 + seed)
    if by_label:
        order = torch.argsort(y, stable=True)
        x, y = x[order], y[order]
    own, share = rows // num_replicas, len(x) // num_replicas
    while True:
        if by_label:
            places = [
                torch.randint(r * share, (r + 1) * share, (own,), generator=generator) for r in range(num_replicas)
            ]
            chosen = torch.cat(places)
            yield x[chosen], y[chosen]
            continue
        for chosen in torch.randperm(len(x), generator=generator).split(rows):
            if len(chosen) == rows:
                yield x[chosen], y[chosen]


def _perceptron() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))


def _convolutions() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip


# Text ----------------------------------------------------------------------------------------------------------------


@cache
def text() -> tuple[Any, Any]:
    """Characters to learn from and to judge by: Python's own sources in the order of their names."""
    import torch

    folder = Path(sysconfig.get_paths()["stdlib"])
    found = "".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))[:120])
    codes = torch.tensor([min(max(ord(c) - 31, 0), NUM_CHARS - 1) for c in found if c != "\r"])
    cut = int(0.9 * len(codes))
    return codes[:cut], codes[cut:]


def windows(codes: Any, starts: Any) -> Batch:
    import torch

    places = starts.unsqueeze(1) + torch.arange(CONTEXT + 1)
    found = codes[places % len(codes)]
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def _text_batches(seed: int, rows: int) -> Iterator[Batch]:
    import torch

    codes, _ = text()
    generator = torch.Generator().manual_seed(2000 + seed)
    while True:
        yield windows(codes, torch.randint(0, len(codes) - CONTEXT - 1, (rows,), generator=generator))


def _decoder() -> Any:
    import torch
    from torch import nn

    width, heads = 64, 4

    class Block(nn.Module):
        """[B, T, D] -> [B, T, D], causal."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x_BTD: Any) -> Any:
            b, t, d = x_BTD.shape
            q, k, v = self.qkv(self.first(x_BTD)).view(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(b, t, d))
            return x_BTD + self.narrow(nn.functional.gelu(self.wide(self.second(x_BTD))))

    class Decoder(nn.Module):
        """[B, T] of characters -> [B, T, characters]."""

        def __init__(self) -> None:
            super().__init__()
            self.characters, self.places = nn.Embedding(NUM_CHARS, width), nn.Embedding(CONTEXT, width)
            self.blocks = nn.Sequential(Block(), Block())
            self.last, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_CHARS, bias=False)
            for item in self.parameters():
                if item.dim() > 1:
                    nn.init.normal_(item, std=0.5 / math.sqrt(width))

        def forward(self, x_BT: Any) -> Any:
            x_BTD = self.characters(x_BT) + self.places(torch.arange(x_BT.shape[1], device=x_BT.device))
            return self.head(self.last(self.blocks(x_BTD)))

    return Decoder()
