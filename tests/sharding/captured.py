"""Test helper: capture small models, with the inputs that `partita.sharding.lockstep` takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from partita.graph.capture import capture
from partita.graph.graph import InputKind


def joint_graph(
    model: torch.nn.Module, loss_fn: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, ...]
) -> tuple[fx.GraphModule, list[torch.Tensor], list[str]]:
    """The captured graph, its real inputs in order, and the names of the batch placeholders."""
    graph = capture(model, loss_fn, batch)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    flat, names = [], []
    for item in graph.inputs:
        if item.kind is InputKind.BATCH:
            flat.append(batch[item.leaf])
            names.append(item.node)
        elif item.kind is InputKind.CONSTANT:
            flat.append(graph.constants[item.name])
        elif item.kind is InputKind.SEED:
            flat.append(torch.ones(()))
        else:
            flat.append(state[item.name].detach().clone())
    return graph.module, flat, names
