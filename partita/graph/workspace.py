"""Memory that an op needs while it runs, besides its inputs and results: convolutions, and copies of inputs that do not
lie in order for ops that take no others.

On the CPU, oneDNN computes convolutions of float32, bfloat16 and float16 in layouts of its own (oneDNN, "Understanding
Memory Formats"): tensors whose channels are the last dim are taken as they are, all others are copied into blocks of
16 channels, the last block filled up, and so is the result before it is copied back. A first layer with at most three
channels is read in place. Other types are computed by matrix products with the columns of all patches (Chellapilla,
Puri and Simard 2006, section 3).

    x, w, y    input, weight and output of the convolution (y stands for its gradient in the backward phase)
    |t|        bytes of t;  [t] bytes of t in blocks of channels;  (t) bytes of t if it must first be made contiguous

    forward    (x) + [w] + max([x] + [y] - |y|, [y])      the input is let go before the result is copied back
    backward   (x) + (y) + [x] + [y]                      while the gradient of w is computed
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

aten = torch.ops.aten

_BLOCK = 16  # channels of a block on CPUs with AVX-512; with AVX2 it is 8
_READ_IN_PLACE = 3  # channels of a first layer
_BLOCKED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = 3  # extent of kernels whose weight's gradient oneDNN computes without filling up blocks

# Ops that first make their inputs contiguous.
_TAKES_CONTIGUOUS = frozenset(
    {
        aten._log_softmax.default,
        aten._log_softmax_backward_data.default,
        aten._softmax.default,
        aten._softmax_backward_data.default,
        aten.embedding_dense_backward.default,
        aten.native_layer_norm.default,
        aten.native_layer_norm_backward.default,
    }
)


def workspace_bytes(node: fx.Node) -> int:
    """Bytes that the op of a node allocates and frees again (0: none, or not known)."""
    if node.target is aten.convolution.default:
        x, weight = node.args[0], node.args[1]
        return _forward_bytes(_value(x), _value(weight), node.meta["val"], _groups(node))
    if node.target is aten.convolution_backward.default:
        y, x, weight = node.args[:3]
        return _backward_bytes(_value(x), _value(weight), _value(y), _groups(node))
    if node.target in _TAKES_CONTIGUOUS:
        return sum(_copy_bytes(_value(item)) for item in node.all_input_nodes)
    return 0


def _value(argument: object) -> torch.Tensor:
    assert isinstance(argument, fx.Node)
    value: torch.Tensor = argument.meta["val"]
    return value


def _groups(node: fx.Node) -> int:
    groups = node.args[8 if node.target is aten.convolution.default else 9]
    assert isinstance(groups, int)
    return groups


def _forward_bytes(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, groups: int) -> int:
    if x.dtype not in _BLOCKED_TYPES:
        return _columns_bytes(x, weight, y)
    if _is_channels_last(x):
        return 2 * _num_bytes(weight)  # with channels last, then in blocks
    blocked = _blocked_bytes(y)
    reading = _read_bytes(x, groups) + blocked - _num_bytes(y)
    return _copy_bytes(x) + _blocked_weight_bytes(weight, groups) + max(reading, blocked)


def _backward_bytes(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, groups: int) -> int:
    if x.dtype not in _BLOCKED_TYPES:
        return _columns_bytes(x, weight, y)
    if _is_channels_last(x):
        copied = 0 if _is_channels_last(y) else _num_bytes(y)
        wide = weight.shape[1] == 1 and max(weight.shape[2:]) > _NARROW
        filled = groups * _BLOCK**2 * math.prod(weight.shape[2:]) * weight.element_size() if wide else 0
        return copied + max(filled, 3 * _num_bytes(weight))
    return _copy_bytes(x) + _copy_bytes(y) + _read_bytes(x, groups) + _blocked_bytes(y)


def _num_bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def _copy_bytes(value: torch.Tensor) -> int:
    return 0 if value.is_contiguous() else _num_bytes(value)


def _is_channels_last(value: torch.Tensor) -> bool:
    """Whether dim 1 is the innermost in memory; sequences (three dims) are not computed in that layout."""
    return value.dim() > 3 and value.shape[1] > 1 and value.movedim(1, -1).is_contiguous()


def _filled_up(num_channels: int) -> int:
    return -(-num_channels // _BLOCK) * _BLOCK


def _blocked_bytes(value: torch.Tensor) -> int:
    return _num_bytes(value) // max(value.shape[1], 1) * _filled_up(value.shape[1])


def _read_bytes(x: torch.Tensor, groups: int) -> int:
    return 0 if groups == 1 and x.shape[1] <= _READ_IN_PLACE else _blocked_bytes(x)


def _blocked_weight_bytes(weight: torch.Tensor, groups: int) -> int:
    first, second = weight.shape[0] // groups, weight.shape[1]
    if first == 1 or second == 1:
        return _num_bytes(weight)  # one channel a group: the groups are what is put into blocks
    channels = groups * _filled_up(first) * (second if second <= _READ_IN_PLACE else _filled_up(second))
    return channels * math.prod(weight.shape[2:]) * weight.element_size()


def _columns_bytes(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> int:
    spatial: Sequence[int] = weight.shape[2:]
    positions = y.shape[0] * math.prod(y.shape[2:])
    return positions * x.shape[1] * math.prod(spatial) * x.element_size()
