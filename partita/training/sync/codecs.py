"""How many numbers become few bytes: 16-bit floats, and integers of 8 or 4 bits with a scale a block.

An integer code of b bits takes, in every block of `BLOCK` elements, the largest absolute value M to 2^(b-1) - 1 and
rounds to the nearest multiple of s = M / (2^(b-1) - 1), so that no element is off by more than s/2 (Dettmers 2016;
block-wise as in Dettmers et al. 2022). A block of zeros stays one. Encoding and decoding use no randomness: whoever
decodes the same bytes gets the same numbers.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from partita.errors import InputError
from partita.program.instructions import TensorSpec

BLOCK = 256  # elements that share a scale, which adds 1.6 % to their bytes at 8 bits


class Codec(abc.ABC):
    """Flat float32 tensors to tensors that travel, and back."""

    @abc.abstractmethod
    def encode(self, value: Tensor) -> list[Tensor]:
        """The tensors that stand for `value`."""

    @abc.abstractmethod
    def decode(self, code: list[Tensor], num_elements: int) -> Tensor:
        """The float32 values that a code stands for, in memory of their own."""

    @abc.abstractmethod
    def specs(self, num_elements: int) -> list[TensorSpec]:
        """What `encode` makes of so many elements."""

    def num_bytes(self, num_elements: int) -> int:
        return sum(spec.num_bytes for spec in self.specs(num_elements))


class FloatCodec(Codec):
    """Floats of another dtype: rounded to the nearest. Values beyond its range are held at its ends."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, value: Tensor) -> list[Tensor]:
        if self.dtype != torch.float32:
            most = torch.finfo(self.dtype).max
            value = value.clamp(-most, most)  # an infinite gradient would never leave the error feedback again
        return [value.to(self.dtype)]

    def decode(self, code: list[Tensor], num_elements: int) -> Tensor:
        return code[0].to(torch.float32, copy=True)

    def specs(self, num_elements: int) -> list[TensorSpec]:
        return [TensorSpec((num_elements,), self.dtype)]


class IntegerCodec(Codec):
    """Integers of 8 or 4 bits (two to a byte) and a float32 scale a block."""

    def __init__(self, bits: int) -> None:
        if bits not in (4, 8):
            raise InputError(f"bits must be 4 or 8, but got {bits!r}")
        self.bits = bits
        self.most = 2 ** (bits - 1) - 1

    def encode(self, value: Tensor) -> list[Tensor]:
        num_blocks = -(-value.numel() // BLOCK)
        blocks = torch.nn.functional.pad(value, (0, num_blocks * BLOCK - value.numel())).view(num_blocks, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True) / self.most
        integers = torch.where(scales > 0, blocks / scales, 0.0).round_().to(torch.int8).view(-1)[: value.numel()]
        return [self._packed(integers), scales.view(-1)]

    def decode(self, code: list[Tensor], num_elements: int) -> Tensor:
        packed, scales = code
        integers = self._unpacked(packed, num_elements).float()
        return integers.mul_(scales.repeat_interleave(BLOCK)[:num_elements])

    def specs(self, num_elements: int) -> list[TensorSpec]:
        num_packed = num_elements if self.bits == 8 else -(-num_elements // 2)
        dtype = torch.int8 if self.bits == 8 else torch.uint8
        return [TensorSpec((num_packed,), dtype), TensorSpec((-(-num_elements // BLOCK),), torch.float32)]

    def _packed(self, integers: Tensor) -> Tensor:
        if self.bits == 8:
            return integers
        nibbles = torch.nn.functional.pad(integers, (0, integers.numel() % 2)).add_(8).to(torch.uint8).view(-1, 2)
        return nibbles[:, 0] | (nibbles[:, 1] << 4)

    def _unpacked(self, packed: Tensor, num_elements: int) -> Tensor:
        if self.bits == 8:
            return packed
        nibbles = torch.stack((packed & 15, packed >> 4), 1).view(-1)[:num_elements]
        return nibbles.to(torch.int8).sub_(8)


def codec_of(bits: int | torch.dtype) -> Codec:
    """By number of bits of an integer (4, 8), or a floating-point dtype; 32 stands for float32."""
    if bits == 32:
        return FloatCodec(torch.float32)
    return FloatCodec(bits) if isinstance(bits, torch.dtype) else IntegerCodec(bits)
