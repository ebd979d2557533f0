"""FLOPs and bytes of one op from the shapes in its node's meta.

Matrix products, convolutions and attention come from torch's own FLOP registry (`torch.utils.flop_counter`); every
other op counts one FLOP per element it gives, or per element it reads where that is more; views count none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.utils.flop_counter import flop_registry

from partita.graph.graph import OpInfo, Phase

_FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach"})


def is_view(target: Any) -> bool:
    """Whether an op gives a view of its input and moves no data."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    return bool(returns) and all(item.alias_info is not None and not item.alias_info.is_write for item in returns)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a node's ``meta["val"]``."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def op_info(node: fx.Node, phase: Phase, module: str, source: str) -> OpInfo:
    """What is known of an op node with shapes in ``node.meta["val"]`` and its inputs'."""
    reads = [tensor for item in node.all_input_nodes for tensor in tensors_of(item.meta.get("val"))]
    writes = tensors_of(node.meta.get("val"))
    if is_view(node.target) or getattr(node.target, "__name__", "").split(".")[0] in _FREE:
        return OpInfo(0, 0, phase, module, source)
    return OpInfo(_flops(node, reads, writes), _bytes(reads) + _bytes(writes), phase, module, source)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flops(node: fx.Node, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> int:
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry:
        args, kwargs = pytree.tree_map_only(fx.Node, lambda item: item.meta["val"], (node.args, dict(node.kwargs)))
        return int(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))
    return max(sum(t.numel() for t in writes), max((t.numel() for t in reads), default=0))
