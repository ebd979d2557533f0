"""What the arguments of `parallelize` and `plan` must be, checked before anything is planned or changed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from partita.arguments import told
from partita.cluster import Cluster
from partita.errors import InputError
from partita.graph.checks import check_callable, check_initialised, check_module
from partita.plan import Constraints


def check_task(model: Any, loss_fn: Any, cluster: Any) -> None:
    """What `parallelize` and `plan` share.

    Raises:
        InputError: the model is no module or has parameters without a shape, the loss is no function, or the cluster is
            no `Cluster`.
    """
    check_module(model)
    check_initialised(model)
    check_callable(loss_fn)
    if cluster is None or isinstance(cluster, Cluster):
        return
    make = "Make one with partita.Cluster.preset(...), partita.Cluster.load(...) or partita.Cluster.detect()."
    if isinstance(cluster, str):
        kind = "load" if cluster.endswith(".toml") else "preset"
        make = f"Pass partita.Cluster.{kind}({cluster!r})."
    raise InputError(f"cluster must be a partita.Cluster, but got {told(cluster)}. {make}")


def check_planning(optimizer: Any, constraints: Any) -> None:
    """What only `plan` takes.

    Raises:
        InputError: the optimizer is none, or the constraints are no `Constraints`.
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer must be a torch.optim.Optimizer or None, but got {told(optimizer)}. Pass e.g. "
            "torch.optim.AdamW(model.parameters())."
        )
    if constraints is not None and not isinstance(constraints, Constraints):
        hint = "partita.Constraints(**...) of it" if isinstance(constraints, dict) else "partita.Constraints(data=2)"
        raise InputError(
            f"constraints must be partita.Constraints or None, but got {told(constraints)}. Pass e.g. {hint}."
        )


def check_running(compile: Any, timeout_s: Any) -> None:
    """What only `parallelize` takes.

    Raises:
        InputError: `compile` is none of its three values, or `timeout_s` no positive number of seconds.
    """
    if not isinstance(compile, bool) and not (isinstance(compile, str) and compile == "auto"):
        raise InputError(f'compile must be True, False or "auto", but got {told(compile)}.')
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not is_number or not math.isfinite(timeout_s) or timeout_s <= 0:
        raise InputError(
            f"timeout_s must be a positive, finite number of seconds, but got {told(timeout_s)}. The default is 120.0."
        )


def check_norm(clip_grad_norm: Any) -> None:
    """What `parallelize` clips gradients by.

    Raises:
        InputError: it is neither None nor a number above 0.
    """
    if clip_grad_norm is None:
        return
    is_number = isinstance(clip_grad_norm, (int, float)) and not isinstance(clip_grad_norm, bool)
    if not is_number or not clip_grad_norm > 0:
        raise InputError(
            f"clip_grad_norm must be None or a number above 0, but got {told(clip_grad_norm)}. Pass e.g. 1.0, or "
            "math.inf to be told the norm only."
        )


def check_decay(ema: Any) -> None:
    """The decay of an average of the weights.

    Raises:
        InputError: it is neither None nor a number from 0 to below 1.
    """
    is_number = isinstance(ema, (int, float)) and not isinstance(ema, bool)
    if ema is not None and not (is_number and 0 <= ema < 1):
        raise InputError(f"ema must be None or a number from 0 to below 1, but got {told(ema)}. Pass e.g. 0.999.")


def check_sync_target(model: Any) -> nn.Module:
    """What `Step.sync_to` copies into.

    Raises:
        InputError: it is no module.
    """
    check_module(model)
    check_initialised(model)
    found: nn.Module = model
    return found


def check_loading(loader: Any, step: Any) -> None:
    """What `partita.data.sharded` takes.

    Raises:
        InputError: the loader cannot be iterated, or the step is none of `parallelize`.
    """
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise InputError(
            f"loader must be an iterable of batches, but got {told(loader)}. Pass e.g. a torch.utils.data.DataLoader."
        )
    if not callable(getattr(step, "rows_needed", None)):
        raise InputError(
            f"step must be what partita.parallelize returned, but got {told(step)}. Call partita.data.sharded(loader, "
            "step) after it."
        )
