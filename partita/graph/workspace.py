"""Memory that an op needs while it runs, besides its inputs and results: convolutions, and copies of inputs that do not
lie in order for ops that take no others.

On the CPU, oneDNN computes convolutions of float32, bfloat16 and float16 in layouts of its own (oneDNN, "Understanding
Memory Formats"): tensors whose channels are the last dim are taken as they are, all others are copied into blocks of
16 channels (8 on CPUs without AVX-512), the last block filled up, and so is the result before it is copied back. What
has fewer channels than a block is read in place. Small single samples and other types are computed by matrix products
with the columns of all patches (Chellapilla, Puri and Simard 2006, section 3; `use_mkldnn` in
ATen/native/Convolution.cpp says when).

    x, w, y    input, weight and output of the convolution (y stands for its gradient in the backward phase)
    |t|        bytes of t;  [t] bytes of t in blocks of channels;  (t) bytes of t if it must first be made contiguous
    r(t)       what reading t needs: [t], or nothing with fewer channels than a block in one group

    forward                 (x) + [w] + max(r(x) + [y] - |y|, [y])      x is let go before the result is copied back
    forward, transposed     (x) + [w] + max([x] + [y] - |y|, [y]),  or with a stride (x) + 2 |y|
    backward                (x) + (y) + [y] + max(r(x), [x] if its gradient is needed)
    backward, transposed    (x) + (y) + [x] + r(y)

Without AVX-512, oneDNN computes the gradients of a volume's weight by matrix products as well, whose scratchpad depends
on the threads that it finds: it is not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_BLOCK = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8  # channels of a block
_BLOCKED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALL_ELEMENTS = 20480  # of a single sample
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
        x, weight, _, *options = node.args
        return _Convolution(_value(x), _value(weight), node.meta["val"], options).forward_bytes()
    if node.target is aten.convolution_backward.default:
        y, x, weight, _, *options = node.args
        return _Convolution(_value(x), _value(weight), _value(y), options).backward_bytes()
    if node.target in _TAKES_CONTIGUOUS:
        return sum(_copy_bytes(_value(item)) for item in node.all_input_nodes)
    return 0


@dataclass(frozen=True)
class _Convolution:
    """`options`: stride, padding, dilation, transposed, output padding, groups, and in the backward phase which
    gradients are needed."""

    x: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor
    options: Any

    @property
    def is_strided(self) -> bool:
        return any(step != 1 for step in self.options[0])

    @property
    def is_transposed(self) -> bool:
        return bool(self.options[3])

    @property
    def groups(self) -> int:
        return int(self.options[5])

    def forward_bytes(self) -> int:
        if self._takes_columns():
            return self._columns_bytes()
        if _is_channels_last(self.x):
            return 2 * _num_bytes(self.weight)  # with channels last, then in blocks
        if self.is_transposed and self.is_strided:
            return _copy_bytes(self.x) + 2 * _num_bytes(self.y)
        blocked = _blocked_bytes(self.y)
        read = _blocked_bytes(self.x) if self.is_transposed else self._read_bytes(self.x)
        return _copy_bytes(self.x) + self._weight_bytes() + max(read + blocked - _num_bytes(self.y), blocked)

    def backward_bytes(self) -> int:
        if self._takes_columns():
            return self._columns_bytes()
        if _is_channels_last(self.x):
            return (0 if _is_channels_last(self.y) else _num_bytes(self.y)) + self._last_weight_bytes()
        copied = _copy_bytes(self.x) + _copy_bytes(self.y)
        if self.is_transposed:
            return copied + _blocked_bytes(self.x) + self._read_bytes(self.y)
        needed = _blocked_bytes(self.x) if self.options[6][0] else 0
        return copied + _blocked_bytes(self.y) + max(self._read_bytes(self.x), needed)

    def _read_bytes(self, value: torch.Tensor) -> int:
        return 0 if self.groups == 1 and value.shape[1] < _BLOCK else _blocked_bytes(value)

    def _weight_bytes(self) -> int:
        first, second = self.weight.shape[0] // self.groups, self.weight.shape[1]
        if first == 1 or second == 1:
            return _num_bytes(self.weight)  # one channel a group: the groups are what is put into blocks
        channels = self.groups * _filled_up(first) * (second if second < _BLOCK else _filled_up(second))
        return channels * math.prod(self.weight.shape[2:]) * self.weight.element_size()

    def _last_weight_bytes(self) -> int:
        """Copies of the weight and its gradient with channels last; one channel a group fills up a block."""
        kernel = self.weight.shape[2:]
        wide = self.weight.shape[1] == 1 and max(kernel) > _NARROW
        filled = self.groups * _BLOCK**2 * math.prod(kernel) * self.weight.element_size() if wide else 0
        return max(filled, 3 * _num_bytes(self.weight))

    def _takes_columns(self) -> bool:
        if self.x.dtype not in _BLOCKED_TYPES:
            return True
        large = self.x.shape[0] > 1 or math.prod(self.x.shape[:4]) > _SMALL_ELEMENTS
        wide = len(self.weight.shape) > 3 and min(self.weight.shape[-2:]) > _NARROW
        return self.x.dtype is torch.float32 and self.groups == 1 and not large and not wide

    def _columns_bytes(self) -> int:
        kernel = math.prod(self.weight.shape[2:])
        if kernel == 1 and not self.is_strided:
            return 0
        patches, places = (self.y, self.x) if self.is_transposed else (self.x, self.y)
        positions = places.shape[0] * math.prod(places.shape[2:])
        return positions * patches.shape[1] * kernel * self.x.element_size()


def _value(argument: object) -> torch.Tensor:
    assert isinstance(argument, fx.Node)
    value: torch.Tensor = argument.meta["val"]
    return value


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
