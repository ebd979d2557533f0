"""Fabrics of many GPUs, and collectives along a mesh axis of them.

A group of n ranks lies `stride` ranks apart. With g GPUs per machine, ``k = min(n, max(1, g // stride))`` of its ranks
share a machine, and ``h = n / k`` machines take part. All ``g / k`` groups of a machine work at the same time, so one
group has ``k / g`` of the machine's network N. With L the bandwidth of a GPU's links in the machine, a1 and a2 the
latencies in and between machines, and B the bytes of the whole tensor:

    ring rate         r = min(link L, network N k / g) across machines, link L inside one
    reduce_scatter    (n-1)/n B / r + (n - h) a1 + (h - 1) a2     (all_gather the same)
    all_reduce ring   twice that
    all_reduce tree   2 B / r + 2 (k - 1) a1 + 2 ceil(log2 h) a2  (double binary trees, pipelined)
    all_to_all        B/n leaves a rank: (k-1)/n of it in the machine, the rest over its share N / g of the network
    send              B / min(link L or network N / g) + a

An all-reduce takes the better of ring and tree. Where kinds of machines are mixed, the slowest link on the way decides.
Sources: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005,
section 3; Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from partita.cluster.model import Cluster, Link
from partita.cluster.presets import GpuKind, find_kind
from partita.cost.calibration import Calibration, Constants
from partita.cost.model import CollectiveKind
from partita.errors import ClusterError

ADAPTER_BYTES_PER_S = 25e9  # one 200 Gbit/s adapter


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Equal machines that follow each other in rank order. `network` is one machine's connection to the others."""

    kind: GpuKind
    num_machines: int
    gpus_per_machine: int
    link: Link  # between the GPUs of one machine, per GPU and direction
    network: Link

    @property
    def num_gpus(self) -> int:
        return self.num_machines * self.gpus_per_machine

    @staticmethod
    def of(kind: GpuKind, num_gpus: int, gpus_per_machine: int | None = None) -> NodeGroup:
        """`num_gpus` of `kind` in its published machines (a last one may be part empty)."""
        size = gpus_per_machine or kind.gpus_per_machine
        share = size / kind.gpus_per_network
        network = Link(bytes_per_s=kind.network.bytes_per_s * max(share, 1.0), latency_s=kind.network.latency_s)
        used = min(size, num_gpus)
        return NodeGroup(
            kind=kind, num_machines=-(-num_gpus // used), gpus_per_machine=used, link=kind.link, network=network
        )


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """All GPUs of a job in rank order: groups of equal machines, one after the other.

    Example:
        >>> from partita.cluster.presets import GPU_KINDS
        >>> Fabric(groups=(NodeGroup.of(GPU_KINDS["H100"], 64),)).num_gpus
        64
    """

    groups: tuple[NodeGroup, ...]

    @property
    def num_gpus(self) -> int:
        return sum(group.num_gpus for group in self.groups)

    def groups_of(self, first: int, last: int) -> list[NodeGroup]:
        """The groups that ranks `first` to `last` (inclusive) live in."""
        found, start = [], 0
        for group in self.groups:
            if start <= last and first < start + group.num_gpus:
                found.append(group)
            start += group.num_gpus
        return found

    def place_of(self, rank: int) -> tuple[NodeGroup, int]:
        """The group that `rank` lives in and the number of its machine, counted over all groups."""
        machines = 0
        for group in self.groups:
            if rank < group.num_gpus:
                return group, machines + rank // group.gpus_per_machine
            rank -= group.num_gpus
            machines += group.num_machines
        raise ClusterError(f"ranks must be below {self.num_gpus}, but got one {rank} above the last.")

    @staticmethod
    def of_cluster(cluster: Cluster) -> Fabric:
        """The GPUs of a described cluster; equal machines that follow each other become one group.

        Raises:
            ClusterError: a machine has no GPU, or one whose kind is unknown.
        """
        groups: list[NodeGroup] = []
        for machine in cluster.machines:
            kind = find_kind(machine.gpus[0].name) if machine.gpus else None
            if kind is None:
                raise ClusterError(
                    f"every machine must have GPUs of a known kind (partita.cluster.presets), but {machine.name!r} has "
                    f"{[gpu.name for gpu in machine.gpus]}."
                )
            one = NodeGroup(
                kind=kind,
                num_machines=1,
                gpus_per_machine=len(machine.gpus),
                link=machine.gpu_link or kind.link,
                network=cluster.network,
            )
            last = groups[-1] if groups else None
            if last is not None and (last.kind, last.gpus_per_machine, last.link) == (
                one.kind, one.gpus_per_machine, one.link,
            ):  # fmt: skip
                groups[-1] = NodeGroup(
                    kind=kind, num_machines=last.num_machines + 1, gpus_per_machine=one.gpus_per_machine,
                    link=one.link, network=one.network,
                )  # fmt: skip
            else:
                groups.append(one)
        return Fabric(groups=tuple(groups))


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What one group of ranks along an axis has: its members per machine, machines, rates and latencies."""

    num_ranks: int
    ranks_per_machine: int
    num_machines: int
    inside_bytes_per_s: float
    across_bytes_per_s: float  # of the whole group on one machine
    inside_latency_s: float
    across_latency_s: float

    @property
    def ring_bytes_per_s(self) -> float:
        if self.num_machines == 1:
            return self.inside_bytes_per_s
        if self.ranks_per_machine == 1:
            return self.across_bytes_per_s
        return min(self.inside_bytes_per_s, self.across_bytes_per_s)

    def collective_s(self, kind: CollectiveKind, num_bytes: float) -> float:
        """Seconds of a collective of `num_bytes` (whole tensor)."""
        n, h, k = self.num_ranks, self.num_machines, self.ranks_per_machine
        if n < 2:
            return 0.0
        rate = self.ring_bytes_per_s
        if kind == "all_to_all":
            own = num_bytes / n
            across_s = own * (n - k) / n / (self.across_bytes_per_s / k) if h > 1 else 0.0
            inside_s = own * (k - 1) / n / self.inside_bytes_per_s
            return max(across_s, inside_s) + (self.across_latency_s if h > 1 else self.inside_latency_s)
        half_s = (n - 1) / n * num_bytes / rate + (n - h) * self.inside_latency_s + (h - 1) * self.across_latency_s
        if kind != "all_reduce":
            return half_s
        hops_s = (k - 1) * self.inside_latency_s + math.ceil(math.log2(h)) * self.across_latency_s
        return min(2 * half_s, 2 * num_bytes / rate + 2 * hops_s)

    def send_s(self, num_bytes: float) -> float:
        """Seconds until one rank has sent `num_bytes` to its neighbour in the group, while all its like do the same."""
        if self.num_machines == 1:
            return self.inside_latency_s + num_bytes / self.inside_bytes_per_s
        return self.across_latency_s + num_bytes / (self.across_bytes_per_s / self.ranks_per_machine)


def channel(
    fabric: Fabric, calibration: Calibration, *, num_ranks: int, stride: int, first: int = 0, span: int = 0
) -> Channel:
    """The channel of groups of `num_ranks` ranks, `stride` apart, among ranks `first` to ``first + span``.

    `span` is how many consecutive ranks the groups cover (default: one group's).
    """
    groups = fabric.groups_of(first, first + max(span, num_ranks * stride, 1) - 1)
    if not groups:
        raise ClusterError(
            f"ranks {first} to {first + num_ranks * stride - 1} must be on the fabric, but it has {fabric.num_gpus}."
        )
    parts = [_on(group, calibration.of(group.kind.generation), num_ranks, stride) for group in groups]
    return Channel(
        num_ranks=num_ranks,
        ranks_per_machine=min(part.ranks_per_machine for part in parts),
        num_machines=max(max(part.num_machines for part in parts), min(len(groups), num_ranks)),
        inside_bytes_per_s=min(part.inside_bytes_per_s for part in parts),
        across_bytes_per_s=min(part.across_bytes_per_s for part in parts),
        inside_latency_s=max(part.inside_latency_s for part in parts),
        across_latency_s=max(part.across_latency_s for part in parts),
    )


def _on(group: NodeGroup, constants: Constants, num_ranks: int, stride: int) -> Channel:
    size = group.gpus_per_machine
    inside = min(num_ranks, max(1, size // stride))
    return Channel(
        num_ranks=num_ranks,
        ranks_per_machine=inside,
        num_machines=-(-num_ranks // inside),
        inside_bytes_per_s=group.link.bytes_per_s * constants.link,
        across_bytes_per_s=group.network.bytes_per_s * constants.network * inside / size,
        inside_latency_s=group.link.latency_s * constants.latency,
        across_latency_s=group.network.latency_s * constants.latency,
    )


def edge_s(
    fabric: Fabric, calibration: Calibration, source: int, target: int, num_senders: int, num_bytes: float
) -> float:
    """Seconds until each of `num_senders` ranks from `source` on has sent `num_bytes` to its partner, from `target`
    on."""
    (here, machine), (there, other) = fabric.place_of(source), fabric.place_of(target)
    constants = [calibration.of(group.kind.generation) for group in (here, there)]
    if machine == other:
        rate = here.link.bytes_per_s * constants[0].link
        return here.link.latency_s * constants[0].latency + num_bytes / rate
    rates = []
    for group, known in zip((here, there), constants, strict=True):
        total = group.network.bytes_per_s
        at_once = min(num_senders, group.gpus_per_machine)
        # One rank drives one adapter of a machine that has several.
        rates.append(min(total / at_once, max(total / group.gpus_per_machine, ADAPTER_BYTES_PER_S)) * known.network)
    latency_s = max(g.network.latency_s * c.latency for g, c in zip((here, there), constants, strict=True))
    return latency_s + num_bytes / min(rates)
