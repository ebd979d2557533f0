"""Shares of a microbatch's rows over the devices of a data-parallel stage.

Devices of one class (kind and memory) share their rows as evenly as whole rows allow, because times and bytes depend on
the fullest one. With x_c the rows of the fullest device of class c and g_c devices, time and memory grow with every
x_c; so only the minimal vectors with  sum over c of g_c x_c >= rows  can be best: no x_c can be lowered by one.
All of them are candidates where there are at most `limit`; elsewhere the `limit` ones nearest to shares
proportional to speed are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import product


def share_candidates(
    classes: Sequence[Hashable], speeds: Sequence[float], rows: int, limit: int
) -> list[tuple[int, ...]]:
    """Rows per device, one tuple for each candidate; each sums to `rows`.

    Example:
        >>> share_candidates(["fast", "slow"], [2.0, 1.0], 3, 2)
        [(2, 1), (3, 0)]
    """
    names = list(dict.fromkeys(classes))
    counts = [sum(one == name for one in classes) for name in names]
    speed = [speeds[list(classes).index(name)] for name in names]
    total = sum(g * s for g, s in zip(counts, speed, strict=True))
    ideal = [rows * s / total for s in speed]
    vectors = sorted(_minimal(counts, ideal, rows, limit), key=lambda x: _excess(x, ideal))
    return [_spread([names.index(one) for one in classes], vector, rows) for vector in vectors[:limit]]


def _excess(vector: tuple[int, ...], ideal: Sequence[float]) -> tuple[float, tuple[int, ...]]:
    """How much longer than with proportional shares the slowest class takes."""
    return max(x / best for x, best in zip(vector, ideal, strict=True)), vector


def _minimal(counts: Sequence[int], ideal: Sequence[float], rows: int, limit: int) -> Iterator[tuple[int, ...]]:
    """Minimal vectors: all, or where they may be too many those within a window around the ideal."""
    spans = [range(-(-rows // g) + 1) for g in counts[:-1]]
    window = max(rows, 1)
    while _size(spans) > 64 * limit and window > 2:
        window = max(2, window // 2)
        spans = [
            range(max(0, int(best) - window), min(-(-rows // g), int(best) + window) + 1)
            for g, best in zip(counts[:-1], ideal[:-1], strict=True)
        ]
    for first in product(*spans):
        left = rows - sum(g * x for g, x in zip(counts[:-1], first, strict=True))
        vector = (*first, max(0, -(-left // counts[-1])))
        spare = sum(g * x for g, x in zip(counts, vector, strict=True)) - rows
        if all(x == 0 or spare < g for g, x in zip(counts, vector, strict=True)):
            yield vector


def _size(spans: Sequence[range]) -> int:
    size = 1
    for span in spans:
        size *= len(span)
    return size


def _spread(place: Sequence[int], vector: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Rows per device: at most x_c each, as even within a class as the sum allows."""
    share = [vector[c] for c in place]
    spare = sum(share) - rows
    for device in reversed(range(len(share))):
        if spare > 0 and share[device] > 0:
            share[device] -= 1
            spare -= 1
    return tuple(share)
