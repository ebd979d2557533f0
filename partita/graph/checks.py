"""What must hold of a model, a loss and a batch before and while they are captured; each error says what to change."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from partita.errors import CaptureError, InputError
from partita.graph import torch_adapter

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, range, slice, torch.dtype, torch.device, type)


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"The model must be a torch.nn.Module, but got {_kind(model)}. Pass the module itself.")


def check_initialised(model: nn.Module) -> None:
    """Refuses parameters and buffers of lazy modules that have no shape yet."""
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _check_shape_known(f"'{path}' of the model", tensor)


def check_model(model: nn.Module) -> None:
    """Refuses what is no plain module: compiled, lazy, already parallel, or without parameters to train."""
    check_module(model)
    for path, module in model.named_modules():
        where = f"its submodule '{path}'" if path else "it"
        if torch_adapter.is_compiled(module):
            raise InputError(
                f"The model must not be compiled yet, but {where} went through torch.compile. Pass the module before "
                "torch.compile (for a compiled copy: its `_orig_mod`); partita compiles the parts that it makes itself."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"The model must be a Python module to become a graph, but {where} is a TorchScript module "
                f"({type(module).__name__}), whose tensors and code cannot be reached. Pass the module that went into "
                "torch.jit.script or torch.jit.trace.",
                op=type(module).__name__,
            )
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            raise InputError(
                f"The model must not be parallel yet, but {where} is a {type(module).__name__}. Pass its `.module`."
            )
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _check_tensor(f"'{path}' of the model", tensor)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "The model must have a trainable parameter, but none has requires_grad=True. "
            "Unfreeze at least one with parameter.requires_grad_(True)."
        )


def _check_shape_known(what: str, tensor: torch.Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise InputError(
            f"{what} must have a shape, but it is not initialised. Run the model once on a batch before (and make the "
            "optimizer after that)."
        )


def _check_tensor(what: str, tensor: torch.Tensor) -> None:
    _check_shape_known(what, tensor)
    if torch_adapter.is_wrapper_subclass(tensor) or tensor.layout is not torch.strided:
        raise InputError(f"{what} must be a dense tensor, but is a {type(tensor).__name__} of layout {tensor.layout}.")
    if torch_adapter.has_accumulation_hooks(tensor):
        raise CaptureError(
            f"{what} has a hook of register_post_accumulate_grad_hook, which runs Python code whenever a gradient is "
            "ready; remove it (an optimizer step in it: let the training step update) or register it with "
            "register_hook.",
            op="register_post_accumulate_grad_hook",
        )


def check_batch(leaves: Sequence[tuple[Any, Any]]) -> None:
    """Refuses an empty batch and leaves that hide tensors; ``leaves`` are (pytree path, leaf)."""
    num_tensors = 0
    for path, leaf in leaves:
        where = f"batch{pytree.keystr(path)}"
        if isinstance(leaf, torch.Tensor):
            num_tensors += 1
            _check_tensor(where, leaf)
            if leaf.dim() > 0 and leaf.shape[0] == 0:
                raise InputError(
                    f"Every tensor of the batch must have at least one row, but {where} has the shape "
                    f"{tuple(leaf.shape)}. Leave empty batches out."
                )
        elif not isinstance(leaf, _PLAIN) and not callable(leaf):
            raise InputError(
                f"The leaves of the batch must be tensors or plain values, but {where} is a {_kind(leaf)}. "
                "Pass tensors in tuples, lists and dicts (dict(batch) of a mapping, torch.as_tensor of an array), or "
                "register the type with torch.utils._pytree.register_pytree_node."
            )
    if num_tensors == 0:
        raise InputError("The batch must hold at least one tensor, but it has none. Pass the training data in `batch`.")


def check_layout(value: object, op: str, module: str, source: str) -> None:
    """Refuses a tensor that is not stored densely: it can be neither cut nor sent between workers."""
    if not isinstance(value, torch.Tensor) or value.layout is torch.strided:
        return
    raise CaptureError(
        f"Every value and gradient of the step must be a dense tensor, but {op} in module {module or 'loss_fn'!r} at "
        f"{source or 'unknown'} works on one of layout {value.layout}. Use dense ones (sparse=False for nn.Embedding "
        "and nn.EmbeddingBag, .to_dense() for matrices).",
        op=op,
        source=source or "unknown",
    )


def shared_batch_size(tensors: Sequence[torch.Tensor]) -> int:
    """Extent of dim 0 that most tensors of the batch share (the first of equals; 0 if all are scalars)."""
    extents = Counter(int(tensor.shape[0]) for tensor in tensors if tensor.dim() > 0)
    return max(extents, key=lambda extent: extents[extent]) if extents else 0


def check_loss(loss: object) -> torch.Tensor:
    """The loss as a tensor of shape (); refuses what is not one real number that depends on a trainable parameter."""
    what = "loss_fn must return a scalar tensor"
    if not isinstance(loss, torch.Tensor):
        hint = " Return its `.loss`." if hasattr(loss, "loss") else " Return the tensor, not a number or a container."
        raise InputError(f"{what}, but got {_kind(loss)}.{hint}")
    if loss.numel() != 1:
        raise InputError(f"{what}, but got shape {tuple(loss.shape)}. Reduce it with .mean() or .sum().")
    if loss.is_complex() or not loss.is_floating_point():
        hint = "Take its .real or .abs()." if loss.is_complex() else "Compute it in floating point."
        raise InputError(f"{what} of a real floating-point type, but got {loss.dtype}. {hint}")
    if not loss.requires_grad:
        raise InputError(
            "The loss must depend on a trainable parameter, but it depends on none. Compute it from the `model` that "
            "loss_fn is given, without .detach(), .item() or torch.no_grad() around it."
        )
    return loss.reshape(())


def check_callable(loss_fn: Callable[..., Any]) -> None:
    if not callable(loss_fn):
        raise InputError(f"loss_fn must be a function loss_fn(model, batch), but got {_kind(loss_fn)}.")


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
