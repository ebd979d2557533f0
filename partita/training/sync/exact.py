"""The exact sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from partita.program.wire import sum_bytes
from partita.runtime.transport import Line
from partita.training.sync.method import GradientMethod, GradientSum, Part, Peers, flat_of, unflat


@dataclass(frozen=True, kw_only=True)
class Exact(GradientMethod):
    """The sum itself, in float32. Keeps nothing; bytes as `partita.program.wire.sum_bytes`, about 8 n (P-1)/P.

    Example:
        >>> Exact().sent_bytes([Part("weight", (10, 10))], Peers((0, 1), 0))
        400
    """

    @property
    def name(self) -> str:
        return "exact"

    @property
    def keeps_its_own(self) -> bool:
        return True

    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        return ExactSum(parts, peers)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        return dense_bytes(sum(part.num_elements for part in parts), peers)


class ExactSum(GradientSum):
    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        flat = flat_of(values)
        if self.peers.num > 1:
            line.all_reduce(flat)
        return unflat(flat, self.parts)


def dense_bytes(num_elements: int, peers: Peers, element_bytes: int = 4) -> int:
    """Bytes that a process sends in the sum of so many elements."""
    if peers.num == 1 or not num_elements:
        return 0
    return sum_bytes(num_elements, element_bytes, peers.num, peers.place)
