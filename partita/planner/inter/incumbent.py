"""First pipelines, found fast: stages on equally many devices, the largest as short as can be, then the least sum.

Two shortest paths over down-sets for each stage: largest[q, I] = min over J of max(t_q[I, J], largest[q + 1, J]), and
with stages of at most the least largest, the least sum. What they find is a first upper bound for the search.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np

from partita.planner.inter.labels import Array
from partita.planner.inter.pipeline import Choice, Setting
from partita.planner.inter.schedule_time import chunk_peaks
from partita.planner.inter.tables import Tables


@cache
def peaks_of(group: int, groups: int, num_microbatches: int, chunks: int) -> list[tuple[int, ...]]:
    """`chunk_peaks`, counted once."""
    return chunk_peaks(group, groups, num_microbatches, chunks)


def fits_memory(tables: Tables, setting: Setting, choices: tuple[Choice, ...], group: int | None = None) -> bool:
    """Whether the chunks so far fit every group's devices, or those of one group."""
    groups, m = setting.num_stages, setting.num_microbatches
    assert groups is not None
    for s in range(min(groups, len(choices))) if group is None else (group,):
        own = choices[s::groups]
        devices = setting.order[own[0].place : own[0].place + own[0].num_devices]
        options = tables.of(devices, m)
        for g, device in enumerate(devices):
            limit = tables.problem.devices[device].memory_bytes
            static = sum(float(options[c.option].static_bytes[g][c.low, c.high]) for c in own)
            saved = [float(options[c.option].saved_bytes[g][c.low, c.high]) for c in own]
            peak = max(
                sum(n * size for n, size in zip(held, saved, strict=False))
                for held in peaks_of(s, groups, m, setting.num_chunks)
            )
            if static + peak > limit * (1 + 1e-9):
                return False
    return True


def even_pipelines(tables: Tables, setting: Setting, groups: int) -> Iterator[tuple[Choice, ...]]:
    """At most one pipeline of so many groups. For interleaved stages memory is split evenly over the chunks of a group
    to find it, and tested as a whole."""
    m, chunks = setting.num_microbatches, setting.num_chunks
    d, odd = divmod(setting.num_devices, groups)
    if odd or d not in tables.problem.stage_sizes or groups * chunks > tables.problem.num_ops:
        return
    meshes = [setting.order[s * d : (s + 1) * d] for s in range(groups)]
    for share in (1, chunks) if chunks > 1 else (1,):
        passes = [tables.passes(mesh, m, _in_flight(setting, s, groups, share)) for s, mesh in enumerate(meshes)]
        costs = [least for least, _ in passes]
        cuts = _bottleneck(costs, groups * chunks)
        if cuts is None:
            continue
        choices = tuple(
            Choice(low, high, (q % groups) * d, d, int(passes[q % groups][1][low, high]))
            for q, (low, high) in enumerate(pairwise(cuts))
        )
        if chunks == 1 or fits_memory(tables, setting, choices):
            yield choices
            return


def _in_flight(setting: Setting, group: int, groups: int, share: int) -> int:
    if setting.num_chunks == 1:
        return setting.group_order(groups - group).in_flight
    most = max(sum(held) for held in peaks_of(group, groups, setting.num_microbatches, setting.num_chunks))
    return -(-most * share // setting.num_chunks)


def _bottleneck(costs: list[Array], num_chunks: int) -> list[int] | None:
    """Down-sets of the chain that minimises (largest, sum) in this order; None where there is none."""
    size = len(costs[0])
    largest = np.full(size, np.inf)
    largest[-1] = 0.0
    for q in reversed(range(num_chunks)):
        largest = np.maximum(costs[q % len(costs)], largest[None, :]).min(axis=1)
    bound = largest[0] * (1 + 1e-9)
    if not np.isfinite(bound):
        return None
    total = np.full(size, np.inf)
    total[-1] = 0.0
    following = []
    for q in reversed(range(num_chunks)):
        sums = np.where(costs[q % len(costs)] <= bound, costs[q % len(costs)], np.inf) + total[None, :]
        following.append(sums.argmin(axis=1))
        total = sums.min(axis=1)
    cuts = [0]
    for step in reversed(following):
        cuts.append(int(step[cuts[-1]]))
    return cuts
