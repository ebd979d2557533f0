"""Passes over a traced graph: drop what does nothing, lift constants, give placeholders their roles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_IDENTITIES = frozenset(
    {
        aten.detach.default,
        aten.alias.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.lift.default,
        aten.clone.default,
    }
)


def is_random(target: Any) -> bool:
    """Whether an op draws random numbers."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def lift_constants(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Turns attributes that hold tensors into placeholders after the existing ones; returns their values by name."""
    graph = module.graph
    values: dict[str, torch.Tensor] = {}
    placeholders: dict[str, fx.Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        value = module.get_parameter(name) if name in dict(module.named_parameters()) else getattr(module, name)
        if name not in placeholders:
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant{len(placeholders)}")
            last.meta["val"] = node.meta.get("val")
            placeholders[name] = last
            values[last.name] = value.detach()
        node.replace_all_uses_with(placeholders[name])
        graph.erase_node(node)
    return values


def simplify(module: fx.GraphModule) -> None:
    """Removes ops that give their input unchanged, and what nothing uses. Random ops stay, even unused: each advances
    the generator as plain PyTorch does."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(
        is_impure_node=lambda node: node.op in ("placeholder", "output") or is_random(node.target)
    )
    module.recompile()


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.target in _IDENTITIES:
        return before.stride() == after.stride() or node.target is not aten.clone.default
    if node.target is aten._to_copy.default:
        return before.dtype == after.dtype and before.device == after.device and before.stride() == after.stride()
    if node.target in (aten.view.default, aten.expand.default, aten._unsafe_view.default):
        return before.shape == after.shape
    return False


def rename_placeholders(module: fx.GraphModule, names: Iterable[str]) -> None:
    """Gives the placeholders readable names, made unique by fx."""
    for node, name in zip((n for n in module.graph.nodes if n.op == "placeholder"), names, strict=True):
        safe = "".join(letter if letter.isalnum() else "_" for letter in name)
        node._rename(safe)
        node.target = node.name
    module.graph.lint()
    module.recompile()
