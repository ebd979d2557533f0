"""Removes from a functional graph what computes nothing: copies, aliases, casts to the same type, values nobody
reads."""

from __future__ import annotations

import operator

import torch
from torch import fx

from partita.graph import torch_adapter
from partita.graph.randomness import is_random

aten = torch.ops.aten

_ALIASES = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.expand.default,
        aten.permute.default,
        aten.slice.Tensor,
        aten.as_strided.default,
    }
)
_MAY_MOVE = frozenset({aten.permute.default})  # equal shapes do not yet mean equal elements: see `_is_identity`


def _is_identity(node: fx.Node) -> bool:
    """Whether the op returns its first argument unchanged: values, shape, type, device and strides."""
    if node.target not in _ALIASES or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    old, new = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return False
    if node.target in _MAY_MOVE:
        dims = node.args[1]
        assert isinstance(dims, (list, tuple))
        return all(int(dim) % old.dim() == position for position, dim in enumerate(dims))
    if node.target is aten.as_strided.default:
        return False
    if node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1:
        return False
    return _relevant_strides(old) == _relevant_strides(new)


def _relevant_strides(tensor: torch.Tensor) -> list[int]:
    """Strides of the dims that have more than one element; others do not say anything."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _copied_source(node: fx.Node) -> fx.Node | None:
    """``copy(destination, source)`` is its source if that already has the destination's shape, type and strides."""
    if node.target is not aten.copy.default:
        return None
    source = node.args[1]
    if not isinstance(source, fx.Node):
        return None
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return None
    same = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return source if same and _relevant_strides(old) == _relevant_strides(new) else None


def remove_identities(graph: fx.Graph) -> None:
    """Replaces every op that returns its argument unchanged by that argument."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if _is_identity(node) else _copied_source(node)
        if isinstance(source, fx.Node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def remove_unused(graph: fx.Graph) -> None:
    """Removes ops whose result nobody reads, except random ones (each draw moves the generator) and writes to inputs
    (the step is then refused)."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users or is_random(node):
            continue
        if not torch_adapter.mutates(node.target):
            graph.erase_node(node)


def simplify(graph: fx.Graph) -> None:
    """Both passes, in place."""
    remove_identities(graph)
    remove_unused(graph)


def is_tuple_item(node: fx.Node) -> bool:
    """Whether the node only picks one result of an op with several."""
    return node.target is operator.getitem
