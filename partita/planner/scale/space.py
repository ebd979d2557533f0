"""The space that `partita.planner.scale.search` searches, and estimates and bounds for all of it at once.

A *corner* of a family (`partita.planner.scale.families`) fixes also p stages of v chunks, d replicas, recomputation and
ZeRO stage. In the space are all p up to the pieces of the chain, all v > 1 with p v up to its n blocks (interleaved
schedules: m a multiple of p), and all d that divide the batch into whole micro-batches and for which the fabric has the
devices, so plans on fewer devices than there are, too. `tabled` gives corners with estimates, bounds and memory, one
column each.

With N devices, B samples in a step, m = B / (d b) micro-batches, Q parameters: chunk c takes ``F_c`` forward and
``B_c`` backward, the send of its result included; stage s has the chunks s, s + p, .., their sums ``F^s, B^s``, and x_s
parameters. `F`, `B` (of all chunks) and `f`, `b` (of one block) are sums and parts of `families.Least`, with exchanges
beside them, S of ZeRO 2 and 3 among these:

    pass >= g(X, S),   g(X, S) = max(X, S) + (1 - o) min(X, S)     a norm, so sums of passes are at least g of the sums
    sum F_c >= F + (p v - 1) send,   sum B_c >= B + (p v - 1) send;   exact for p v = 1 on equal machines

The first op of stage s waits for the first forward passes of the stages before, whose last backward passes wait for the
last op of stage s (1F1B and interleaved alike), and what `step` extrapolates grows by no less than the busiest stage:

    makespan >= m (F^s + B^s) + sum_{i<s} (F_i + B_i)
    data_s   >= max(a x_s + a_0 - o B^s, 0.05 (a x_s + a_0)) - sum_{i<s} B_i       (exchange of gradients; `_after`)
    step     >= makespan + data_s + update

The mean over all s, with ``sum_s sum_{i<s} F_i >= f K (K+1) / 2 + send p (p-1) / 2``, K = p - 1 - G, G chunks of gaps
at most (the same for B_i, whose first chunk sends nothing back), gives

    evenly         step >= (m sum (F_c + B_c) + leads) / p
                   step >= (m sum F_c + (m - o) sum B_c + a Q + p a_0 + leads of F) / p
                   step >= (m sum (F_c + B_c) + 0.05 (a Q + p a_0) + leads of F) / p

For v = 1 the chunks that lead are the stages' own, ``W_s <= (step - sum_{i<s} W_i) / m``, so

    v = 1          step >= sum (F_c + B_c) / (1 - (1 - 1/m)^p)

One stage has ``k = ceil(n / p)`` blocks at least, and ``2 v - 1`` sends:

    whole blocks   step >= m (k (f + b) + (2 v - 1) send)
                   step >= m k f + (m - o) (k b + (2 v - 1) send) + a k q + a_0;   with 0.05 (a k q + a_0) as above

All take besides the update of the largest share of parameters: the mean, k blocks, or the largest piece, over ZeRO's
shards and memory bandwidth. Rates are the best of all kinds. Bounds are lowered by `SLACK` for sums in another order.

The estimates by which corners are ordered: ``(m - 1) w_max + W`` for 1F1B, ``m w_max + (p - 1) w_max / v`` interleaved
(Narayanan et al. 2021, section 2.2), with ``w_max`` of ``ceil(n / (p v))`` blocks a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.planner.scale.families import REMATS, Family
from partita.planner.scale.rates import Groups, Rates
from partita.planner.scale.step import HIDDEN_LEAST, RESERVE_BYTES, ROUNDING, Remat, State

VIRTUALS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)  # chunks of a stage that are usual
SLACK = 1e-6  # of `step`'s extrapolated schedules and of rounding
Array = np.ndarray


def stage_numbers(most: int, num_blocks: int) -> list[int]:
    """Usual numbers of stages: small ones, divisors of the blocks (and with embedding and head), round ones."""
    most = min(most, num_blocks)
    total = (num_blocks, num_blocks + 1, num_blocks + 2)
    return [
        p
        for p in range(1, most + 1)
        if p <= 8 or any(n % p == 0 for n in total) or p % 8 == 0 or (p <= 32 and p % 2 == 0)
    ]


@functools.lru_cache(maxsize=1000)
def divisors(number: int) -> tuple[int, ...]:
    """In rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


