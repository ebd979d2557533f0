"""What sums of gradients between processes cost, formed by a method that may send fewer bytes than the exact sum."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SumCost:
    """Of a method, in proportion to the gradients. The exact sum is `EXACT_SUM`;
    `FREE_SUM` bounds all methods.

    `sent_share` is what it sends of the bytes that the exact sum sends; `compute_s_per_byte` the seconds that it
    computes, on each process, for a byte of gradients.
    """

    sent_share: float = 1.0
    compute_s_per_byte: float = 0.0


EXACT_SUM = SumCost()
FREE_SUM = SumCost(sent_share=0.0)
