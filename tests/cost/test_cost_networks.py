"""Collectives along mesh axes of described fabrics, against the formulas written out and against each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.cluster import Cluster
from partita.cluster.model import Link
from partita.cluster.presets import GPU_KINDS
from partita.cost.calibration import GENERATIONS, Calibration, Constants
from partita.cost.model import CollectiveKind
from partita.cost.networks import Fabric, NodeGroup, channel, edge_s
from partita.errors import ClusterError

PLAIN = Calibration(generations={name: Constants(link=1.0, network=1.0) for name in GENERATIONS})
KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")


def _fabric(num_machines: int = 4, gpus: int = 8, kind: str = "A100-80") -> Fabric:
    return Fabric(groups=(NodeGroup.of(GPU_KINDS[kind], num_machines * gpus, gpus),))


def test_a_ring_inside_a_machine() -> None:
    one = channel(_fabric(), PLAIN, num_ranks=8, stride=1)
    assert (one.ranks_per_machine, one.num_machines) == (8, 1)
    assert one.collective_s("all_gather", 8e9) == pytest.approx(7 / 8 * 8e9 / 300e9 + 7 * 5e-6)


def test_strided_groups_share_the_network() -> None:
    wide = channel(_fabric(), PLAIN, num_ranks=4, stride=8)  # one rank in each machine, eight groups at once
    assert (wide.ranks_per_machine, wide.num_machines) == (1, 4)
    assert wide.ring_bytes_per_s == pytest.approx(200e9 / 8)
    whole = channel(_fabric(), PLAIN, num_ranks=32, stride=1)
    assert whole.ring_bytes_per_s == pytest.approx(200e9)  # all adapters, still below NVLink


def test_many_machines_prefer_the_tree() -> None:
    wide = channel(_fabric(num_machines=512), PLAIN, num_ranks=512, stride=8)
    small = wide.collective_s("all_reduce", 1e3)
    assert small < 2 * wide.collective_s("reduce_scatter", 1e3) / 10


@given(
    num_ranks=st.integers(1, 64),
    stride=st.sampled_from([1, 2, 4, 8, 16]),
    num_bytes=st.floats(0, 1e11),
    kind=st.sampled_from(KINDS),
)
def test_times_grow_with_bytes(num_ranks: int, stride: int, num_bytes: float, kind: CollectiveKind) -> None:
    one = channel(_fabric(num_machines=128), PLAIN, num_ranks=num_ranks, stride=stride)
    assert one.num_machines * one.ranks_per_machine >= num_ranks
    time_s = one.collective_s(kind, num_bytes)
    assert time_s >= 0 and one.collective_s(kind, 2 * num_bytes) >= time_s
    assert (time_s == 0) == (num_ranks == 1)


def test_the_slowest_kind_decides() -> None:
    fast, slow = (NodeGroup.of(GPU_KINDS[name], 8, 8) for name in ("A100-80", "T4"))
    mixed = channel(Fabric(groups=(fast, slow)), PLAIN, num_ranks=16, stride=1)
    alone = channel(Fabric(groups=(slow, slow)), PLAIN, num_ranks=16, stride=1)
    assert mixed.ring_bytes_per_s == alone.ring_bytes_per_s
    assert (mixed.num_machines, mixed.ranks_per_machine) == (2, 8)


def test_sending_stays_inside_or_goes_across() -> None:
    fabric = _fabric()
    assert edge_s(fabric, PLAIN, 0, 2, 2, 3e9) == pytest.approx(5e-6 + 3e9 / 300e9)
    assert edge_s(fabric, PLAIN, 0, 8, 8, 1e9) == pytest.approx(1.5e-5 + 1e9 / 25e9)


def test_fabric_of_a_preset() -> None:
    fabric = Fabric.of_cluster(Cluster.preset("4x8xH100"))
    assert len(fabric.groups) == 1 and fabric.num_gpus == 32 and fabric.groups[0].kind.gpu.name == "H100"
    assert fabric.place_of(17) == (fabric.groups[0], 2)
    with pytest.raises(ClusterError, match="must have GPUs"):
        Fabric.of_cluster(Cluster.preset("2x1xcpu-4"))
    with pytest.raises(ClusterError, match="must be on the fabric"):
        channel(fabric, PLAIN, num_ranks=2, stride=1, first=64)


def test_a_rack_has_the_networks_of_its_trays() -> None:
    rack = NodeGroup.of(GPU_KINDS["GB200"], 144)
    assert (rack.num_machines, rack.gpus_per_machine) == (2, 72)
    assert rack.network == Link(bytes_per_s=18 * 1600e9 / 8, latency_s=1.5e-5)
