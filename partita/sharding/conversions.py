"""Conversions between placements: which exchange or local op each takes, and what it costs relative to the others.

The figures only rank alternatives inside one graph (a plan's time comes from the cost model): an exchange takes a
latency plus its bytes at the speed of a link between workers; local work takes its bytes at the speed of memory.
"""

from __future__ import annotations

from partita.sharding.placement import Partial, Placement, Replicate, Shard

LATENCY_S = 3e-5
LINK_BYTES_PER_S = 2e9
MEMORY_BYTES_PER_S = 1e10
FLOPS_PER_S = 5e10

EXCHANGES = frozenset({"all_reduce", "reduce_scatter", "all_gather", "all_to_all"})


def conversion_kind(source: Placement, target: Placement) -> str:
    """The one step that turns ``source`` into ``target``; ``"gather_slice"`` takes two (the same dim
    cut elsewhere, or cuts of runs).

    Local: ``"none"``, ``"slice"`` (R -> S), ``"keep"`` (R -> P: coordinate 0 keeps it, the others hold zeros),
    ``"pad"``
    (S -> P: zeros around the own rows).
    """
    if source == target:
        return "none"
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
    return {
        "none": 0.0,
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
    }[kind]


def is_exchange(source: Placement, target: Placement) -> bool:
    kind = conversion_kind(source, target)
    return kind in EXCHANGES or kind == "gather_slice"
