"""(skeleton) Fabrics of many GPUs and hierarchical collectives along a mesh axis."""

from __future__ import annotations

from dataclasses import dataclass

from partita.cluster.model import Link
from partita.cluster.presets import GpuKind


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Equal machines that follow each other in rank order. `network` is one machine's connection to the others."""

    kind: GpuKind
    num_machines: int
    gpus_per_machine: int
    link: Link  # between the GPUs of one machine, per GPU and direction
    network: Link


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """All GPUs of a job in rank order: a list of groups of equal machines."""

    groups: tuple[NodeGroup, ...]
