"""The private corners of torch that the training floor needs, each with the public way that is missing."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch

# Private names used here; `tests/training/test_training_torch_adapter.py` checks that torch still has them.
PRIVATE_NAMES = (
    "torch.optim.Optimizer._optimizer_step_pre_hooks",
    "torch.optim.Optimizer._optimizer_step_post_hooks",
    "torch.optim.Optimizer._opt_called",
)


def clone_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of the same class and attributes over other parameter groups, without state and step hooks.

    `copy.copy` keeps only options, state and groups, and the constructor of an unknown class cannot be called, so the
    attributes are taken over one by one. `step` among them is a learning-rate scheduler's wrapper of the original.
    """
    clone: torch.optim.Optimizer = type(optimizer).__new__(type(optimizer))
    clone.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    clone.__dict__.update(
        state=defaultdict(dict),
        param_groups=groups,
        _optimizer_step_pre_hooks=OrderedDict(),
        _optimizer_step_post_hooks=OrderedDict(),
    )
    return clone


def has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether something is hooked into this very optimizer's ``step``: a pre- or post-hook, or another function put in
    its place. A learning-rate scheduler's wrapper, which only counts calls, is nothing of the kind."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    step = optimizer.__dict__.get("step")
    if step is not None and hasattr(step, "_wrapped_by_lr_sched"):
        step = step.__wrapped__
    return step is not None and step is not type(optimizer).step


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Let learning-rate schedulers know that the optimizer has made a step (they warn otherwise): torch counts calls of
    ``optimizer.step``, which partita does not call."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
