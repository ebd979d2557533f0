"""A module's graph of whole layers (`torch.export`), whose batch and lengths stay open."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from partita.errors import InputError


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """The graph of ``model(*args, **kwargs)``, as it is in the mode (training or not) of ``model``.

    Sizes of inputs stay open where the model allows it: all of them, else those of dim 0, else none.

    Raises:
        InputError: `torch.export` can't capture it.
    """
    model = copy.deepcopy(model)  # tracing counts batches
    attempts = (lambda tensor: dict.fromkeys(range(tensor.ndim), Dim.AUTO), lambda tensor: {0: Dim.AUTO}, None)
    reason: Exception | None = None
    for open_dims in attempts:
        shapes: Any = None
        if open_dims is not None:
            shapes = _shapes(model, args, kwargs, open_dims)
        try:
            return torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever the model's own code raises on symbolic sizes
            reason = error
    raise InputError(
        f"the model must be one that torch.export captures, but {type(model).__name__} is not: {reason}. Replace what "
        "depends on the data's values by tensor ops, or leave that part out of the model"
    ) from reason


def _shapes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], open_dims: Any) -> Any:
    def of(value: Any) -> Any:
        return open_dims(value) if isinstance(value, torch.Tensor) and value.ndim else None

    parameters = list(inspect.signature(model.forward).parameters.values())
    named: dict[str, Any] = {}
    for parameter, value in zip(parameters, args, strict=False):
        if parameter.kind is parameter.VAR_POSITIONAL:
            named[parameter.name] = args[len(named) :]
            break
        named[parameter.name] = value
    named |= kwargs
    return pytree.tree_map(of, named)
