"""Small value formatters and helpers shared by every floor: bytes, seconds, FLOPs, hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

KIB, MIB, GIB = 2**10, 2**20, 2**30


def format_bytes(num_bytes: float) -> str:
    """``1536 -> '1.5 KiB'``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_time(time_s: float) -> str:
    """``0.00123 -> '1.23 ms'``."""
    if time_s == 0:
        return "0 s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(time_s) >= scale:
            return f"{time_s / scale:.3g} {unit}"
    return f"{time_s / 1e-9:.3g} ns"


def format_flops(flops: float) -> str:
    """``2.5e9 -> '2.50 GFLOP'``."""
    for scale, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")):
        if flops >= scale:
            return f"{flops / scale:.2f} {unit}"
    return f"{flops:.0f} FLOP"


def gap_of(value: float, lower_bound: float) -> float:
    """The share of a predicted value that could at most be saved: 0 means that it is proven to be the least.

    >>> gap_of(10.0, 9.0)
    0.1
    """
    return max(0.0, (value - lower_bound) / value) if value > 0 else 0.0


def fingerprint(parts: Iterable[object]) -> str:
    """A short, stable hexadecimal hash of the texts of ``parts`` (equal on every machine and Python run)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of ``parts`` contiguous pieces of ``total`` items; the first ``total % parts`` get one more.

    >>> split_evenly(10, 4)
    (3, 3, 2, 2)
    """
    base, extra = divmod(total, parts)
    return tuple(base + (index < extra) for index in range(parts))


def proportional(total: int, shares: tuple[int, ...]) -> tuple[int, ...]:
    """Whole numbers that add up to `total`, as near as possible in proportion to `shares`, each at least 1 if it can
    be.

    >>> proportional(7, (2, 1))
    (5, 2)
    """
    weight = sum(shares)
    exact = [total * share / weight for share in shares]
    sizes = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (sizes[i] - exact[i], i))
    for index in order[: total - sum(sizes)]:
        sizes[index] += 1
    for index, size in enumerate(sizes):
        if size == 0 and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[index] = 1
    return tuple(sizes)
