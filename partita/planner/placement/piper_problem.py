"""Piper's problem: a pipeline of stages, each with data and tensor parallelism and a way to run each of its layers.

Given        layers v; for each degree t of tensor parallelism a list of ways c to run v (TMPCs, tensor model
             parallelism configurations) with time tau, weights w, memory a and b, and sync bytes f of each incoming
             and g of each outgoing edge; edges e with bytes x_e; K devices of `limit_bytes`, `bandwidth_bytes_per_s`,
             N microbatches a batch.
Variables    stages S_1 .. S_n in order, with degrees d_i and t_i, and a way of degree t_i for each layer.
Objective    the largest stage time is least; the time of stage i (seconds for a sample) is
               (sum tau) / d + bytes / bandwidth,
               bytes = (sum over edges that enter of 2 (x + f) + over edges that leave of 2 (x + g)) / d
                       + sum over layers of 4 (d - 1) w / (d N).
Constraints  (1) every layer is in one stage;  (2) no edge goes from a later stage to an earlier;  (3) d_i divides N;
             (4) sum of d_i t_i <= K;  (5) sum of d_i <= N;
             (6) with s_i = d_i + d_{i+1} + .. + d_n: the sum over layers of a ceil(s_i / d_i) + b <= `limit_bytes`.
Source       Tarnawski et al., Piper: Multidimensional Planner for DNN Parallelization, NeurIPS 2021, section 3.
"""

from __future__ import annotations

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
    value_of,
)

LIMITS = ("maxMemoryPerDevice", "maxDevices", "bandwidth", "mbsInBatch")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One TMPC of a layer: how it runs at one degree of tensor parallelism."""

    id: str
    time_s: float  # tau: forward and backward, for one sample
    weight_bytes: float  # w
    memory_per_microbatch_bytes: float  # a
    memory_fixed_bytes: float  # b
    sync_in_bytes: Mapping[int, float]  # f, by the position of an edge's other end
    sync_out_bytes: Mapping[int, float]  # g


@dataclass(frozen=True, kw_only=True)
class Layer:
    id: int
    ways: Mapping[int, tuple[Way, ...]]  # by degree t


def least_device_time_s(layer: Layer) -> float:
    """The least t tau of a layer: what it costs at least of the K T seconds that all devices have for a sample."""
    return min(degree * way.time_s for degree, ways in layer.ways.items() for way in ways)


@dataclass(frozen=True, kw_only=True)
class PiperProblem:
    """See the module's docstring. Edges are (tail, head, bytes), with positions in `layers`."""

    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int, float], ...]
    num_devices: int
    limit_bytes: float
    bandwidth_bytes_per_s: float
    num_microbatches: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers by position, ascending, with the index of the way of each in its list of degree `tensor_degree`."""

    layers: tuple[int, ...]
    data_degree: int
    tensor_degree: int
    ways: tuple[int, ...]


def read_piper(data: Mapping[str, Any], overrides: Mapping[str, float] | None = None) -> PiperProblem:
    """The problem in a file's content; `overrides` replace the file's limits (`maxDevices` and the others).

    Raises `InputError` for missing keys, unknown or repeated ids, values out of range, and cycles.
    """
    limits = limits_of(data, LIMITS, overrides)
    nodes, position = nodes_of(data, "layers")
    edges = _edges(data, position)
    topological_order([node["id"] for node in nodes], [edge[:2] for edge in edges])
    bandwidth = number_of(limits, "bandwidth", "the file")
    if bandwidth == 0:
        raise InputError("`bandwidth` of the file must be above 0, but got 0.")
    return PiperProblem(
        layers=tuple(_layer(node, i, edges, [other["id"] for other in nodes]) for i, node in enumerate(nodes)),
        edges=edges,
        num_devices=count_of(limits, "maxDevices", "the file"),
        limit_bytes=number_of(limits, "maxMemoryPerDevice", "the file"),
        bandwidth_bytes_per_s=bandwidth,
        num_microbatches=count_of(limits, "mbsInBatch", "the file"),
    )


def _edges(data: Mapping[str, Any], position: Mapping[Any, int]) -> tuple[tuple[int, int, float], ...]:
    edges = []
    for entry in list_of(data, "edges", "the file"):
        edge = mapping_of(entry, "an edge")
        ends = [value_of(edge, key, "an edge") for key in ("sourceId", "destId")]
        if unknown := [end for end in ends if end not in position]:
            raise InputError(f"edges must join ids of nodes, but edge {ends} names {unknown[0]}; add that node.")
        cost_bytes = number_of(edge, "communicationCost", f"edge {ends}")
        edges.append((position[ends[0]], position[ends[1]], cost_bytes))
    return tuple(edges)


def _layer(node: Mapping[str, Any], own: int, edges: tuple[tuple[int, int, float], ...], ids: list[Any]) -> Layer:
    tails = [tail for tail, head, _ in edges if head == own]
    heads = [head for tail, head, _ in edges if tail == own]
    ways: dict[int, tuple[Way, ...]] = {}
    degrees = mapping_of(value_of(node, "TMPCs", f"node {node['id']}"), f"`TMPCs` of node {node['id']}")
    for degree in degrees:
        where = f"TMPCs {degree} of node {node['id']}"
        if not str(degree).isdigit() or int(degree) < 1:
            raise InputError(f"the keys of TMPCs must be whole numbers of at least 1, but {where} has {degree!r}.")
        found = []
        for entry in list_of(degrees, degree, f"TMPCs of node {node['id']}"):
            way = mapping_of(entry, where)
            found.append(
                Way(
                    id=value_of(way, "id", where),
                    time_s=number_of(way, "timePerSample", where),
                    weight_bytes=number_of(way, "parameterSize", where),
                    memory_per_microbatch_bytes=number_of(way, "memoryUsageA", where),
                    memory_fixed_bytes=number_of(way, "memoryUsageB", where),
                    sync_in_bytes=_sync(way, "syncTimeFw", tails, ids, where),
                    sync_out_bytes=_sync(way, "syncTimeBw", heads, ids, where),
                )
            )
        if len({way.id for way in found}) != len(found):
            raise InputError(f"the ids of {where} must differ; rename the repeated.")
        if found:
            ways[int(degree)] = tuple(found)
    if not ways:
        raise InputError(
            f"`TMPCs` of node {node['id']} must hold at least one way to run it, but it is empty; add one."
        )
    return Layer(id=node["id"], ways=ways)


def _sync(way: Mapping[str, Any], key: str, others: list[int], ids: list[Any], where: str) -> dict[int, float]:
    given = mapping_of(value_of(way, key, where), f"`{key}` of {where}")
    return {other: number_of(given, str(ids[other]), f"`{key}` of {where}") for other in others}
