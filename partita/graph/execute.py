"""Plain execution of a captured graph on one device: the reference that every plan must agree with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from partita.errors import InputError
from partita.graph.graph import Graph, Input, InputKind, OutputKind


def run_graph(
    graph: Graph, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], batch: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The loss, the gradients and the updated buffers of one training step, by running the graph op by op.

    Args:
        graph: what `capture` returned.
        parameters: name -> tensor, as in ``dict(model.named_parameters())`` (tied ones under their first name).
        buffers: name -> tensor, as in ``dict(model.named_buffers())``. Frozen parameters may be in either.
        batch: of the structure and shapes that were captured.

    Returns:
        The loss (shape ()), gradients by parameter name, and new values of the buffers that the step changes, by name.
        Nothing given is changed. Random ops draw from torch's default generator, in the order of plain PyTorch.

    Raises:
        InputError: a tensor is missing or has another shape than the captured one.

    Example:
        >>> graph = capture(model, loss_fn, batch)  # doctest: +SKIP
        >>> loss, gradients, new_buffers = run_graph(
        ...     graph, dict(model.named_parameters()), dict(model.named_buffers()), batch
        ... )  # doctest: +SKIP
    """
    with torch.no_grad():
        results = graph.module(*graph_arguments(graph, parameters, buffers, batch))
    outputs = list(zip(graph.outputs, results, strict=True))
    gradients = {output.target: value for output, value in outputs if output.kind is OutputKind.GRADIENT}
    updated = {output.target: value for output, value in outputs if output.kind is OutputKind.BUFFER}
    return results[0], gradients, updated


def graph_arguments(
    graph: Graph, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], batch: Any
) -> list[torch.Tensor]:
    """The values of the graph's placeholders, in order; arguments and errors as for `run_graph`."""
    leaves = pytree.tree_leaves(batch)
    state = {**buffers, **parameters}
    return [_value(graph, item, state, leaves) for item in graph.inputs]


def _value(graph: Graph, item: Input, state: Mapping[str, torch.Tensor], leaves: list[Any]) -> torch.Tensor:
    if item.kind is InputKind.SEED:
        return torch.ones((), dtype=item.dtype)
    if item.kind is InputKind.CONSTANT:
        return graph.constants[item.name].detach()
    if item.kind is InputKind.BATCH:
        value = leaves[item.leaf] if item.leaf < len(leaves) else None
    else:
        value = state.get(item.name)
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != item.shape or value.dtype is not item.dtype:
        given = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(
            f"The {item.kind.value} '{item.name}' must be a tensor of shape {item.shape} and type {item.dtype}, "
            f"as captured, "
            f"but got {given}. Pass what the graph was captured for, or capture again."
        )
    return value.detach()
