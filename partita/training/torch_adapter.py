"""The private corners of torch that the training floor needs, each with the public way that is missing."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as optimizer_module

# Private names used here; `tests/training/test_training_torch_adapter.py` checks that torch still has them.
PRIVATE_NAMES = (
    "torch.optim.Optimizer._optimizer_step_pre_hooks",
    "torch.optim.Optimizer._optimizer_step_post_hooks",
    "torch.optim.Optimizer._opt_called",
    "torch.optim.optimizer._global_optimizer_pre_hooks",
    "torch.optim.optimizer._global_optimizer_post_hooks",
    "torch._fused_adam_",
    "torch._fused_adamw_",
    "torch._fused_sgd_",
    "torch._fused_adagrad_",
)


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group (everything but the parameters)."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


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


def has_global_hooks() -> bool:
    """Whether something is hooked into the ``step`` of every optimizer."""
    return bool(optimizer_module._global_optimizer_pre_hooks or optimizer_module._global_optimizer_post_hooks)


# The kernels behind ``fused=True``; the functions of `torch.optim` that call them sort their arguments by device first.


def _chosen(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


def fused_adam(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: Sequence[list[Tensor]],
    steps: list[Tensor],
    options: Mapping[str, Any],
) -> None:
    """Adam, or AdamW where the group's weight decay is decoupled; `steps` are counted up already."""
    kernel = torch._fused_adamw_ if options["decoupled_weight_decay"] else torch._fused_adam_
    means, squares, *most = states
    beta1, beta2 = options["betas"]
    kernel(
        parameters,
        gradients,
        means,
        squares,
        most[0] if most else [],
        steps,
        beta1=beta1,
        beta2=beta2,
        **_chosen(options, "amsgrad", "lr", "weight_decay", "eps", "maximize"),
    )


def fused_sgd(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: Sequence[list[Tensor]],
    steps: list[Tensor],
    options: Mapping[str, Any],
) -> None:
    """SGD, not for the first step with momentum, which makes the buffers."""
    torch._fused_sgd_(
        parameters,
        gradients,
        states[0] if states else [],
        is_first_step=False,
        **_chosen(options, "weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize"),
    )


def fused_adagrad(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: Sequence[list[Tensor]],
    steps: list[Tensor],
    options: Mapping[str, Any],
) -> None:
    """Adagrad; `steps` are counted up already."""
    torch._fused_adagrad_(
        parameters,
        gradients,
        states[0],
        steps,
        **_chosen(options, "lr", "lr_decay", "weight_decay", "eps", "maximize"),
    )
