"""The space that `partita.planner.scale.search` searches, and estimates and bounds for all of it at once.

A *family* fixes tensor degree t, context degree c, samples b of a micro-batch, and whether blocks end
sequence-parallel; its pieces have one price each. A *corner* of a family fixes also p stages of v chunks, d replicas,
recomputation and ZeRO stage.

With N devices, B samples in a step, m = B / (d b) micro-batches, Q parameters, and W seconds for one micro-batch
through all n blocks (forward and backward), for any cut of the chain into stages with times ``w_s``, ``sum w_s = W``:

    stage s starts, works, ends   step >= sum_{i<s} w_i + m w_s                  (v = 1)
    least when equal for all s    step >= W / (1 - (1 - 1/m)^p)                  (v = 1)
    busiest stage                 step >= m max(W / p, ceil(n / p) w_min)        (any v)
    exchanges of ZeRO 2 and 3     step >= m (bytes moved of Q / p parameters) / rate
    update                        + update bytes of Q / p / shards parameters / memory bandwidth

The estimates by which corners are ordered: ``(m - 1) w_max + W`` for 1F1B, ``m w_max + (p - 1) w_max / v`` interleaved
(Narayanan et al. 2021, section 2.2), with ``w_max`` of ``ceil(n / (p v))`` blocks a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from partita.cost.kernels import LayerWork
from partita.planner.scale.step import RESERVE_BYTES, ROUNDING, Remat, State

REMATS: tuple[Remat, ...] = ("none", "selective", "full")
VIRTUALS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Prices of one family: per piece and kind of recomputation, seconds of one micro-batch.

    `times_s[remat]` has one entry per piece of the chain's alphabet; `total_s[remat]` is the chain's, priced as a
    whole.
    """

    tensor: int
    context: int
    micro_batch: int
    sequence_parallel: bool
    works: tuple[LayerWork, ...]
    counts: tuple[int, ...]  # how often each piece occurs in the chain
    is_gap: tuple[bool, ...]
    times_s: dict[Remat, tuple[float, ...]]
    total_s: dict[Remat, float]
    bandwidth: float  # bytes/s of the slowest device's memory
    send_bytes: float
    send_bytes_per_s: float

    @property
    def num_blocks(self) -> int:
        return sum(count for count, gap in zip(self.counts, self.is_gap, strict=True) if not gap)


@dataclass(frozen=True, kw_only=True)
class Corners:
    """Corners of one family and recomputation as columns."""

    pipeline: np.ndarray
    virtual: np.ndarray
    data: np.ndarray
    zero: np.ndarray
    estimate_s: np.ndarray
    bound_s: np.ndarray
    memory_bytes: np.ndarray  # estimated
    least_memory_bytes: np.ndarray  # of any cut


def stage_numbers(most: int, num_blocks: int) -> list[int]:
    """Numbers of stages worth trying: small ones, divisors of the blocks (and with embedding and head), round ones."""
    most = min(most, num_blocks)
    total = (num_blocks, num_blocks + 1, num_blocks + 2)
    return [
        p
        for p in range(1, most + 1)
        if p <= 8 or any(n % p == 0 for n in total) or p % 8 == 0 or (p <= 32 and p % 2 == 0)
    ]


