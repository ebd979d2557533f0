"""The ways of a stage's layers of least time whose memory fits: a multiple-choice knapsack, solved by its frontier.

Given degrees d, t and m = ceil(s / d): minimise the sum of (tau + bytes) so that the sum of a m + b is at most the
limit.
States are the (time, memory) sums of the layers so far that no other beats in both; layers come in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.planner.placement.groups import Array
from partita.planner.placement.piper_problem import PiperProblem, Stage

_MAX_STATES = 20_000


def best_ways(problem: PiperProblem, layers: Sequence[int], data_degree: int, tensor_degree: int, behind: int) -> Stage:
    """The stage with its best ways; `behind` is s, the sum of data degrees of this and all later stages.

    Where nothing fits, it is the stage of least memory, which pricing then refuses.
    """
    in_flight = -(-behind // data_degree)
    states = np.zeros((1, 2))
    steps: list[tuple[np.ndarray[tuple[int], np.dtype[np.int64]], int]] = []
    inside = set(layers)
    for layer in layers:
        rows = _rows(problem, layer, data_degree, tensor_degree, in_flight, inside)
        sums = (states[:, None, :] + rows[None, :, :]).reshape(-1, 2)
        order = np.lexsort((sums[:, 1], sums[:, 0]))
        memory = sums[order, 1]
        better = np.append(True, memory[1:] < np.minimum.accumulate(memory)[:-1])
        kept = order[better & ((memory <= problem.limit_bytes) | (memory == memory.min()))]
        if len(kept) > _MAX_STATES:
            kept = kept[np.linspace(0, len(kept) - 1, _MAX_STATES).round().astype(np.int64)]
        states = sums[kept]
        steps.append((kept, len(rows)))
    place = 0  # the first state is the fastest
    ways = []
    for kept, num_ways in reversed(steps):
        place, way = divmod(int(kept[place]), num_ways)
        ways.append(way)
    return Stage(layers=tuple(layers), data_degree=data_degree, tensor_degree=tensor_degree, ways=tuple(reversed(ways)))


def _rows(
    problem: PiperProblem, layer: int, data_degree: int, tensor_degree: int, in_flight: int, inside: set[int]
) -> Array:
    """(time, memory) of each way in this stage."""
    rows = []
    for way in problem.layers[layer].ways[tensor_degree]:
        moved_bytes = 4 * (data_degree - 1) * way.weight_bytes / problem.num_microbatches
        for tail, head, size in problem.edges:
            if head == layer and tail not in inside:
                moved_bytes += 2 * (size + way.sync_in_bytes[tail])
            if tail == layer and head not in inside:
                moved_bytes += 2 * (size + way.sync_out_bytes[head])
        time_s = (way.time_s + moved_bytes / problem.bandwidth_bytes_per_s) / data_degree
        rows.append((time_s, way.memory_per_microbatch_bytes * in_flight + way.memory_fixed_bytes))
    return np.array(rows)
