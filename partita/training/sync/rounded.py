"""Sums of rounded values: gradients as 16-bit floats or as small integers.

Two turns, as in 1-bit Adam (Tang et al. 2021, section 4): the elements are cut into P chunks. Every process sends chunk
q, rounded, to process q; that one adds them in float32 and sends the sum, rounded once more, to all others. All take
the rounded sum, so they hold the same bits. Both roundings have their error feedback, if wanted: a process adds what
its roundings of its gradients lost to its next gradient, and the owner of a chunk what the rounding of the sum lost to
the same elements of its next gradient, which nobody else rounds.

Source of bfloat16 and float16 sums: torch's `bf16_compress_hook`, which adds in 16 bits; here additions are in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from partita.errors import InputError
from partita.program.wire import chunk_edges
from partita.runtime.transport import Line
from partita.training.sync.codecs import Codec, FloatCodec, IntegerCodec
from partita.training.sync.method import (
    GradientMethod,
    GradientSum,
    Part,
    Peers,
    State,
    flat_of,
    share_missing,
    unflat,
)

_FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Rounded(GradientMethod):
    """Gradients rounded to 16-bit floats or to integers of 8 or 4 bits.

    State: with error feedback, n elements. Bytes a step: with b bytes an element, about 2 b n (P-1)/P; for integers and
    4 bytes more for every `codecs.BLOCK` elements.

    Args:
        to: "bf16", "fp16", "int8", "int4"; "fp32" rounds nothing.
        error_feedback: default: with integers only.

    Example:
        >>> Rounded(to="int8").sent_bytes([Part("weight", (1024,))], Peers((0, 1), 0))
        1040
    """

    to: Literal["bf16", "fp16", "fp32", "int8", "int4"] = "bf16"
    error_feedback: bool | None = None

    def __post_init__(self) -> None:
        if self.to not in (*_FLOATS, "int8", "int4"):
            raise InputError(f'to must be "bf16", "fp16", "fp32", "int8" or "int4", but got {self.to!r}')

    @property
    def name(self) -> str:
        return self.to

    @property
    def codec(self) -> Codec:
        return FloatCodec(_FLOATS[self.to]) if self.to in _FLOATS else IntegerCodec(int(self.to[3:]))

    @property
    def keeps_its_own(self) -> bool:
        return True

    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        feedback = self.to not in _FLOATS if self.error_feedback is None else self.error_feedback
        return RoundedSum(parts, peers, self.codec, feedback)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        return rounded_bytes(sum(part.num_elements for part in parts), peers, self.codec)


def rounded_bytes(num_elements: int, peers: Peers, codec: Codec) -> int:
    """Bytes that a process sends in a rounded sum: to every other its chunk, and of its own the sum."""
    edges = chunk_edges(num_elements, peers.num)
    sizes = [codec.num_bytes(high - low) for low, high in itertools.pairwise(edges)]
    return sum(sizes) + (peers.num - 2) * sizes[peers.place] if peers.num > 1 else 0


class RoundedSum(GradientSum):
    def __init__(self, parts: Sequence[Part], peers: Peers, codec: Codec, error_feedback: bool) -> None:
        super().__init__(parts, peers)
        self._codec = codec
        num_elements = sum(part.num_elements for part in parts)
        self._edges = chunk_edges(num_elements, peers.num)
        self._missing = torch.zeros(num_elements) if error_feedback else None

    def _bounds(self, rank: int) -> tuple[int, int]:
        place = self.peers.ranks.index(rank)
        return self._edges[place], self._edges[place + 1]

    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        flat = flat_of(values)
        if self._missing is not None:
            flat += self._missing
        if self.peers.num > 1:
            own = self._sum_of_chunk(flat, line)
            self._spread(own, flat, line)
        elif self._missing is not None:
            self._missing.zero_()  # others were there before
        return unflat(flat, self.parts)

    def _sum_of_chunk(self, wanted: Tensor, line: Line) -> Tensor:
        """The sum of the chunk that this process owns."""
        low, high = self._bounds(self.peers.rank)
        codes = {rank: self._codec.encode(wanted[slice(*self._bounds(rank))]) for rank in self.peers.others}
        if self._missing is not None:
            for rank, code in codes.items():
                start, end = self._bounds(rank)
                self._missing[start:end] = wanted[start:end] - self._codec.decode(code, end - start)
            self._missing[low:high] = 0.0  # its own part of its own chunk is not rounded, but the sum will be
            self.error = share_missing(self._missing, wanted)
        received = line.exchange(codes, dict.fromkeys(self.peers.others, self._codec.specs(high - low)))
        summands = [
            wanted[low:high] if rank == self.peers.rank else self._codec.decode(received[rank], high - low)
            for rank in self.peers.ranks
        ]
        total = summands[0].clone()
        for summand in summands[1:]:
            total += summand
        return total

    def _spread(self, own: Tensor, into: Tensor, line: Line) -> None:
        """The rounded sums of all chunks, on all processes."""
        code = self._codec.encode(own)
        specs = {}
        for rank in self.peers.others:
            low, high = self._bounds(rank)
            specs[rank] = self._codec.specs(high - low)
        received = line.exchange(dict.fromkeys(self.peers.others, code), specs)
        for rank in self.peers.ranks:
            low, high = self._bounds(rank)
            into[low:high] = self._codec.decode(code if rank == self.peers.rank else received[rank], high - low)
        if self._missing is not None:
            low, high = self._bounds(self.peers.rank)
            self._missing[low:high] = own - into[low:high]

    def state(self) -> State:
        return {} if self._missing is None else {"missing": self._missing}
