"""The space that `partita.planner.scale.search` searches, and estimates and bounds for all of it at once.

A *corner* of a family (`partita.planner.scale.families`) fixes also p stages of v chunks, d replicas, recomputation and
ZeRO stage. `enumerated` gives the corners of one family as rows, `tabled` those of all families with estimates, bounds
and memory, one column each.

With N devices, B samples in a step, m = B / (d b) micro-batches, Q parameters, W seconds for one micro-batch through
all blocks and S for its ``2 (p v - 1)`` sends, any cut of the chain gives stage s a share ``W_s`` (with its sends)
and ``x_s`` of the parameters, ``sum W_s >= W + S``, ``sum x_s = Q``; its first chunk takes ``w_s``, at least the least
block's ``w`` but for G chunks of gaps. Stage s starts after, and ends before, the first chunks of the stages before:

    step >= m W_s + sum_{i<s} w_i, so by the sum over all stages, with K = p - 1 - G,
    evenly         step >= (m (W + S) + w K (K+1) / 2) / p
    v = 1          step >= (W + S) / (1 - (1 - 1/m)^p)                (W_s = w_s, equal for all s at the least)
    whole blocks   step >= m (ceil(n/p) w + (2 v - 1) S / (2 p v - 2))

The exchange of gradients of stage s (``a x_s`` seconds) starts after its last backward pass, hides at most the share
``o`` of one (b_s) of them, and of what the stages before still do; f is the least block's forward pass:

    step >= m W_s - o b_s + a x_s + sum_{i<s} f_i
    evenly         step >= (m (W + S) - o sum b_s + a Q + f K (K+1) / 2) / p
    whole blocks   step >= (m - o) ceil(n/p) w + a ceil(n/p) q

ZeRO 2 and 3 move their bytes for each micro-batch beside the passes: ``step >= m (bytes of Q / p) / rate``. All take
besides the update: bytes of Q / p / shards parameters over memory bandwidth. Rates are the best of all kinds.

The estimates by which corners are ordered: ``(m - 1) w_max + W`` for 1F1B, ``m w_max + (p - 1) w_max / v`` interleaved
(Narayanan et al. 2021, section 2.2), with ``w_max`` of ``ceil(n / (p v))`` blocks a chunk.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.planner.scale.families import REMATS, Family
from partita.planner.scale.rates import Rates
from partita.planner.scale.step import RESERVE_BYTES, ROUNDING, Remat, State

VIRTUALS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
Array = np.ndarray


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
    divisors = _divisors(rest)
    shares = divisors[: bisect_right(divisors, most)]
    fewer = [rest // m for m in (2, 4, 8, 16, 32) if rest % m == 0 and rest // m <= most] if most >= rest else []
    return tuple(sorted({*shares[-2:], *fewer}, reverse=True))


@functools.lru_cache(maxsize=1000)
def _divisors(number: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


@functools.lru_cache(maxsize=4096)
def enumerated(
    *,
    batch: int,
    num_devices: int,
    group: int,
    micro_batch: int,
    num_blocks: int,
    pipelines: tuple[int, ...],
    virtuals: tuple[int, ...],
    datas: tuple[int, ...] | None,
) -> Array:
    """Rows (p, v, d, m) as columns of all corners of families of ``group`` devices for a replica's stage."""
    pairs = []
    for p in pipelines:
        most = num_devices // (group * p)
        replicas: Sequence[int] = shares_of_batch(batch, micro_batch, most)
        if datas is not None:
            replicas = [d for d in datas if d <= most and batch % (d * micro_batch) == 0]
        pairs += [(p, d, batch // (d * micro_batch)) for d in replicas]
    stages, d, m = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    rows = [np.stack([stages, np.ones_like(stages), d, m])[:, slice(None) if 1 in virtuals else stages == 1]]
    for v in virtuals:
        kept = (stages * v <= max(num_blocks, 1)) & (m % stages == 0) & (stages > 1) & (v > 1)
        kept &= -(-num_blocks // (stages * v)) * v <= -(-num_blocks // stages) + 1
        rows.append(np.stack([stages, np.full_like(stages, v), d, m])[:, kept])
    return np.concatenate(rows, axis=1)


@dataclass(frozen=True, kw_only=True)
class Corners:
    """All corners as columns; ``family`` counts families, ``remat`` kinds of recomputation (`REMATS`)."""

    family: Array
    remat: Array
    pipeline: Array
    virtual: Array
    data: Array
    zero: Array
    num_microbatches: Array
    estimate_s: Array
    bound_s: Array
    memory_bytes: Array  # estimated
    least_memory_bytes: Array  # of any cut

    def __len__(self) -> int:
        return len(self.family)


_BOUNDARY = {"none": "saved_bytes", "selective": "selective_bytes", "full": "boundary_bytes"}


def _facts(family: Family, remat: Remat, bandwidth: float) -> dict[str, float]:
    """What estimates and bounds need to know of one family with one kind of recomputation."""
    times, works, counts = family.times[remat], family.works, family.counts
    used = [i for i, count in enumerate(counts) if count]
    blocks = [i for i in used if not family.is_gap[i]]
    gaps = [works[i] for i in used if family.is_gap[i]]
    n = max(family.num_blocks, 1)
    kept = _BOUNDARY[remat]
    last = gaps[-1] if gaps else None
    return {
        "tensor": family.tensor,
        "context": family.context,
        "num_gaps": family.num_gaps,
        "total": times.total_s,
        "largest": max((times.pieces_s[i] for i in blocks), default=times.total_s),
        "gap": max((times.pieces_s[i] for i in used if family.is_gap[i]), default=0.0),
        "least_total": times.least_total_s,
        "least": times.least_block_s,
        "least_forward": times.least_forward_s,
        "most_backward": times.most_backward_s,
        "elements": sum(works[i].parameter_elements * counts[i] for i in used),
        "largest_q": max((works[i].parameter_elements for i in blocks), default=0.0),
        "least_q": min((works[i].parameter_elements for i in blocks), default=0.0),
        "most_q": max((works[i].parameter_elements for i in used), default=0.0),
        "block_q": sum(works[i].parameter_elements * counts[i] for i in blocks) / n,
        "block_a": sum(getattr(works[i], kept) * counts[i] for i in blocks) / n,
        "temporary": max((works[i].temporary_bytes for i in blocks), default=0.0) if remat == "full" else 0.0,
        "first_q": gaps[0].parameter_elements if gaps else 0.0,
        "last_q": last.parameter_elements if last else 0.0,
        "head": last.temporary_bytes + last.saved_bytes if last else 0.0,
        "bandwidth": bandwidth,
        "send": family.send_bytes,
        "least_send": family.least_send_bytes,
    }


def tabled(
    families: Sequence[Family],
    rows: Sequence[Array],
    *,
    remats: Sequence[Remat],
    zeros: Sequence[int] | None,
    state: State,
    rates: Rates,
) -> Corners:
    """All corners of ``families`` (one at least), whose degrees are ``rows`` (of `enumerated`)."""
    facts, parts, place, kind = [], [], [], []
    for index, (family, own) in enumerate(zip(families, rows, strict=True)):
        for remat in remats:
            if remat == "selective" and len(remats) > 1 and family.times[remat] == family.times["none"]:
                continue
            place.append(index)
            kind.append(REMATS.index(remat))
            facts.append(_facts(family, remat, rates.bandwidth))
            parts.append(own)
    sizes = [part.shape[1] for part in parts]
    which = np.repeat(np.arange(len(parts)), sizes)
    p, v, d, m = np.concatenate(parts, axis=1)
    names = list(facts[0])
    columns = np.array([[fact[name] for name in names] for fact in facts], dtype=float).reshape(len(facts), -1)
    context = columns[which, names.index("context")]
    sharded = d * context > 1
    choices = zeros if zeros is not None else (0, 1, 2, 3)
    picked = [np.flatnonzero(np.ones_like(sharded) if zeros is not None else sharded == (z > 0)) for z in choices]
    order = np.concatenate(picked)
    z = np.repeat(np.array(choices), [len(one) for one in picked])
    which, p, v, d, m = which[order], p[order], v[order], d[order], m[order]
    fact = {name: columns[which, i] for i, name in enumerate(names)}
    exchange = rates.exchanges(fact["tensor"], fact["context"] * d)
    sends = rates.sends(fact["tensor"] * fact["context"] * d)
    n = families[0].num_blocks
    at = _At(n, p.astype(float), v.astype(float), (d * fact["context"]), z, m.astype(float), fact, state)
    memory, least_memory = at.memory()
    return Corners(
        family=np.array(place)[which],
        remat=np.array(kind)[which],
        pipeline=p,
        virtual=v,
        data=d,
        zero=z,
        num_microbatches=m,
        estimate_s=at.estimate_s(exchange, sends, rates.overlap),
        bound_s=at.bound_s(rates.best_exchanges(fact["tensor"], fact["context"] * d), sends, rates.overlap),
        memory_bytes=memory,
        least_memory_bytes=least_memory,
    )


@dataclass(frozen=True)
class _At:
    """The formulas above for all corners at once."""

    n: int
    p: Array
    v: Array
    shards: Array
    z: Array
    m: Array
    fact: dict[str, Array]
    state: State

    def _moved_bytes(self) -> Array:
        """Of ZeRO 2 and 3, for each parameter and micro-batch."""
        state = self.state
        gathers = np.where(self.z == 3, 2 * state.weight_bytes, 0.0)
        return np.asarray((gathers + state.exchange_bytes) * (self.z >= 2))

    def _tail_bytes(self) -> Array:
        """Of the exchange after the last micro-batch, for each parameter, in units of a reduce-scatter."""
        state = self.state
        once = np.where(self.z == 2, state.weight_bytes, 2 * state.exchange_bytes)
        return np.asarray(once * (self.z <= 2) * (self.shards > 1))

    def _update_s(self) -> Array:
        elements = self.fact["elements"] / self.p / np.where(self.z >= 1, self.shards, 1)
        return np.asarray(self.state.update_bytes * elements / self.fact["bandwidth"])

    def estimate_s(self, exchange: tuple[Array, Array], sends: tuple[Array, Array], overlap: float) -> Array:
        """Expected step time."""
        p, v, m, fact = self.p, self.v, self.m, self.fact
        byte_s, fixed_s = exchange
        total = fact["total"]
        per_stage = np.ceil(self.n / (p * v)) * v if self.n else v
        work = np.maximum(np.maximum(total / p, np.minimum(per_stage * fact["largest"], total)), fact["gap"])
        share_q = np.maximum(fact["elements"] / p, np.minimum(per_stage * fact["largest_q"], fact["elements"]))
        fetch = self._moved_bytes() * share_q * byte_s + (self.z >= 2) * fixed_s * per_stage
        busiest = np.maximum(work, fetch) + (1 - overlap) * np.minimum(work, fetch)
        tail = self._tail_bytes() * share_q * byte_s + fixed_s * (self.shards > 1)
        tail = np.maximum(tail - overlap * 0.6 * busiest, 0.05 * tail)
        send = np.where(p > 1, 2 * (sends[0] + fact["send"] * sends[1]), 0.0)
        chunk = busiest + v * send
        whole = np.where(v == 1, (m - 1) * chunk + total + p * (chunk - work), m * chunk + (p - 1) * chunk / v)
        return np.asarray(whole + self._update_s() + tail)

    def bound_s(self, exchange: tuple[Array, Array], sends: tuple[Array, Array], overlap: float) -> Array:
        """What no cut undercuts."""
        p, v, m, fact = self.p, self.v, self.m, self.fact
        byte_s, _ = exchange
        send = np.where(p > 1, sends[0] + fact["least_send"] * sends[1], 0.0)
        total = fact["least_total"] + 2 * (p * v - 1) * send
        later = np.maximum(p - 1 - fact["num_gaps"], 0)
        lead = later * (later + 1) / 2
        blocks = np.ceil(self.n / p)
        block = blocks * fact["least"] + (2 * v - 1) * send
        with np.errstate(divide="ignore", invalid="ignore"):
            share = -np.expm1(p * np.log1p(-1 / np.maximum(m, 1.0000001)))
        filled = np.where((v == 1) & (m > 1), total / share, total)
        tail = self._tail_bytes() * byte_s
        # Backward passes of all stages, sends included; with ZeRO 2 exchanges run beside them: at most all passes.
        hidden = np.where(self.z < 2, np.minimum(fact["most_backward"] + p * v * send, total), total)
        low = np.maximum.reduce(
            [
                filled,
                (m * total + fact["least"] * lead) / p,
                m * block,
                m * self._moved_bytes() * fact["elements"] / p * byte_s,
                (m * total - overlap * hidden + tail * fact["elements"] + fact["least_forward"] * lead) / p,
                (m - overlap) * block + tail * blocks * fact["least_q"],
            ]
        )
        return np.asarray(low + self._update_s())

    def memory(self) -> tuple[Array, Array]:
        """Estimated peak (the first and the last stage with an even share of blocks), and the least of any cut."""
        p, v, m, shards, zero, fact, state = self.p, self.v, self.m, self.shards, self.z, self.fact, self.state
        block_q, block_a, all_q = fact["block_q"], fact["block_a"], fact["elements"]
        per_parameter = np.where(
            zero == 3,
            (state.gradient_bytes + state.optimizer_bytes) / shards,
            state.weight_bytes
            + state.gradient_bytes / np.where(zero == 2, shards, 1)
            + state.optimizer_bytes / np.where(zero >= 1, shards, 1),
        )
        fetched = np.where(zero == 3, 2 * state.weight_bytes * fact["most_q"], 0.0)
        layers = np.ceil(self.n / (p * v)) * v
        in_flight = np.where(v > 1, np.minimum(m * v, 2 * (p - 1) + (v - 1) * p + 1) / v, np.minimum(m, p))
        first = per_parameter * (layers * block_q + fact["first_q"]) + layers * block_a * in_flight
        first += fact["temporary"] + fetched
        last_flight = np.where(v > 1, np.minimum(m * v, (v - 1) * p + 1) / v, 1.0)
        last = per_parameter * (layers * block_q + fact["last_q"]) + layers * block_a * last_flight
        last += fact["head"] + fetched
        # Of any cut: sum_s L_s = n blocks with L_s (q + a f_s) <= M for every stage gives M >= n / sum_s 1/(q + a f_s);
        # the sum over s of a convex function is at most the integral around the middles (Hermite and Hadamard).
        q = per_parameter * block_q
        a = np.maximum(block_a, 1.0)
        slope, start = np.where(v > 1, 2 / v, 1.0), np.where(v > 1, ((v - 1) * p - 1) / v, 0.0)
        few = np.minimum(np.where(v > 1, p, m), p)  # stages whose micro-batches in flight still differ
        with np.errstate(divide="ignore", invalid="ignore"):
            full = np.where(v > 1, np.minimum(m, start + slope * p), np.minimum(m, p))
            ratio = (q + a * (start + slope * (few + 0.5))) / np.maximum(q + a * (start + slope * 0.5), 1.0)
            total = np.log(ratio) / (a * slope) + (p - few) / (q + a * full)
        least = np.maximum(per_parameter * all_q / p, self.n / np.maximum(total, 1e-300))
        few_batches = v * m < start * v + 2 * p
        least = np.where(few_batches, per_parameter * all_q / p, least) if self.n else least
        return ROUNDING * np.maximum(first, last) + RESERVE_BYTES, ROUNDING * least + RESERVE_BYTES
