"""What the arguments of `parallelize` and `plan` must be, checked before anything is planned or changed."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import nn

from partita.arguments import told
from partita.cluster import Cluster
from partita.constraints import refuse_described
from partita.errors import InputError, PlanError
from partita.graph.checks import check_callable, check_initialised, check_module
from partita.plan import Constraints, Plan
from partita.training.masters import HALF
from partita.training.overrides import current_override
from partita.training.torch_adapter import has_own_step

Found = Literal["auto", "quick"]  # plans that `parallelize` finds itself


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


def wanted_plan(plan: Any) -> Plan | Constraints | Found:
    """The plan that `parallelize` is to run, or what it must be like; an `override` in force replaces what was given.

    Raises:
        InputError: it is none of these, or corners that are fixed are only for described clusters.
        PlanError: the runtime does not have what the plan needs.
    """
    if not isinstance(plan, (Plan, Constraints)) and plan not in get_args(Found):
        raise InputError(f'plan must be "auto", "quick", a Plan or Constraints, but got {plan!r}')
    replaced = current_override().plan
    for one in (plan, replaced):
        if isinstance(one, Constraints):
            refuse_described(one)
        if isinstance(one, Plan) and one.unrunnable:
            raise PlanError(
                f"parallelize runs plans of whole ops on the machines of this job, but this plan has "
                f"{', '.join(one.unrunnable)}. Write it for an engine that runs it (partita export), or plan for the "
                "machines here: partita.plan(model, loss_fn, batch)."
            )
    found: Plan | Constraints | Found = plan if replaced is None else replaced
    return found


def check_running(compile: Any, timeout_s: Any, check_finite: Any, resume: Any) -> None:
    """What only `parallelize` takes.

    Raises:
        InputError: `timeout_s` is no positive number of seconds, or another one none of its values.
    """
    if check_finite not in ("step", "op", "off"):
        raise InputError(f'check_finite must be "step", "op" or "off", but got {check_finite!r}')
    if resume not in ("auto", "never"):
        raise InputError(f'resume must be "auto" or "never", but got {resume!r}')
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


def check_scale(loss_scale: Any) -> None:
    """What `parallelize` multiplies the loss by.

    Raises:
        InputError: it is neither None nor "dynamic" nor a number above 0.
    """
    if loss_scale is None or (isinstance(loss_scale, str) and loss_scale == "dynamic"):
        return
    is_number = isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool)
    if not is_number or not 0 < loss_scale < math.inf:
        raise InputError(
            f'loss_scale must be None, "dynamic" or a finite number above 0, but got {told(loss_scale)}. Pass e.g. '
            '"dynamic", or 1024.0.'
        )


def check_masters(optimizer: torch.optim.Optimizer, master_weights: Any) -> None:
    """Whether the parameters of the optimizer can have masters.

    Raises:
        InputError: no trained parameter is of half precision, or the optimizer's step has hooks, which would see
            masters instead of the user's parameters.
    """
    if not isinstance(master_weights, bool):
        raise InputError(f"master_weights must be True or False, but got {told(master_weights)}.")
    if not master_weights:
        return
    held = {item.dtype for group in optimizer.param_groups for item in group["params"]}
    if not held & set(HALF):
        raise InputError(
            "master_weights needs parameters of torch.bfloat16 or torch.float16, but those of the optimizer are of "
            f"{', '.join(sorted(map(str, held)))}. Make the model so (model.bfloat16()) first, or drop it."
        )
    if has_own_step(optimizer):
        raise InputError(
            "the step of an optimizer that updates masters must be that of its class, but this "
            f"{type(optimizer).__name__} has step hooks or another function in its place, which would see the masters "
            "instead of your parameters. Remove them (clip_grad_norm of parallelize clips), or drop master_weights."
        )


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
