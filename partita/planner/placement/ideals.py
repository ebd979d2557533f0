"""Ideals of the order graph: sets of groups that hold, with a group, all that come before it.

A pipeline of devices is a chain of ideals, each device holding the difference of two neighbours (Tarnawski et al. 2020,
section 5.1.1). All of them are listed where there are few; elsewhere the prefixes of many topological orders stand for
them.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Ideals = npt.NDArray[np.bool_]  # one row for each ideal, one column for each group


def predecessors(num_groups: int, before: Sequence[tuple[int, int]]) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in range(num_groups)]
    for first, second in before:
        result[second].append(first)
    return result


def all_ideals(num_groups: int, before: Sequence[tuple[int, int]], limit: int) -> Ideals | None:
    """Every ideal, or None where there are more than `limit`.

    Groups come in a topological order; each either stays out of an ideal of those before it, or joins if its
    predecessors are in. So every ideal arises once.
    """
    before_of = predecessors(num_groups, before)
    rows = np.zeros((max(1024, limit // 8), num_groups), dtype=bool)
    used = 1
    for group in order_by(num_groups, before, lambda _group, step: -step):
        chosen = np.flatnonzero(rows[:used, before_of[group]].all(axis=1))
        if used + len(chosen) > limit:
            return None
        while used + len(chosen) > len(rows):
            rows = np.concatenate([rows, np.zeros_like(rows)])
        rows[used : used + len(chosen)] = rows[chosen]
        rows[used : used + len(chosen), group] = True
        used += len(chosen)
    return rows[:used].copy()


def order_by(num_groups: int, before: Sequence[tuple[int, int]], key: Callable[[int, int], float]) -> list[int]:
    """A topological order that takes, of the groups whose predecessors are done, the one of least key(group, step),
    `step` being the time when it became available."""
    after: list[list[int]] = [[] for _ in range(num_groups)]
    missing = [0] * num_groups
    for first, second in before:
        after[first].append(second)
        missing[second] += 1
    ready = [(key(group, 0), group) for group in range(num_groups) if missing[group] == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        group = heapq.heappop(ready)[1]
        order.append(group)
        for other in after[group]:
            missing[other] -= 1
            if missing[other] == 0:
                heapq.heappush(ready, (key(other, len(order)), other))
    assert len(order) == num_groups, "the order graph has a cycle"
    return order


def first_orders(num_groups: int, before: Sequence[tuple[int, int]], random_count: int, seed: int) -> list[list[int]]:
    """Orders that differ: depth first and breadth first, from the start and from the end, and random ones."""
    turned = [(second, first) for first, second in before]
    keys: list[Callable[[int, int], float]] = [lambda _group, step: -step, lambda _group, step: step]
    orders = [order_by(num_groups, before, key) for key in keys]
    orders += [order_by(num_groups, turned, key)[::-1] for key in keys]
    source = random.Random(seed)
    for _ in range(random_count):
        rank = [source.random() for _ in range(num_groups)]
        orders.append(order_by(num_groups, before, _ranked(rank, 1.0)))
    return orders


def _ranked(rank: Sequence[float], depth: float) -> Callable[[int, int], float]:
    """By rank, but what became available later is earlier, by `depth` for each step."""
    return lambda group, step: rank[group] - depth * step


def orders_near(
    num_groups: int, before: Sequence[tuple[int, int]], stage: Sequence[int], count: int, source: random.Random
) -> list[list[int]]:
    """Random orders that follow the stages of a pipeline, more or less."""
    orders = []
    for i in range(count):
        spread = 0.1 if i == 0 else source.choice((0.3, 0.6, 1.0, 1.5))
        depth = source.choice((0.0, 0.01, 1.0))  # whether a branch is followed before the next begins
        rank = [place + spread * (source.random() - 0.5) for place in stage]
        orders.append(order_by(num_groups, before, _ranked(rank, depth / 99)))
    return orders


def prefixes(orders: Sequence[Sequence[int]], num_groups: int, step: int = 1) -> Ideals:
    """The prefixes of all orders, without repetition: of `step` lengths each order has one, and all have 0 and all."""
    rows = []
    for i, order in enumerate(orders):
        place = np.empty(num_groups, dtype=np.int64)
        place[list(order)] = np.arange(num_groups)
        lengths = np.unique(np.append([0, num_groups], np.arange(i % step, num_groups, step)))
        rows.append(place[None, :] < lengths[:, None])
    return distinct(np.concatenate(rows))


def stage_ends(stages: Sequence[int]) -> Ideals:
    """The ideals of a pipeline: what its first stages hold."""
    stage = np.array(stages)
    return np.asarray(stage[None, :] <= np.unique(stage)[:, None])


def distinct(ideals: Ideals) -> Ideals:
    """Each row once."""
    if ideals.shape[1] == 0:
        return ideals[:1]
    packed = np.ascontiguousarray(np.packbits(ideals, axis=1))
    _, first = np.unique(packed.view(np.dtype((np.void, packed.shape[1]))).ravel(), return_index=True)
    return np.asarray(ideals[np.sort(first)])
