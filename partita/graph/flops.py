"""Floating-point operations and bytes of one op, from the shapes of its arguments and results.

Matrix products, convolutions and attention are counted by torch's own registry (2 operations for a multiply-add); every
other op counts one operation for each element of its largest argument or result; views count nothing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.utils._pytree as pytree
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


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a tree, each once."""
    leaves = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return list({id(leaf): leaf for leaf in leaves}.values())


def _is_free(target: Any) -> bool:
    """Views, picks from a tuple and mere allocations compute and move nothing."""
    return (
        torch_adapter.is_view(target)
        or target is operator.getitem
        or getattr(target, "overloadpacket", target) in _ALLOCATES
    )


def work_of(target: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
    """Floating-point operations of a call of an op, and bytes that it reads and writes (each argument once; a lookup
    reads the rows it returns, not the table).

    Args:
        args: as given, with tensors that have shapes but maybe no storage; so `kwargs`.
        result: what it has returned.
    """
    if _is_free(target):
        return 0, 0
    written = _tensors(result)
    if not written:
        return 0, 0
    packet, read = getattr(target, "overloadpacket", target), _tensors((args, kwargs))
    num_written = sum(tensor.numel() * tensor.element_size() for tensor in written)
    if packet in _READS_ROWS:
        others = sum(_stored_bytes(tensor) for tensor in read[1:])
        return sum(tensor.numel() for tensor in written), 2 * num_written + others
    num_bytes = num_written + sum(_stored_bytes(tensor) for tensor in read)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result)), num_bytes
    return max((tensor.numel() for tensor in (*written, *read)), default=0), num_bytes


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
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta.get("val"))
    flops, num_bytes = work_of(node.target, args, kwargs, node.meta.get("val"))
    return OpInfo(flops=flops, num_bytes=num_bytes, phase=phase, module=module, source=source)
