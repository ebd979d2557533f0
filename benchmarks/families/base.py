"""`Family` and `Task`: one kind of model together with its loss and its data, in three sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Scale = Literal["tiny", "small", "large"]
Kind = Literal[
    "encoder", "decoder", "encoder-decoder", "mixture-of-experts", "state-space", "vision", "conv", "audio",
    "contrastive", "recurrent", "generative", "graph", "recommender", "reinforcement", "energy", "dense",
]  # fmt: skip
Batch = Any  # a pytree of tensors; dim 0 is the batch
LossFn = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Extents from which every family derives its own; B, T, D in the shape comments below are the first three."""

    batch: int
    length: int
    width: int
    depth: int
    heads: int
    vocabulary: int
    image: int
    audio: int  # samples of a waveform

    @property
    def hidden(self) -> int:
        """Width of the inner layer of a feed-forward block."""
        return 2 * self.width


SIZES: Mapping[Scale, Size] = {
    # For correctness: fewer than 300,000 parameters and less than about 30 ms for an eager step on one core.
    "tiny": Size(batch=8, length=12, width=32, depth=2, heads=4, vocabulary=96, image=32, audio=800),
    # For timing: steps of about 5 to 300 ms on one core.
    "small": Size(batch=16, length=64, width=128, depth=4, heads=4, vocabulary=1000, image=64, audio=3200),
    # For timing where arithmetic decides: steps of about a second on one core, where a family has depth or images.
    "large": Size(batch=16, length=128, width=256, depth=6, heads=4, vocabulary=2000, image=128, audio=6400),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model to train. `batches(seed)` makes one global batch, always the same one for the same seed.

    `learning_rates` hints a rate by optimizer class name, low enough that training does not amplify rounding.
    """

    model: nn.Module
    loss_fn: LossFn
    batches: Callable[[int], Batch]
    learning_rates: Mapping[str, float] = field(default_factory=lambda: {"SGD": 1e-2, "AdamW": 1e-3})

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True, kw_only=True)
class Family:
    """A named recipe for a `Task`. `draws` tells that a step draws random numbers: seed before every step.

    Example:
        >>> task = families.get("gpt2").task(scale="tiny", seed=0)
        >>> loss = task.loss_fn(task.model, task.batches(1))
    """

    name: str
    kind: Kind
    build: Callable[[Size], Task]
    source: Literal["transformers", "plain"] = "plain"
    draws: bool = False

    def task(self, scale: Scale = "tiny", *, seed: int = 0) -> Task:
        """The model with weights initialised from `seed`, in training mode."""
        torch.manual_seed(seed)
        task = self.build(SIZES[scale])
        task.model.train()
        return task


def generator(seed: int) -> torch.Generator:
    """Random numbers for data, apart from the global stream that models draw from."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1))


def make_optimizer(name: str, task: Task, **options: Any) -> torch.optim.Optimizer:
    """`name` is "SGD" (with momentum 0.9) or "AdamW"; `options` override its arguments."""
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    if name == "SGD":
        return torch.optim.SGD(parameters, **{"lr": task.learning_rates["SGD"], "momentum": 0.9, **options})
    if name == "AdamW":
        return torch.optim.AdamW(parameters, **{"lr": task.learning_rates["AdamW"], **options})
    raise ValueError(f'optimizer must be "SGD" or "AdamW", but got {name!r}; choose one of them')
