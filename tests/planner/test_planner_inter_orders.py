"""Candidate orders: permutations, clusters together, kinds together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from partita.planner.inter import InterDevice, Links
from partita.planner.inter.orders import candidate_orders, clustered


@given(st.integers(1, 9), st.integers(0, 1000), st.integers(1, 20))
def test_every_order_holds_every_device_once(count: int, seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    devices = [InterDevice(name=str(g), kind=str(rng.integers(3)), memory_bytes=rng.integers(9)) for g in range(count)]
    links = Links(latency_s=rng.random((count, count)), bytes_per_s=1 + rng.random((count, count)))
    orders = candidate_orders(devices, links, {"0": 1.0, "1": 2.0}, limit=limit)
    assert 1 <= len(orders) <= limit and len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(count)) for order in orders)


@given(st.permutations(range(8)))
def test_machines_stay_together(place: list[int]) -> None:
    """Two fast links and a slow one: devices of one machine are neighbours whatever their numbers."""
    machine = np.array([g // 4 for g in place])
    node = np.array([g // 2 for g in place])
    bandwidth = 1.0 + 10.0 * (machine[:, None] == machine) + 100.0 * (node[:, None] == node)
    order = clustered(range(8), Links(latency_s=np.zeros((8, 8)), bytes_per_s=bandwidth))
    for group in (machine, node):
        changes = sum(group[a] != group[b] for a, b in pairwise(order))
        assert changes == len(set(group.tolist())) - 1


def test_fast_kinds_come_first_and_last() -> None:
    devices = [InterDevice(name=str(g), kind="slow" if g % 2 else "fast") for g in range(4)]
    orders = candidate_orders(devices, Links.uniform(4, 0.0, 1.0), {"fast": 2.0, "slow": 1.0})
    kinds = {"".join(devices[g].kind[0] for g in order) for order in orders}
    assert {"ffss", "ssff"} <= kinds
