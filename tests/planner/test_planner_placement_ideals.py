"""Ideals against all subsets; orders are topological."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from partita.planner.placement.ideals import all_ideals, first_orders, orders_near, prefixes


def random_order(seed: int) -> tuple[int, list[tuple[int, int]]]:
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    rank = draw.sample(range(count), count)
    pairs = itertools.combinations(range(count), 2)
    return count, [(rank[a], rank[b]) for a, b in pairs if draw.random() < 0.3]


@pytest.mark.parametrize("seed", range(30))
def test_all_ideals_are_all_closed_subsets(seed: int) -> None:
    count, before = random_order(seed)
    closed = {
        subset
        for subset in itertools.product((False, True), repeat=count)
        if all(subset[first] or not subset[second] for first, second in before)
    }
    ideals = all_ideals(count, before, 1000)
    assert ideals is not None
    assert len(ideals) == len(closed)
    assert {tuple(row.tolist()) for row in ideals} == closed
    assert all_ideals(count, before, len(closed) - 1) is None


@pytest.mark.parametrize("seed", range(30))
def test_prefixes_of_orders_are_ideals(seed: int) -> None:
    count, before = random_order(seed)
    orders = first_orders(count, before, 3, seed)
    orders += orders_near(count, before, list(range(count)), 3, random.Random(seed))
    for order in orders:
        assert sorted(order) == list(range(count))
        assert all(order.index(first) < order.index(second) for first, second in before)
    family = prefixes(orders, count)
    assert len(np.unique(family, axis=0)) == len(family)
    assert all(not row[second] or row[first] for row in family for first, second in before)
