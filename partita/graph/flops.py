"""Floating-point operations and bytes of one op, from the shapes of its arguments and results.

Matrix products, convolutions and attention are counted by torch's own registry (2 operations for a multiply-add); every
other op counts one operation for each element of its largest argument or result; views count nothing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from partita.graph import torch_adapter
from partita.graph.graph import OpInfo, Phase

aten = torch.ops.aten

_ALLOCATES = frozenset({aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided})
_READS_ROWS = frozenset({aten.embedding, aten.index_select, aten.gather, aten.index, aten.take})


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that reading all elements touches; expanded dims (stride 0) are read once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= int(size) if stride != 0 else min(1, int(size))
    return count


def _values(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that a node holds."""
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in items if isinstance(item, torch.Tensor)]


def _is_free(target: Any) -> bool:
    """Views, picks from a tuple and mere allocations compute and move nothing."""
    return (
        torch_adapter.is_view(target)
        or target is operator.getitem
        or getattr(target, "overloadpacket", target) in _ALLOCATES
    )


def op_flops(node: fx.Node) -> int:
    """Floating-point operations of ``node`` (an ATen op with ``meta["val"]`` on itself and its arguments)."""
    target: Any = node.target
    if _is_free(target):
        return 0
    packet = getattr(target, "overloadpacket", target)
    if packet in flop_registry:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta.get("val"))
        return int(flop_registry[packet](*args, **kwargs, out_val=node.meta.get("val")))
    if packet in _READS_ROWS:
        return sum(tensor.numel() for tensor in _values(node))
    tensors = [tensor for item in (node, *node.all_input_nodes) for tensor in _values(item)]
    return max((tensor.numel() for tensor in tensors), default=0)


def op_bytes(node: fx.Node) -> int:
    """Bytes that ``node`` reads and writes (each argument once; a lookup reads the rows it returns, not the table)."""
    target: Any = node.target
    if _is_free(target):
        return 0
    written = sum(tensor.numel() * tensor.element_size() for tensor in _values(node))
    arguments = list(node.all_input_nodes)
    if getattr(target, "overloadpacket", target) in _READS_ROWS:
        return 2 * written + sum(_stored_bytes(tensor) for item in arguments[1:] for tensor in _values(item))
    return written + sum(_stored_bytes(tensor) for item in arguments for tensor in _values(item))


def op_info(node: fx.Node, phase: Phase, module: str = "", source: str = "") -> OpInfo:
    """What is known of ``node``, from the shapes that ``meta["val"]`` gives now (global or local).

    Args:
        node: an op; it and its arguments carry ``meta["val"]``.
        phase: forward or backward.
        module: path of the module that called it.
        source: "file:line" in the user's code.

    Example:
        >>> node.meta["op"] = op_info(node, phase=Phase.FORWARD, module="layers.0")  # doctest: +SKIP
    """
    return OpInfo(flops=op_flops(node), num_bytes=op_bytes(node), phase=phase, module=module, source=source)