@functools.lru_cache(maxsize=100_000)
def shares_of_batch(batch: int, micro_batch: int, most: int) -> tuple[int, ...]:
    """Numbers of replicas that divide the batch into whole micro-batches: the two largest up to ``most``; where the
    batch is smaller than that, those that leave 2, 4, .. 32 micro-batches (fewer devices may be faster)."""
    if batch % micro_batch or most < 1:
        return ()
    rest = batch // micro_batch
    shares = [share for share in _divisors(rest) if share <= most]
    fewer = [rest // m for m in (2, 4, 8, 16, 32) if rest % m == 0 and rest // m <= most] if most >= rest else []
    return tuple(sorted({*shares[-2:], *fewer}, reverse=True))


@functools.lru_cache(maxsize=1000)
def _divisors(number: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def enumerated(
    *,
    batch: int,
    num_devices: int,
    group: int,
    context: int,
    micro_batch: int,
    num_blocks: int,
    pipelines: Sequence[int],
    virtuals: Sequence[int],
    datas: Sequence[int] | None,
    zeros: Sequence[int] | None,
    exchange: Callable[[int], tuple[float, float]],
) -> np.ndarray:
    """Columns of all corners of families of ``group`` devices for a replica's stage: stages, chunks, replicas, ZeRO
    stage, micro-batches, and seconds for each byte, and besides, of a reduce-scatter over the replicas."""
    rows = []
    for p in pipelines:
        most = num_devices // (group * p)
        replicas: Sequence[int] = shares_of_batch(batch, micro_batch, most)
        for d in replicas if datas is None else [d for d in datas if d <= most and batch % (d * micro_batch) == 0]:
            m = batch // (d * micro_batch)
            chunked = [v for v in virtuals if p * v <= max(num_blocks, 1) and m % p == 0 and v > 1 and p > 1]
            chunked = [v for v in chunked if -(-num_blocks // (p * v)) * v <= -(-num_blocks // p) + 1]
            shards = d * context
            byte_s, fixed_s = exchange(d) if shards > 1 else (0.0, 0.0)
            for v in [1, *chunked] if 1 in virtuals else chunked or ([1] if p == 1 else []):
                for z in zeros if zeros is not None else ((1, 2, 3) if shards > 1 else (0,)):
                    rows.append((p, v, d, z, m, byte_s, fixed_s))
    return np.array(rows, dtype=float).reshape(-1, 7).T


def corners(
    family: Family,
    remat: Remat,
    *,
    columns: np.ndarray,
    state: State,
    overlap: float,
) -> Corners:
    """All corners of ``family`` with ``remat``, estimated and bounded.

    Args:
        columns: of `enumerated`.
        overlap: the share of an exchange that may hide behind compute.
    """
    n = family.num_blocks
    p, v, d, z, m, byte_s, fixed_s = columns
    blocks = [(w, t) for w, t, g in zip(family.works, family.times_s[remat], family.is_gap, strict=True) if not g]
    total_s = family.total_s[remat]
    largest = max((t for _, t in blocks), default=total_s)
    least = min((t for _, t in blocks), default=0.0)
    gaps = [t for t, g in zip(family.times_s[remat], family.is_gap, strict=True) if g]
    per_chunk = np.ceil(n / (p * v)) if n else np.ones_like(p)
    with np.errstate(divide="ignore", invalid="ignore"):
        busiest = np.maximum(total_s / p, np.minimum(per_chunk * v * largest, total_s))
        busiest = np.maximum(busiest, max(gaps, default=0.0))
        elements = sum(w.parameter_elements * c for w, c in zip(family.works, family.counts, strict=True))
        largest_q = max((w.parameter_elements for w, _ in blocks), default=elements)
        share_q = np.maximum(elements / p, np.minimum(per_chunk * v * largest_q, elements))
        moved = np.where(z == 3, state.exchange_bytes + 2 * state.weight_bytes, state.exchange_bytes) * (z >= 2)
        fetch = np.maximum(0.0, moved * share_q * byte_s + (z >= 2) * fixed_s * per_chunk * v)
        least_fetch = moved * elements / p * byte_s
        work = busiest
        busiest = np.maximum(work, fetch) + (1 - overlap) * np.minimum(work, fetch)
        tail = np.where(z == 2, state.weight_bytes, 2 * state.exchange_bytes) * (z <= 2) * share_q * byte_s + fixed_s
        tail = np.maximum(tail - overlap * 0.6 * busiest, 0.05 * tail) * (d * family.context > 1)
        send = np.where(p > 1, 2 * family.send_bytes / family.send_bytes_per_s, 0.0)
        whole = np.where(
            v == 1, (m - 1) * busiest + total_s + p * (busiest - work), m * busiest + (p - 1) * busiest / v
        )
        filled = np.where(m > 1, total_s / -np.expm1(p * np.log1p(-1 / np.maximum(m, 1.0000001))), total_s)
        low = m * np.maximum(np.maximum(total_s / p, least_fetch), np.ceil(n / p) * least if n else 0.0)
        shards = d * family.context
        update = state.update_bytes * elements / p / np.where(z >= 1, shards, 1) / family.bandwidth
    memory, least_memory = _memory(family, remat, state, p, v, shards, z, m)
    return Corners(
        pipeline=p.astype(int),
        virtual=v.astype(int),
        data=d.astype(int),
        zero=z.astype(int),
        estimate_s=whole + update + tail + m * v * send,
        bound_s=np.where(v == 1, np.maximum(filled, low), low) + update,
        memory_bytes=memory,
        least_memory_bytes=least_memory,
    )


def _memory(
    family: Family,
    remat: Remat,
    state: State,
    p: np.ndarray,
    v: np.ndarray,
    shards: np.ndarray,
    zero: np.ndarray,
    m: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimated peak (the first and the last stage with an even share of blocks), and the least of any cut."""
    kept = {"none": "saved_bytes", "selective": "selective_bytes", "full": "boundary_bytes"}[remat]
    pairs = list(zip(family.works, family.counts, family.is_gap, strict=True))
    n = max(family.num_blocks, 1)
    block_q = sum(w.parameter_elements * c for w, c, gap in pairs if not gap) / n
    block_a = sum(getattr(w, kept) * c for w, c, gap in pairs if not gap) / n
    gap_works = [w for w, _, gap in pairs if gap]
    all_q = sum(w.parameter_elements * c for w, c, _ in pairs)
    per_parameter = np.where(
        zero == 3,
        (state.gradient_bytes + state.optimizer_bytes) / shards,
        state.weight_bytes
        + state.gradient_bytes / np.where(zero == 2, shards, 1)
        + state.optimizer_bytes / np.where(zero >= 1, shards, 1),
    )
    fetched = np.where(zero == 3, 2 * state.weight_bytes * max(w.parameter_elements for w, _, _ in pairs), 0.0)
    layers = np.ceil(family.num_blocks / (p * v)) * v
    in_flight = np.where(v > 1, np.minimum(m * v, 2 * (p - 1) + (v - 1) * p + 1) / v, np.minimum(m, p))
    temporary = max((w.temporary_bytes for w, _, gap in pairs if not gap), default=0.0) if remat == "full" else 0.0
    first_q = gap_works[0].parameter_elements if gap_works else 0.0
    first = per_parameter * (layers * block_q + first_q) + layers * block_a * in_flight + temporary + fetched
    last_q = gap_works[-1].parameter_elements if gap_works else 0.0
    head = gap_works[-1].temporary_bytes + gap_works[-1].saved_bytes if gap_works else 0.0
    last_flight = np.where(v > 1, np.minimum(m * v, (v - 1) * p + 1) / v, 1.0)
    last = per_parameter * (layers * block_q + last_q) + layers * block_a * last_flight + head + fetched
    # Of any cut: sum_s L_s = n blocks with L_s (q + a f_s) <= M for every stage gives M >= n / sum_s 1 / (q + a f_s);
    # the
    # sum over s of a convex function is at most the integral around the middles (Hermite and Hadamard).
    q = per_parameter * block_q
    a = max(block_a, 1.0)
    slope, start = np.where(v > 1, 2 / v, 1.0), np.where(v > 1, ((v - 1) * p - 1) / v, 0.0)
    few = np.minimum(np.where(v > 1, p, m), p)  # stages whose micro-batches in flight still differ
    with np.errstate(divide="ignore", invalid="ignore"):
        full = np.where(v > 1, np.minimum(m, start + slope * p), np.minimum(m, p))
        ratio = (q + a * (start + slope * (few + 0.5))) / np.maximum(q + a * (start + slope * 0.5), 1.0)
        total = np.log(ratio) / (a * slope) + (p - few) / (q + a * full)
    least = np.maximum(per_parameter * all_q / p, family.num_blocks / np.maximum(total, 1e-300))
    least = np.where(v * m < start * v + 2 * p, per_parameter * all_q / p, least) if family.num_blocks else least
    return ROUNDING * np.maximum(first, last) + RESERVE_BYTES, ROUNDING * least + RESERVE_BYTES