@dataclass(frozen=True, eq=False)
class Pairs:
    """All numbers of stages and replicas of families of one size, as columns; `usual` are those worth trying first."""

    stages: Array
    data: Array
    num_microbatches: Array
    usual: Array

    def rows(self, num_blocks: int, virtuals: Sequence[int] | None, *, usual: bool, chosen: Array) -> Array:
        """Rows (p, v, d, m) of the pairs ``chosen`` with every number of chunks.

        Args:
            virtuals: the numbers of chunks; None: all.
            usual: whether only usual pairs with usual numbers of chunks are wanted, or only all others.
        """
        kept = np.flatnonzero(chosen & self.usual if usual else chosen)
        p, d, m, common = (column[kept] for column in (self.stages, self.data, self.num_microbatches, self.usual))
        # Interleaved schedules: a multiple of the stages as micro-batches.
        most = np.where((p > 1) & (m % p == 0), np.maximum(num_blocks // p, 1), 1)
        if virtuals is None:
            where = np.repeat(np.arange(len(p)), most)
            v = np.arange(len(where)) - np.repeat(np.cumsum(most) - most, most) + 1
        else:
            where = np.repeat(np.arange(len(p)), len(virtuals))
            v = np.tile(np.array(virtuals, dtype=np.int64), len(p))
        p, d, m, common, most = p[where], d[where], m[where], common[where], most[where]
        if virtuals is None:
            even = -(-num_blocks // (p * v)) * v <= -(-num_blocks // p) + 1
            common = common & ((v == 1) | (np.isin(v, VIRTUALS) & even))
        fits = (v <= most) & (common if usual else ~common)
        return np.stack([p, v, d, m])[:, fits]


@functools.lru_cache(maxsize=4096)
def paired(
    *,
    batch: int,
    num_devices: int,
    group: int,
    micro_batch: int,
    num_pieces: int,
    num_blocks: int,
    pipelines: tuple[int, ...] | None,
    datas: tuple[int, ...] | None,
) -> Pairs:
    """All pairs of families of ``group`` devices for a replica's stage; ``pipelines`` and ``datas``: only these."""
    rest = batch // micro_batch
    if batch % micro_batch:
        raise ValueError(f"micro-batches of {micro_batch} must divide the batch of {batch}")
    shares = np.array([d for d in datas or divisors(rest) if rest % d == 0], dtype=np.int64)
    most = min(num_devices // group, num_pieces)
    stages = np.array([p for p in pipelines or range(1, most + 1) if p <= most], dtype=np.int64)
    p, d = (np.repeat(stages, len(shares)), np.tile(shares, len(stages)))
    room = num_devices // (group * np.maximum(p, 1))
    # Usual: the two largest numbers of replicas, and where the batch is small fewer with 2, 4, .. 32 micro-batches.
    rank = np.searchsorted(shares, room, side="right") - np.tile(np.arange(len(shares)), len(stages))
    usual = (rank <= 2) | ((room >= rest) & np.isin(rest // d, (2, 4, 8, 16, 32)))
    if datas is not None:
        usual[:] = True
    if pipelines is None:
        usual &= np.isin(p, stage_numbers(most, max(num_blocks, 1)))
    fits = d <= room
    return Pairs(p[fits], d[fits], rest // d[fits], usual[fits])


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
        "num_pieces": sum(counts),
        "total": times.total_s,
        "largest": max((times.pieces_s[i] for i in blocks), default=times.total_s),
        "gap": max((times.pieces_s[i] for i in used if family.is_gap[i]), default=0.0),
        **{f"forward_{name}": value for name, value in vars(times.forward).items()},
        **{f"backward_{name}": value for name, value in vars(times.backward).items()},
        "elements": sum(works[i].parameter_elements * counts[i] for i in used),
        "largest_q": max((works[i].parameter_elements for i in blocks), default=0.0),
        "least_q": min((works[i].parameter_elements for i in blocks), default=0.0),
        "most_q": max((works[i].parameter_elements for i in used), default=0.0),
        "block_q": sum(works[i].parameter_elements * counts[i] for i in blocks) / n,
        "least_a": min((getattr(works[i], kept) for i in blocks), default=0.0),
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
    columns = np.array([[fact[name] for fact in facts] for name in names], dtype=float)
    context = columns[names.index("context")][which]
    sharded = d * context > 1
    choices = zeros if zeros is not None else (0, 1, 2, 3)
    # Of one rank ZeRO 3 keeps no second copy of the weights; of several ZeRO 1 does all that 0 does and keeps less.
    wanted = [sharded if z in (1, 2) else np.ones_like(sharded) if z == 3 else ~sharded for z in choices]
    picked = [np.flatnonzero(np.ones_like(sharded) if zeros is not None else one) for one in wanted]
    order = np.concatenate(picked)
    z = np.repeat(np.array(choices), [len(one) for one in picked])
    which, p, v, d, m = which[order], p[order], v[order], d[order], m[order]
    fact = {name: columns[i][which] for i, name in enumerate(names)}
    groups = Groups(fact["tensor"], fact["context"] * d)
    n = families[0].num_blocks
    at = _At(n, p.astype(float), v.astype(float), (d * fact["context"]), z, m.astype(float), fact, state, groups)
    memory, least_memory = at.memory()
    return Corners(
        family=np.array(place)[which],
        remat=np.array(kind)[which],
        pipeline=p,
        virtual=v,
        data=d,
        zero=z,
        num_microbatches=m,
        estimate_s=at.estimate_s(rates),
        bound_s=at.bound_s(rates),
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
    groups: Groups

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

    def _update_s(self, elements: Array) -> Array:
        """Of a stage with ``elements`` parameters."""
        return np.asarray(
            self.state.update_bytes * elements / np.where(self.z >= 1, self.shards, 1) / self.fact["bandwidth"]
        )

    def estimate_s(self, rates: Rates) -> Array:
        """Expected step time."""
        p, v, m, fact, overlap = self.p, self.v, self.m, self.fact, rates.overlap
        byte_s, fixed_s = rates.exchanges(self.groups)
        send_byte_s, send_s = rates.sends(self.groups)
        total = fact["total"]
        per_stage = np.ceil(self.n / (p * v)) * v if self.n else v
        work = np.maximum(np.maximum(total / p, np.minimum(per_stage * fact["largest"], total)), fact["gap"])
        share_q = np.maximum(fact["elements"] / p, np.minimum(per_stage * fact["largest_q"], fact["elements"]))
        fetch = self._moved_bytes() * share_q * byte_s + (self.z >= 2) * fixed_s * per_stage
        busiest = np.maximum(work, fetch) + (1 - overlap) * np.minimum(work, fetch)
        tail = self._tail_bytes() * share_q * byte_s + fixed_s * (self.shards > 1)
        tail = np.maximum(tail - overlap * 0.6 * busiest, 0.05 * tail)
        send = np.where(p > 1, 2 * (send_s + fact["send"] * send_byte_s), 0.0)
        chunk = busiest + v * send
        whole = np.where(v == 1, (m - 1) * chunk + total + p * (chunk - work), m * chunk + (p - 1) * chunk / v)
        return np.asarray(whole + self._update_s(share_q) + tail)

    def bound_s(self, rates: Rates) -> Array:
        """What no cut undercuts: the formulas above."""
        p, v, m, fact, overlap = self.p, self.v, self.m, self.fact, rates.overlap
        send_byte_s, send_s = rates.sends(self.groups)
        send = np.where(p > 1, send_s + fact["least_send"] * send_byte_s, 0.0)
        byte_s, fixed_s = rates.best_exchanges(self.groups)
        whole_f, block_f = self._passes_s("forward", byte_s, fixed_s, overlap)
        whole_b, block_b = self._passes_s("backward", byte_s, fixed_s, overlap)
        sum_f, sum_b = (one + (p * v - 1) * send for one in (whole_f, whole_b))
        later = np.maximum(p - 1 - fact["num_gaps"], 0)
        lead_f = block_f * later * (later + 1) / 2 + send * p * (p - 1) / 2
        lead_b = block_b * later * (later + 1) / 2 + send * np.maximum((p - 1) * (p - 2), 0) / 2
        blocks = np.ceil(self.n / p)
        stage_f, stage_b = blocks * block_f, blocks * block_b + (2 * v - 1) * send
        with np.errstate(divide="ignore", invalid="ignore"):
            share = -np.expm1(p * np.log1p(-1 / np.maximum(m, 1.0000001)))
        filled = np.where((v == 1) & (m > 1), (sum_f + sum_b) / share, sum_f + sum_b)
        tail_byte_s, tail_s = self._tail(rates, byte_s, fixed_s)
        even_tail = tail_byte_s * fact["elements"] + p * tail_s
        stage_tail = tail_byte_s * blocks * fact["least_q"] + tail_s
        low = np.maximum.reduce(
            [
                filled,
                (m * (sum_f + sum_b) + lead_f + lead_b) / p,
                (m * sum_f + (m - overlap) * sum_b + even_tail + lead_f) / p,
                (m * (sum_f + sum_b) + HIDDEN_LEAST * even_tail + lead_f) / p,
                m * (stage_f + stage_b),
                m * stage_f + (m - overlap) * stage_b + stage_tail,
                m * (stage_f + stage_b) + HIDDEN_LEAST * stage_tail,
            ]
        )
        largest_q = np.maximum.reduce([fact["elements"] / p, blocks * fact["least_q"], fact["most_q"]])
        return np.asarray((low + self._update_s(largest_q)) * (1 - SLACK))

    def _passes_s(self, way: str, byte_s: Array, fixed_s: Array, overlap: float) -> tuple[Array, Array]:
        """Least seconds of all passes of a micro-batch in one direction, and of one block's, ZeRO's exchanges beside
        them."""
        fact, state = self.fact, self.state
        gathers = self.z == 3
        scatters = (self.z >= 2) & (way == "backward")
        moved_s = (gathers * state.weight_bytes + scatters * state.exchange_bytes) * byte_s
        start_s = (gathers.astype(float) + scatters) * fixed_s
        cut_s = np.where(self.p * self.v == 1, fact[f"{way}_whole_s"], fact[f"{way}_cut_s"])
        beside_s = fact[f"{way}_hidden_s"] + moved_s * fact["elements"] + start_s * fact["num_pieces"]
        block_beside_s = fact[f"{way}_block_hidden_s"] + moved_s * fact["least_q"] + start_s
        return _beside(cut_s, beside_s, overlap), _beside(fact[f"{way}_block_s"], block_beside_s, overlap)

    def _tail(self, rates: Rates, byte_s: Array, fixed_s: Array) -> tuple[Array, Array]:
        """Seconds for each parameter, and besides, of a stage's exchange after the last micro-batch."""
        reduce_byte_s, reduce_s = rates.best_exchanges(self.groups, "all_reduce")
        each = np.where(self.z == 2, self.state.weight_bytes * byte_s, self.state.exchange_bytes * reduce_byte_s)
        return each * (self.z <= 2), np.where(self.z == 2, fixed_s, reduce_s) * (self.z <= 2)

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
        q = per_parameter * fact["least_q"]
        a = np.maximum(fact["least_a"], 1.0)
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


def _beside(busy_s: Array, beside_s: Array, overlap: float) -> Array:
    """A pass and the exchanges beside it, as `step` adds them."""
    return np.asarray(np.maximum(busy_s, beside_s) + (1 - overlap) * np.minimum(busy_s, beside_s))
