"""Orders, numbers of workers and shares on unequal machines: every kind of difference is a candidate, no twin is."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cluster.model import Cluster, Link, Machine, Process
from partita.planner.deals import MAX_COUNTS, MAX_ORDERS, MAX_SHARES, deals, process_orders, share_vectors
from partita.planner.layout import worker_layout


def cluster_of(speeds: list[float], cores: int = 2, processes: int = 1) -> Cluster:
    """A machine for each speed, with equal processes."""
    machines = tuple(
        Machine(name=f"m{i}", cores=tuple(range(cores * processes)), memory_bytes=1, flops_per_s_per_core=speed)
        for i, speed in enumerate(speeds)
    )
    link = Link(bytes_per_s=1e9)
    return Cluster(
        machines=machines,
        network=link,
        process_link=Link(bytes_per_s=1e10),
        processes=tuple(
            Process(rank=i * processes + k, machine=i, cores=tuple(range(k * cores, (k + 1) * cores)))
            for i in range(len(speeds))
            for k in range(processes)
        ),
    )


def test_equal_machines_have_one_order_and_one_deal() -> None:
    cluster = cluster_of([1.0] * 6, processes=2)
    assert process_orders(cluster) == (tuple(range(12)),)
    assert deals(cluster, 24, 1, ordered=True) == (tuple((rank, 2) for rank in range(12)),)


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=4), st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_the_orders_are_those_that_differ_by_kind(speeds: list[float], processes: int) -> None:
    cluster = cluster_of(speeds, processes=processes)
    wanted = {tuple(speeds[m] for m in order for _ in range(processes)) for order in permutations(range(len(speeds)))}
    found = process_orders(cluster)
    kinds = [tuple(speeds[rank // processes] for rank in order) for order in found]
    assert len(wanted) > MAX_ORDERS or (set(kinds) == wanted and len(kinds) == len(wanted))
    assert found[0] == tuple(range(len(speeds) * processes))
    assert all(sorted(order) == sorted(found[0]) for order in found)


def test_many_kinds_leave_few_orders_that_keep_kinds_together() -> None:
    found = process_orders(cluster_of([float(i) for i in range(1, 9)]))
    assert 2 <= len(found) <= MAX_ORDERS
    speeds = [tuple(rank for rank in order) for order in found]
    assert tuple(range(7, -1, -1)) in speeds  # fast ones first


def test_ranks_that_take_turns_on_machines_are_brought_together() -> None:
    cluster = cluster_of([1.0, 1.0], processes=2)
    turns = tuple(Process(rank=r, machine=r % 2, cores=p.cores) for r, p in enumerate(cluster.processes))
    cluster = Cluster(
        machines=cluster.machines, network=cluster.network, process_link=cluster.process_link, processes=turns
    )
    assert (0, 2, 1, 3) in process_orders(cluster)


@given(st.lists(st.sampled_from([1.0, 4.0]), min_size=1, max_size=3), st.integers(1, 3), st.data())
@settings(max_examples=100, deadline=None)
def test_all_divisions_between_kinds_are_dealt(speeds: list[float], cores: int, data: st.DataObject) -> None:
    cluster = cluster_of(speeds, cores)
    total = data.draw(st.integers(len(speeds), len(speeds) * cores))
    found = deals(cluster, total, 1, ordered=False)
    assert len(set(found)) == len(found) <= MAX_COUNTS + 1
    by_kind = {tuple(sum(n for rank, n in deal if speeds[rank] == kind) for kind in (1.0, 4.0)) for deal in found}
    wanted = {
        tuple(sum(n for n, speed in zip(counts, speeds, strict=True) if speed == kind) for kind in (1.0, 4.0))
        for counts in product(range(1, cores + 1), repeat=len(speeds))
        if sum(counts) == total
    }
    assert by_kind == wanted
    for deal in found:
        workers = worker_layout(cluster, total, 1, total, 1, deal=deal)
        owned = [(worker.process, worker.cores) for worker in workers]
        assert len(set(owned)) == len(owned)


def test_many_kinds_of_many_cores_are_divided_near_to_their_speeds() -> None:
    speeds = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    found = deals(cluster_of(speeds, cores=32), 56, 1, ordered=False)
    assert 1 < len(found) <= MAX_COUNTS + 1
    assert ((0, 2), (1, 4), (2, 6), (3, 8), (4, 10), (5, 12), (6, 14)) in found


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_shares_are_all_that_can_be_best(num_microbatches: int) -> None:
    cluster = cluster_of([1.0, 3.0], cores=1)
    workers = worker_layout(cluster, 2, 1, 2, 1)
    found = share_vectors(cluster, workers, 2, 8, num_microbatches)
    rows = 8 // num_microbatches
    assert set(found) == {(num_microbatches * k, 8 - num_microbatches * k) for k in range(1, rows)} | {(4, 4)}
    assert found[0] == (4, 4) and found[1] == (2, 6)
    assert len(share_vectors(cluster, workers, 2, 1000, 1)) <= MAX_SHARES + 1


def test_equal_columns_share_evenly() -> None:
    cluster = cluster_of([1.0, 3.0])
    assert share_vectors(cluster, worker_layout(cluster, 2, 2, 4, 1), 2, 9, 1) == ((5, 4),)
    assert share_vectors(cluster, worker_layout(cluster, 2, 2, 4, 1), 2, 0, 1) == ((),)
