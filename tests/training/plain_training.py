"""What the jobs of several tests train, and how plain PyTorch trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch_of(number: int, num_rows: int = 8) -> Any:
    """Inputs of 6 features and 3 classes."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(num_rows, 6, generator=generator), torch.randint(0, 3, (num_rows,), generator=generator)


def train_plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] = loss_fn,
) -> list[float]:
    """Trains by plain PyTorch; the losses."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


class Coupled(torch.optim.SGD):
    """Steps by the norm of all gradients."""

    def step(self, closure: Any = None) -> Any:
        gradients = [item.grad for group in self.param_groups for item in group["params"] if item.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.div_(norm)
        return super().step(closure)
