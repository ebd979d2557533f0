"""The space that `partita.planner.scale.search` searches, and estimates and bounds for all of it at once.

A *family* fixes tensor degree t, context degree c, samples b of a micro-batch, and whether blocks end sequence-parallel; its
pieces have one price each. A *corner* of a family fixes also p stages of v chunks, d replicas, recomputation, ZeRO stage.

With N devices, B samples in a step, m = B / (d b) micro-batches, and W seconds for one micro-batch through all pieces
(forward and backward, without pipeline), for any cut of the chain into stages with times ``w_s``, sum ``w_s = W``:

    start + work + end of stage s:   step >= sum_{i<s} w_i + m w_s                       (v = 1)
    smallest when equal for all s:   step >= W / (1 - (1 - 1/m)^p)                       (v = 1)
    busiest stage:                   step >= m max(W / p, ceil(n / p) w_min)             (any v; n blocks of w_min or more)
    update:                          + update bytes of Q / p / shards parameters over memory bandwidth

The estimates with which corners are ordered: ``(m - 1) w_max + W`` for 1F1B and ``m w_max + (p - 1) w_max / v`` interleaved
(Narayanan et al. 2021, section 2.2), with ``w_max`` of ``ceil(n / (p v))`` blocks a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from partita.cost.kernels import LayerWork
from partita.planner.scale.step import RESERVE_BYTES, ROUNDING, Remat, State

REMATS: tuple[Remat, ...] = ("none", "selective", "full")
VIRTUALS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Prices of one family: per piece and kind of recomputation, seconds of one micro-batch.

    `times_s[remat]` has one entry per piece of the chain's alphabet; `total_s[remat]` is the chain's, priced as a whole.
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
    """Numbers of stages worth trying: all small ones, divisors of the blocks (and with embedding and head), round ones."""
    most = min(most, num_blocks)
    total = (num_blocks, num_blocks + 1, num_blocks + 2)
    return [
        p for p in range(1, most + 1) if p <= 8 or any(n % p == 0 for n in total) or p % 8 == 0 or (p <= 32 and p % 2 == 0)
    ]


def shares_of_batch(batch: int, micro_batch: int, most: int) -> list[int]:
    """The two largest numbers of replicas up to ``most`` that divide the batch into whole micro-batches."""
    if batch % micro_batch:
        return []
    rest = batch // micro_batch
    found: list[int] = []
    for replicas in range(min(most, rest), 0, -1):
        if rest % replicas == 0:
            found.append(replicas)
            if len(found) == 2:
                break
    return found


def corners(
    family: Family,
    remat: Remat,
    *,
    batch: int,
    num_devices: int,
    state: State,
    pipelines: list[int],
    virtuals: list[int],
    datas: list[int] | None,
    zeros: list[int] | None,
) -> Corners:
    """All corners of ``family`` with ``remat``, estimated and bounded."""
    rows = []
    n = family.num_blocks
    for p in pipelines:
        most = num_devices // (family.tensor * family.context * p)
        replicas = shares_of_batch(batch, family.micro_batch, most) if most else []
        for d in replicas if datas is None else [d for d in datas if d <= most and batch % (d * family.micro_batch) == 0]:
            m = batch // (d * family.micro_batch)
            stages = [1] if p == 1 else [v for v in virtuals if p * v <= max(n, 1) and (v == 1 or m % p == 0)]
            stages = [v for v in stages if v == 1 or -(-n // (p * v)) * v <= -(-n // p) + 1]
            shards = d * family.context
            for v in stages:
                for z in zeros if zeros is not None else ([1, 2, 3] if shards > 1 else [0]):
                    rows.append((p, v, d, z, m))
    columns = np.array(rows, dtype=float).reshape(-1, 5).T
    p, v, d, z, m = columns
    blocks = [(w, t) for w, t, g in zip(family.works, family.times_s[remat], family.is_gap, strict=True) if not g]
    total_s = family.total_s[remat]
    largest = max((t for _, t in blocks), default=total_s)
    least = min((t for _, t in blocks), default=0.0)
    gaps = [t for t, g in zip(family.times_s[remat], family.is_gap, strict=True) if g]
    per_chunk = np.ceil(n / (p * v)) if n else np.ones_like(p)
    with np.errstate(divide="ignore", invalid="ignore"):
        busiest = np.maximum(total_s / p, np.minimum(per_chunk * v * largest, total_s))
        busiest = np.maximum(busiest, max(gaps, default=0.0))
        send = np.where(p > 1, 2 * family.send_bytes / family.send_bytes_per_s, 0.0)
        whole = np.where(v == 1, (m - 1) * busiest + total_s, m * busiest + (p - 1) * busiest / v)
        filled = np.where(m > 1, total_s / -np.expm1(p * np.log1p(-1 / np.maximum(m, 1.0000001))), total_s)
        low = m * np.maximum(total_s / p, np.ceil(n / p) * least if n else 0.0)
        elements = sum(w.parameter_elements * c for w, c in zip(family.works, family.counts, strict=True))
        shards = d * family.context
        update = state.update_bytes * elements / p / np.where(z >= 1, shards, 1) / family.bandwidth
    memory, least_memory = _memory(family, remat, state, p, v, shards, z, m)
    return Corners(
        pipeline=p.astype(int),
        virtual=v.astype(int),
        data=d.astype(int),
        zero=z.astype(int),
        estimate_s=whole + update + m * v * send,
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
    least = ROUNDING * (per_parameter * all_q / p + block_a * math.floor(1)) + RESERVE_BYTES
    return ROUNDING * np.maximum(first, last) + RESERVE_BYTES, least
