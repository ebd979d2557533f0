"""Which layer's outputs are another layer's inputs, one by one."""

from __future__ import annotations

import math

import torch
from torch import fx

from partita.graph.block_ops import OPS
from partita.graph.graph import Graph, InputKind, OpInfo, Phase

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_POINTWISE = (aten.gelu.default,)  # beside those that torch calls so
_PRODUCTS = {aten.addmm.default: (1, 2), aten.mm.default: (0, 1)}  # places of inputs and of the weight's transpose


def feeding_weights(graph: Graph) -> dict[str, str]:
    """By the weight of a linear layer, the weight of the linear layer whose outputs it reads: nothing but pointwise ops
    and views of rows lies between, so input i is output i. Others, and layers that read several, are left out.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> graph = capture(model, lambda model, x: model(x).sum(), torch.ones(4, 2))  # doctest: +SKIP
        >>> feeding_weights(graph)  # doctest: +SKIP
        {'2.weight': '0.weight'}
    """
    names = {item.node: item.name for item in graph.inputs_of(InputKind.PARAMETER)}
    made_by: dict[fx.Node, str] = {}  # values whose last dim is the outputs of the layer of that weight
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        info = node.meta.get("op")
        if not isinstance(info, OpInfo) or info.phase is not Phase.FORWARD:
            continue
        product = _product(node, names)
        if product is not None:
            x, weight = product
            found.setdefault(weight, set()).add(made_by.get(x, ""))
            made_by[node] = weight
            continue
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in made_by and _keeps_units(node, source):
            made_by[node] = made_by[source]
    return {weight: min(sources) for weight, sources in found.items() if len(sources) == 1 and min(sources)}


def _product(node: fx.Node, names: dict[str, str]) -> tuple[fx.Node, str] | None:
    """Inputs and the weight's name, of a layer's product in the forward pass."""
    if node.target is OPS[0]:
        x, weight = node.args[:2]
    elif node.target in _PRODUCTS:
        x, turned = (node.args[place] for place in _PRODUCTS[node.target])
        weight = turned.args[0] if isinstance(turned, fx.Node) and turned.target is aten.t.default else None
    else:
        return None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.name not in names:
        return None
    return x, names[weight.name]


def _keeps_units(node: fx.Node, source: fx.Node) -> bool:
    """Whether entry i of the last dim of the result is made of entry i of that of the argument."""
    new, old = node.meta.get("val"), source.meta.get("val")
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor) or not new.dim() or not old.dim():
        return False
    if new.shape[-1] != old.shape[-1]:
        return False
    if node.target in _VIEWS:
        return math.prod(new.shape) > 0
    is_pointwise = node.target in _POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())
    return is_pointwise and new.shape == old.shape
