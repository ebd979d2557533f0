"""Workers on processes and cores."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cluster.model import Cluster, Link, Machine, Process
from partita.errors import InfeasibleError
from partita.planner.layout import core_chunks, oversubscribed, worker_layout


def cluster_of(core_counts: list[int]) -> Cluster:
    machines = tuple(Machine(name=str(i), cores=tuple(range(n)), memory_bytes=1) for i, n in enumerate(core_counts))
    processes = tuple(Process(rank=i, machine=i, cores=tuple(range(n))) for i, n in enumerate(core_counts))
    return Cluster(
        machines=machines, processes=processes, network=Link(bytes_per_s=1e9), process_link=Link(bytes_per_s=1e9)
    )


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_every_coordinate_once_and_cores_shared_only_if_they_must(
    counts: list[int], data: int, pipeline: int, threads: int
) -> None:
    cluster = cluster_of(counts)
    if data * pipeline < len(counts):
        with pytest.raises(InfeasibleError, match="Every process"):
            worker_layout(cluster, data, pipeline, data * pipeline, threads)
        return
    workers = worker_layout(cluster, data, pipeline, data * pipeline, threads)
    assert {(w.stage, w.data) for w in workers} == {(s, d) for s in range(pipeline) for d in range(data)}
    assert [w.index for w in workers] == list(range(data * pipeline))
    assert {w.process for w in workers} == set(range(len(counts)))
    assert all(len(w.cores) == threads and set(w.cores) <= set(range(counts[w.process])) for w in workers)
    owned = [(w.process, core) for w in workers for core in w.cores]
    if not oversubscribed(cluster, len(workers), threads):
        assert len(set(owned)) == len(owned)


def test_stages_land_in_different_processes() -> None:
    workers = worker_layout(cluster_of([2, 2]), 2, 2, 4, 1)
    assert [(w.stage, w.process) for w in workers] == [(0, 0), (0, 0), (1, 1), (1, 1)]


def test_workers_stay_inside_a_numa_node() -> None:
    machine = Machine(name="m", cores=tuple(range(6)), memory_bytes=1, numa_nodes=((0, 2, 4), (1, 3, 5)))
    process = Process(rank=0, machine=0, cores=tuple(range(6)))
    assert core_chunks(process, machine, 2) == [(0, 2), (1, 3), (4, 5)]


def test_too_many_threads_names_the_change() -> None:
    with pytest.raises(InfeasibleError, match="Set threads_per_worker=2"):
        worker_layout(cluster_of([2]), 1, 1, 1, 3)
