"""Which ways to run the layers of a stage can be best: the frontier of (tau, w, a, b) sums.

Time and memory of a stage are non-negative combinations of the sums over its layers of tau (with the bytes of its edges
over the bandwidth), w, a and b, whatever d and s are. So only choices that no other choice beats in all four sums
matter, and the frontier of a set is that of one layer less, plus each way of that layer.

A frontier of more than `limit` points is thinned, in one of two manners: `kept` points are real choices (solutions stay
valid, optima may be lost); `optimistic` ones are the least of each sum over a cluster of points (bounds stay valid).
Sums are cut at the memory limit: a choice with a + b above it fits nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partita.planner.placement.groups import Array
from partita.planner.placement.piper_problem import PiperProblem

TAU, WEIGHT, PER_MICROBATCH, FIXED = range(4)


@dataclass
class Thinning:
    """How many points a frontier may have, in which manner it is thinned, and whether one ever was."""

    limit: int
    optimistic: bool = False
    happened: bool = False


def way_sums(problem: PiperProblem, layer: int, degree: int) -> Array | None:
    """One row (tau, w, a, b) for each way of a layer, None where it has none of this degree."""
    ways = problem.layers[layer].ways.get(degree)
    if ways is None:
        return None
    return np.array(
        [(w.time_s, w.weight_bytes, w.memory_per_microbatch_bytes, w.memory_fixed_bytes) for w in ways],
        dtype=np.float64,
    )


def add_layer(points: Array, rows: Array, limit_bytes: float, thinning: Thinning) -> Array:
    """The frontier of a set and one layer more."""
    sums = (points[:, None, :] + rows[None, :, :]).reshape(-1, 4)
    sums = sums[sums[:, PER_MICROBATCH] + sums[:, FIXED] <= limit_bytes]
    return thinned(frontier(sums), thinning)


def frontier(points: Array) -> Array:
    """The points that no other is at most equal to in every column, ascending in the first; equal ones once."""
    if len(points) <= 1:
        return points
    points = points[np.lexsort(points.T[::-1])]
    if len(points) > 1024:
        return _frontier_in_blocks(points)
    return points[~_beaten(points)]


def _beaten(points: Array) -> npt.NDArray[np.bool_]:
    """Of points in lexical order: whether one before (the only ones that can) is at most equal in every column."""
    below = np.ones((len(points), len(points)), dtype=bool)
    for column in points.T[1:]:
        below &= column[:, None] <= column[None, :]
    return np.asarray(np.triu(below, 1).any(axis=0))


def _frontier_in_blocks(points: Array) -> Array:
    kept = points[:0]
    for begin in range(0, len(points), 512):
        block = points[begin : begin + 512]
        block = block[~_beaten(block)]
        if len(kept):
            beaten = np.ones((len(kept), len(block)), dtype=bool)
            for old, new in zip(kept.T[1:], block.T[1:], strict=True):
                beaten &= old[:, None] <= new[None, :]
            block = block[~beaten.any(axis=0)]
        kept = np.concatenate([kept, block])
    return kept


def thinned(points: Array, thinning: Thinning) -> Array:
    """At most `thinning.limit` points; see the module's docstring."""
    if len(points) <= thinning.limit:
        return points
    thinning.happened = True
    begins = np.linspace(0, len(points), thinning.limit, endpoint=False).astype(
        np.int64
    )  # neighbours are alike in time
    if thinning.optimistic:
        return frontier(np.minimum.reduceat(points, begins, axis=0))
    memory = points[:, PER_MICROBATCH] / (points[:, PER_MICROBATCH].max() or 1.0)
    memory = memory + points[:, FIXED] / (points[:, FIXED].max() or 1.0)
    cluster = np.searchsorted(begins, np.arange(len(points)), side="right")
    order = np.lexsort((memory, cluster))
    thriftiest: Array = points[order[begins]]
    return thriftiest
