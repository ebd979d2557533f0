"""Plain execution of a captured graph: the reference against which every plan is held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from partita.graph.graph import Graph, InputKind, OutputKind


def graph_arguments(
    graph: Graph, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], batch: Any
) -> list[torch.Tensor]:
    """The values of the graph's placeholders, in order."""
    leaves = pytree.tree_leaves(batch)
    values: list[torch.Tensor] = []
    for item in graph.inputs:
        if item.kind is InputKind.PARAMETER:
            values.append(parameters[item.name].detach())
        elif item.kind is InputKind.BUFFER:
            values.append(buffers[item.name])
        elif item.kind is InputKind.BATCH:
            values.append(leaves[item.leaf])
        elif item.kind is InputKind.CONSTANT:
            values.append(graph.constants[item.name])
        else:
            values.append(torch.ones((), dtype=item.dtype))
    return values


def run_graph(
    graph: Graph, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], batch: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One step without the optimizer: ``(loss, gradients by parameter, new values of the changed buffers)``."""
    with torch.no_grad():
        results = graph.module(*graph_arguments(graph, parameters, buffers, batch))
    by_kind: dict[OutputKind, dict[str, torch.Tensor]] = {kind: {} for kind in OutputKind}
    for output, value in zip(graph.outputs, results, strict=True):
        by_kind[output.kind][output.target] = value
    return by_kind[OutputKind.LOSS][""], by_kind[OutputKind.GRADIENT], by_kind[OutputKind.BUFFER]
