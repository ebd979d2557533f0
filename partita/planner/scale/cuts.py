"""Cutting the chain of pieces into stages: the cut whose busiest chunk is least busy, exactly, by parametric search.

For a limit T, chunks are filled one after the other, each with as many pieces as its stage does within T; the least T
for which the chain fits is found by bisection over T (Iqbal and Bokhari 1995; Pinar and Aykanat 2004, section 3).
Stages of different kinds of devices have different times for the same piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

_ROUNDS = 30


def cut_chain(times_s: Sequence[Sequence[float]], num_chunks: int, *, from_end: bool = False) -> tuple[int, ...]:
    """Where chunks begin, one piece or more each, so that the largest chunk time is least.

    Args:
        times_s: of every piece, for the device kind of chunk ``i % len(times_s)``.
        num_chunks: at most the number of pieces.
        from_end: fill the last chunks first, so that what is left over makes the first chunks smaller.

    Example:
        >>> cut_chain([[1.0, 1.0, 1.0, 3.0]], 2)
        (0, 3)
    """
    size = len(times_s[0])
    if from_end:
        mirrored = [list(reversed(row)) for row in reversed(times_s)]
        begins = cut_chain(mirrored, num_chunks)
        ends = [size - begin for begin in begins]  # of the chunks, last first
        return tuple(reversed([*ends[1:], 0]))
    sums = [[0.0, *accumulate(row)] for row in times_s]
    if len(sums) == 1:  # the mean is a lower bound, the mean and one piece more an upper one
        mean, largest = sums[0][-1] / num_chunks, max(times_s[0])
        low, high = max(mean, largest) * (1 - 1e-9), mean + largest
        found = _filled(sums, num_chunks, low * (1 + 2e-9))
        if found is not None:
            return found
    else:
        low, high = 0.0, max(row[-1] for row in sums)
    best = _filled(sums, num_chunks, high)
    assert best is not None
    for _ in range(_ROUNDS if len(sums) > 1 else _ROUNDS // 2):
        middle = (low + high) / 2
        found = _filled(sums, num_chunks, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _filled(sums: Sequence[Sequence[float]], num_chunks: int, limit: float) -> tuple[int, ...] | None:
    """Chunks filled up to ``limit``; None if pieces remain."""
    if len(sums) > 1:
        return _reached(sums, num_chunks, limit)
    size = len(sums[0]) - 1
    begins, start = [], 0
    for chunk in range(num_chunks):
        begins.append(start)
        row = sums[chunk % len(sums)]
        end = bisect_right(row, row[start] + limit * (1 + 1e-12)) - 1
        end = min(end, size - (num_chunks - chunk - 1))  # one piece at least for each chunk that follows
        if end <= start:
            return None
        start = end
    return tuple(begins) if start == size else None


def _reached(sums: Sequence[Sequence[float]], num_chunks: int, limit: float) -> tuple[int, ...] | None:
    """The same for chunks of different speeds, where filling most is not always best: all ends that can be reached."""
    size = len(sums[0]) - 1
    before: list[dict[int, int]] = []  # for each chunk: where it can end -> where it then begins
    starts = [0]
    for chunk in range(num_chunks):
        row = sums[chunk % len(sums)]
        ends: dict[int, int] = {}
        for start in starts:
            last = bisect_right(row, row[start] + limit * (1 + 1e-12)) - 1
            for end in range(max(start, max(ends, default=0)) + 1, last + 1):
                ends[end] = start
            if start + 1 <= last:
                ends.setdefault(start + 1, start)
        starts = sorted(ends)
        before.append(ends)
    if size not in before[-1]:
        return None
    begins = []
    end = size
    for ends in reversed(before):
        end = ends[end]
        begins.append(end)
    return tuple(reversed(begins))
