"""The placement problem: which device runs which operator of a graph.

Given        K accelerators (devices 0 .. K-1) of `limit_bytes` each, then L CPU cores (devices K .. K+L-1);
             operators v with latency p_v on an accelerator (infinite where it is not supported), q_v on a CPU core,
             size m_v, an optional colour class, and c_v, the latency of moving v's output between an accelerator and
             host memory. Latencies have no unit of their own: all of one file share one.
Variables    x_v in 0 .. K+L-1, the device of operator v.
Load         of a CPU core: sum of its q_v. Of an accelerator d: sum of its p_v, plus c_v of each of its own v with a
             reader elsewhere, plus c_u of each u elsewhere that at least one of its v reads; each c counts once.
Objective    the largest load is least.
Constraints  (1) the sizes on an accelerator sum to at most `limit_bytes`;  (2) a colour class has one device;
             (3) accelerators run only operators that they support.
Contiguous   an assignment where, on each accelerator, the forward operators are convex (no path leaves them and comes
             back) and so are the backward ones.
Source       Tarnawski et al., Efficient Algorithms for Device Placement of DNN Graph Operators, NeurIPS 2020,
             sections 3 and 5 (throughput); "FPGA" in the files means any accelerator.

An assignment that is not contiguous is executable too where samples (or microbatches) stream: cut the graph into the
parts that one device runs between two changes of device, and let part j work on sample i in round i + j. What a part
reads was made in an earlier round, as the graph has no cycle, and a round lasts as long as the largest load. The price
is depth: `rounds` of `PricedPlacement` samples are in flight, whose activations this format does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partita.errors import InputError
from partita.planner.placement.parse import (
    count_of,
    limits_of,
    list_of,
    mapping_of,
    nodes_of,
    number_of,
    topological_order,
    truth_of,
    value_of,
)

LIMITS = ("maxSizePerFPGA", "maxFPGAs", "maxCPUs")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One node of the graph; latencies are in the unit of the file."""

    id: int
    accelerator_latency: float  # infinite where accelerators do not support it
    cpu_latency: float
    size_bytes: float
    transfer_latency: float  # of its output, once
    is_backward: bool
    color: int | None


@dataclass(frozen=True, kw_only=True)
class PlacementProblem:
    """See the module's docstring. Edges hold positions in `operators`, not ids."""

    operators: tuple[Operator, ...]
    edges: tuple[tuple[int, int], ...]
    num_accelerators: int
    num_cpus: int
    limit_bytes: float

    @property
    def num_devices(self) -> int:
        return self.num_accelerators + self.num_cpus


def read_placement(data: Mapping[str, Any], overrides: Mapping[str, float] | None = None) -> PlacementProblem:
    """The problem in a file's content; `overrides` replace the file's limits (`maxFPGAs` and the others).

    Raises `InputError` for missing keys, unknown or repeated ids, values out of range, and cycles.
    """
    limits = limits_of(data, LIMITS, overrides)
    nodes, position = nodes_of(data, "operators")
    edges, transfer = _edges(data, position)
    topological_order([node["id"] for node in nodes], edges)
    return PlacementProblem(
        operators=tuple(_operator(node, transfer.get(i, 0.0)) for i, node in enumerate(nodes)),
        edges=edges,
        num_accelerators=count_of(limits, "maxFPGAs", "the file", least=0),
        num_cpus=count_of(limits, "maxCPUs", "the file", least=0),
        limit_bytes=number_of(limits, "maxSizePerFPGA", "the file"),
    )


def _edges(
    data: Mapping[str, Any], position: Mapping[Any, int]
) -> tuple[tuple[tuple[int, int], ...], dict[int, float]]:
    """Edges without repetition, and the transfer latency of each source, which must be one number."""
    edges: dict[tuple[int, int], None] = {}
    transfer: dict[int, float] = {}
    for entry in list_of(data, "edges", "the file"):
        edge = mapping_of(entry, "an edge")
        ends = [value_of(edge, key, "an edge") for key in ("sourceId", "destId")]
        if unknown := [end for end in ends if end not in position]:
            raise InputError(f"edges must join ids of nodes, but edge {ends} names {unknown[0]}; add that node.")
        source, head = position[ends[0]], position[ends[1]]
        cost = number_of(edge, "cost", f"edge {ends}")
        known = transfer.setdefault(source, cost)
        if not math.isclose(known, cost, rel_tol=1e-6, abs_tol=1e-12):
            raise InputError(
                f"all edges of one source must have one cost, but those of node {ends[0]} have {known:g} and {cost:g}."
            )
        transfer[source] = max(known, cost)
        edges[source, head] = None
    return tuple(edges), transfer


def _operator(node: Mapping[str, Any], transfer_latency: float) -> Operator:
    where = f"node {node['id']}"
    supported = truth_of(node, "supportedOnFpga", where)
    return Operator(
        id=node["id"],
        accelerator_latency=number_of(node, "fpgaLatency", where) if supported else math.inf,
        cpu_latency=number_of(node, "cpuLatency", where),
        size_bytes=number_of(node, "size", where),
        transfer_latency=transfer_latency,
        is_backward=truth_of(node, "isBackwardNode", where, default=False),
        color=node.get("colorClass"),
    )
