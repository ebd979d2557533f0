"""A model with ties and buffers, trained by plain PyTorch, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain_training import train_plain
from torch import nn

from partita import Constraints
from partita.training.checkpoint.contents import Ownership
from partita.training.checkpoint.saver import Saver, Source
from partita.training.job import Team

ONE = Constraints(num_workers=1, compiled=False)


class Trap:
    """Unpickling it would call something."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Trap, "sprung", True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_B: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(x_B))) * self.scale  # type: ignore[no-any-return]


def batch_of(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 7, (12,), generator=generator), torch.randint(0, 7, (12,), generator=generator)


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    groups = [{"params": [model.scale], "lr": 0.03}, {"params": [model.embedding.weight, *model.norm.parameters()]}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def trained(seed: int = 0, num_steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """By plain PyTorch."""
    model, optimizer = build(seed)
    train_plain(model, optimizer, map(batch_of, range(num_steps)))
    return model, optimizer


def write(folder: Path, step: int, made: tuple[nn.Module, torch.optim.Optimizer] | None = None, **extra: Any) -> Path:
    model, optimizer = made or trained(num_steps=1)
    saver = Saver(Team(), None, 5.0)
    source = Source(step=step, model=model, optimizer=optimizer, ownership=Ownership, collect=lambda: None, extra=extra)
    try:
        return Path(saver.save(folder, source, in_background=False).wait())
    finally:
        saver.close()


def flat_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    found = optimizer.state_dict()
    return [
        *sorted(
            (index, key, value.tolist()) for index, state in found["state"].items() for key, value in state.items()
        ),
        *found["param_groups"],
    ]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
