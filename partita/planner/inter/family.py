"""The down-sets that stage boundaries may be, and what crosses each.

All down-sets where there are at most `max_down_sets` (a chain has n + 1); elsewhere the prefixes of a few topological
orders, so that the result is the optimum over those boundaries only (`Family.complete` tells).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partita.errors import InputError
from partita.planner.inter.problem import Array, InterProblem
from partita.planner.placement.ideals import Ideals, all_ideals, distinct, first_orders, prefixes

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """`sets`: F x n, ascending in size, first the empty one, last all ops; `inside[I, J]`: I is a proper subset of J.
    `forward_bytes[I]`, `backward_bytes[I]`: what crosses boundary I for one row of the batch."""

    sets: Ideals
    inside: Mask
    forward_bytes: Array
    backward_bytes: Array
    complete: bool

    def __len__(self) -> int:
        return len(self.sets)

    def ops(self, low: int, high: int) -> tuple[int, ...]:
        """The ops of a stage between two down-sets."""
        return tuple(np.flatnonzero(self.sets[high] & ~self.sets[low]).tolist())


def family_of(problem: InterProblem) -> Family:
    """Raises `InputError` where the ops' precedence has a cycle."""
    before = problem.precedence()
    _check_order(problem.num_ops, before)
    sets = _chain(problem.num_ops, before)
    complete = sets is not None
    if sets is None:
        sets = all_ideals(problem.num_ops, before, problem.max_down_sets)
        complete = sets is not None
    if sets is None:
        count = max(1, problem.max_down_sets // (2 * problem.num_ops))
        sets = prefixes(first_orders(problem.num_ops, before, 0, 0)[:count], problem.num_ops)
    sets = distinct(sets)
    sets = sets[np.argsort(sets.sum(axis=1), kind="stable")]
    sizes = sets.sum(axis=1)
    common = sets.astype(np.float32) @ sets.T.astype(np.float32)
    inside = (common == sizes[:, None]) & (sizes[:, None] < sizes[None, :])
    forward, backward = _crossing(problem, sets)
    return Family(sets=sets, inside=inside, forward_bytes=forward, backward_bytes=backward, complete=complete)


def _chain(num_ops: int, before: list[tuple[int, int]]) -> Ideals | None:
    """The prefixes, where the ops' numbers are a chain: nothing else to enumerate."""
    if set(before) >= {(i, i + 1) for i in range(num_ops - 1)}:
        return np.asarray(np.tri(num_ops + 1, num_ops, -1, dtype=bool))
    return None


def _check_order(num_ops: int, before: list[tuple[int, int]]) -> None:
    missing = np.zeros(num_ops, dtype=np.int64)
    after: list[list[int]] = [[] for _ in range(num_ops)]
    for first, second in before:
        missing[second] += 1
        after[first].append(second)
    ready = np.flatnonzero(missing == 0).tolist()
    done = 0
    while ready:
        done += 1
        for other in after[ready.pop()]:
            missing[other] -= 1
            if missing[other] == 0:
                ready.append(other)
    if done < num_ops:
        stuck = np.flatnonzero(missing > 0).tolist()[:5]
        raise InputError(f"The ops' precedence must have no cycle, but ops {stuck} wait for each other.")


def _crossing(problem: InterProblem, sets: Ideals) -> tuple[Array, Array]:
    forward, backward = np.zeros(len(sets)), np.zeros(len(sets))
    for value in problem.values:
        if value.consumers:
            crosses = sets[:, value.producer] & ~sets[:, list(value.consumers)].all(axis=1)
            forward[crosses] += value.forward_bytes_per_row
            backward[crosses] += value.backward_bytes_per_row
    return forward, backward
