"""Conversions between placements: which exchange or local op each takes, and what it costs relative to the others.

The figures only rank alternatives inside one graph (a plan's time comes from the cost model): an exchange takes a
latency plus its bytes at the speed of a link between workers; local work takes its bytes at the speed of memory.
"""

from __future__ import annotations

import math

from partita.sharding.placement import Extremum, Partial, Placement, Replicate, Shard, Windows, WindowSums

LATENCY_S = 3e-5
LINK_BYTES_PER_S = 2e9
MEMORY_BYTES_PER_S = 1e10
FLOPS_PER_S = 5e10

EXCHANGES = frozenset({
    "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "halo_exchange", "halo_sum", "all_extreme",
})  # fmt: skip
STEPPING_STONES = frozenset({"gather_slice", "halo_gather", "halo_resum", "extreme_slice"})  # take two conversions


def conversion_kind(source: Placement, target: Placement) -> str:
    """The one step that turns ``source`` into ``target``; ``"gather_slice"`` takes two (the same dim
    cut elsewhere, or cuts of runs).

    Local: ``"none"``, ``"renamed"`` (windows without a halo), ``"slice"`` (R -> S), ``"keep"`` (R -> P: coordinate 0
    keeps it, the others hold zeros), ``"pad"`` (S -> P: zeros around the own rows), ``"window"`` (R -> W: slice and
    pad), ``"unwindow"`` (window sums -> P: crop and zeros around it). ``"halo_gather"`` goes to windows over the whole
    value, ``"halo_resum"`` from window sums over the shards that the workers own. ``"all_extreme"`` gathers every
    worker's entries and takes the largest (smallest), ``"extreme_slice"`` goes on from there. Windows themselves are
    not converted: the value that they were made of is.
    """
    if source == target:
        return "none"
    if isinstance(source, Windows) or isinstance(target, (WindowSums, Extremum)):
        return "never"
    if isinstance(source, Extremum):
        return "all_extreme" if isinstance(target, Replicate) else "extreme_slice"
    if isinstance(source, WindowSums):
        if isinstance(target, Partial):
            return "unwindow"
        plain = isinstance(target, Shard) and target.dim == source.dim and target.outer == 1
        return "halo_sum" if plain else "halo_resum"
    if isinstance(target, Windows):
        if isinstance(source, Shard) and source.dim == target.dim and source.outer == 1:
            return "renamed" if target.is_cut_like(source) else "halo_exchange"
        return "window" if isinstance(source, Replicate) else "halo_gather"
    if isinstance(source, Replicate):
        return "slice" if isinstance(target, Shard) else "keep"
    if isinstance(source, Partial):
        return "all_reduce" if isinstance(target, Replicate) else "reduce_scatter"
    if isinstance(target, Replicate):
        return "all_gather"
    if isinstance(target, Partial):
        return "pad"
    plain = source.dim != target.dim and source.outer == 1 and target.outer == 1
    return "all_to_all" if plain else "gather_slice"


def conversion_cost_s(source: Placement, target: Placement, num_bytes: int, size: int) -> float:
    """Relative cost in seconds for a whole value of ``num_bytes`` over ``size`` workers (ring algorithms)."""
    share = (size - 1) / size
    wire = num_bytes * share / LINK_BYTES_PER_S
    local = num_bytes / MEMORY_BYTES_PER_S
    kind = conversion_kind(source, target)
    halo = LATENCY_S + _halo_share(source, target) * num_bytes / LINK_BYTES_PER_S
    return {
        "none": 0.0,
        "renamed": 0.0,
        "slice": local / size,
        "keep": local,
        # A padded shard is a summand as large as the whole, which mostly has to be reduced again later.
        "pad": LATENCY_S + 2 * wire + local,
        "all_reduce": LATENCY_S + 2 * wire,
        "reduce_scatter": LATENCY_S + wire,
        # What follows a gather runs replicated or has to be cut again.
        "all_gather": 1.5 * LATENCY_S + wire,
        "all_to_all": LATENCY_S + wire / size,
        "gather_slice": 2 * LATENCY_S + wire + local,
        "window": local / size,
        "unwindow": LATENCY_S + 2 * wire + local,  # as "pad"
        "halo_exchange": halo + local / size,
        "halo_sum": halo + local / size,
        "halo_gather": 2.5 * LATENCY_S + 2 * wire + local,
        "halo_resum": halo + 2 * LATENCY_S + wire + local,
        "all_extreme": 1.5 * LATENCY_S + size * (wire + local),
        "extreme_slice": 2 * LATENCY_S + size * (wire + local),
        "never": math.inf,
    }[kind]


def _halo_share(source: Placement, target: Placement) -> float:
    """The largest halo of a worker (rows of others in its window), as a share of the value."""
    window, shard = (source, target) if isinstance(source, WindowSums) else (target, source)
    if isinstance(window, WindowSums) and conversion_kind(source, target) == "halo_resum":
        shard = window.owned
    if not isinstance(window, (Windows, WindowSums)) or not isinstance(shard, Shard):
        return 0.0
    extent = sum(shard.sizes)
    halos = []
    for coordinate, (start, end) in enumerate(zip(window.starts, window.ends, strict=True)):
        own = shard.offset(coordinate)
        inside = max(min(end, extent) - max(start, 0), 0)
        overlap = min(end, own + shard.sizes[coordinate]) - max(start, own)
        halos.append(inside - max(overlap, 0))
    return max(halos) / extent


def is_exchange(source: Placement, target: Placement) -> bool:
    kind = conversion_kind(source, target)
    return kind in EXCHANGES or kind in STEPPING_STONES
