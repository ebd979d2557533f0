"""What a user may hand to capture, and the errors that say what must hold, what was given, what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from partita.errors import InputError


def check_batch(batch: Any) -> int:
    """The extent of dim 0 that the tensors of the batch share: the most frequent one (0: no tensor has dims).

    Raises:
        InputError: the batch has no tensor, or a tensor with no rows.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise InputError(
            f"the batch must hold at least one tensor, but got {type(batch).__name__} without any; "
            "pass a tensor or a tuple, list or dict of tensors"
        )
    rows = [tensor.shape[0] for tensor in tensors if tensor.dim() > 0]
    if 0 in rows:
        raise InputError(
            "every tensor of the batch must have at least one row, but got shapes "
            f"{[tuple(t.shape) for t in tensors]}; skip empty batches"
        )
    return max(rows, key=lambda extent: (rows.count(extent), -rows.index(extent))) if rows else 0


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InputError(
            "the model must be the module itself, but got the result of torch.compile; pass the module that you "
            "compiled: partita compiles the segments of the plan"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model must have a trainable parameter, but none has requires_grad=True")


def check_loss(loss: Any, trainable: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError unless `loss` is a real scalar tensor that depends on a trainable parameter."""
    if not isinstance(loss, torch.Tensor):
        raise InputError(f"loss_fn must return a scalar tensor, but got {type(loss).__name__}; return the loss tensor")
    if loss.numel() != 1 or loss.dim() != 0:
        raise InputError(
            f"loss_fn must return a scalar tensor, but got shape {tuple(loss.shape)}; reduce it, e.g. with .mean()"
        )
    if not loss.dtype.is_floating_point:
        raise InputError(f"the loss must be a real floating-point tensor, but got {loss.dtype}")
    if not loss.requires_grad:
        raise InputError(
            "the loss must depend on at least one trainable parameter of the model, but it depends on none; "
            "does loss_fn call the model that it is given, outside torch.no_grad() and without .detach()?"
        )
