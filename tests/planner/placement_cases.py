"""Small random problems, and their optima by enumeration, for the tests of `partita.planner.placement`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from partita.planner.placement import PiperProblem, PlacementProblem, Stage, price_pipeline, price_placement


def placement_file(seed: int) -> dict[str, Any]:
    """A random file: up to seven nodes, with colours, unsupported nodes, backward nodes and limits, or without."""
    draw = random.Random(seed)
    count = draw.randint(1, 7)
    training = draw.random() < 0.5
    num_forward = draw.randint(1, count) if training else count
    nodes = [
        {
            "id": 10 + 3 * i,
            "supportedOnFpga": draw.random() < 0.85,
            "cpuLatency": draw.choice([0, 0, 1, 2, 5, 10, 30]) * draw.choice([1, 1, 0.7]),
            "fpgaLatency": draw.choice([0, 1, 1, 2, 3, 5]) * draw.choice([1, 1, 0.7]),
            "isBackwardNode": i >= num_forward,
            "size": draw.choice([0, 1, 1, 2]),
        }
        for i in range(count)
    ]
    for node in nodes:
        if draw.random() < 0.5:
            node["colorClass"] = draw.randint(1, 4) if training or draw.random() < 0.3 else node["id"]
    cost = [draw.choice([0, 0.25, 1, 4]) for _ in nodes]
    density = draw.choice([0.2, 0.4, 0.7])
    edges = [
        {"sourceId": nodes[i]["id"], "destId": nodes[j]["id"], "cost": cost[i]}
        for i, j in itertools.combinations(range(count), 2)
        if draw.random() < density
    ]
    return {
        "maxFPGAs": draw.randint(1, 3),
        "maxCPUs": draw.choice([0, 1, 1, 2]),
        "maxSizePerFPGA": draw.choice([2, 3, 5, 100]),
        "nodes": nodes,
        "edges": edges,
    }


def best_placement(problem: PlacementProblem) -> tuple[float, float] | None:
    """The least largest load of all assignments, and of all pipelines; None where none is valid."""
    best = best_pipeline = float("inf")
    for devices in itertools.product(range(problem.num_devices), repeat=len(problem.operators)):
        priced = price_placement(problem, devices)
        if priced.broken:
            continue
        best = min(best, priced.objective)
        if priced.objective < best_pipeline and is_pipeline(problem, devices):
            best_pipeline = priced.objective
    return (best, best_pipeline) if best < float("inf") else None


def is_pipeline(problem: PlacementProblem, devices: tuple[int, ...]) -> bool:
    """Whether the devices can be ordered along all forward edges and, one way or the other, all backward edges."""
    for mirrored in (True, False):
        after: dict[int, set[int]] = {}
        for tail, head in problem.edges:
            backward = problem.operators[tail].is_backward
            if backward == problem.operators[head].is_backward and devices[tail] != devices[head]:
                first, second = (head, tail) if backward and mirrored else (tail, head)
                after.setdefault(devices[first], set()).add(devices[second])
        if not _has_cycle(after):
            return True
    return False


def _has_cycle(after: dict[int, set[int]]) -> bool:
    left = {vertex for vertex in after} | {other for others in after.values() for other in others}
    while left:
        ends = {vertex for vertex in left if not after.get(vertex, set()) & left}
        if not ends:
            return True
        left -= ends
    return False


def piper_file(seed: int) -> dict[str, Any]:
    """A random file of up to three layers, with branches, ways that differ in every number, and tight limits."""
    draw = random.Random(seed)
    count = draw.randint(1, 3)
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(count), 2)
        if draw.random() < (0.9 if j == i + 1 else draw.choice([0.0, 0.3]))
    ]
    degrees = draw.choice([[1], [1, 2], [1, 2], [2, 4]])
    sync_differs = draw.random() < 0.4

    def way(name: str, layer: int) -> dict[str, Any]:
        return {
            "id": name,
            "timePerSample": draw.choice([0, 1, 2, 3, 5]) * draw.choice([1, 0.9]),
            "parameterSize": draw.choice([0, 1, 4]),
            "memoryUsageA": draw.choice([0, 1, 2, 3]),
            "memoryUsageB": draw.choice([0, 1, 2]),
            "syncTimeFw": {str(i): draw.randint(0, 3) if sync_differs else 1 for i, j in pairs if j == layer},
            "syncTimeBw": {str(j): draw.randint(0, 3) if sync_differs else 2 for i, j in pairs if i == layer},
        }

    nodes = []
    for layer in range(count):
        offered = [t for t in degrees if draw.random() < 0.85] or degrees
        ways = {str(t): [way(name, layer) for name in "abc"[: draw.randint(1, 3)]] for t in offered}
        nodes.append({"id": layer, "TMPCs": ways})
    return {
        "maxMemoryPerDevice": draw.choice([4, 6, 9, 14, 100]),
        "maxDevices": draw.choice([2, 3, 4, 6]),
        "bandwidth": draw.choice([1, 4, 20]),
        "mbsInBatch": draw.choice([1, 2, 4, 6, 12]),
        "nodes": nodes,
        "edges": [{"sourceId": i, "destId": j, "communicationCost": draw.choice([0, 1, 4])} for i, j in pairs],
    }


def best_pipeline(problem: PiperProblem) -> float | None:
    """The least largest stage time of all pipelines; None where none is valid."""
    best = float("inf")
    for parts in _ordered_partitions(list(range(len(problem.layers)))):
        choices = [list(_stages(problem, tuple(sorted(part)))) for part in parts]
        for stages in itertools.product(*choices):
            priced = price_pipeline(problem, stages)
            if not priced.broken:
                best = min(best, priced.objective_s)
    return best if best < float("inf") else None


def _stages(problem: PiperProblem, layers: tuple[int, ...]) -> Iterator[Stage]:
    degrees = set.intersection(*(set(problem.layers[layer].ways) for layer in layers))
    for degree in degrees:
        counts = [range(len(problem.layers[layer].ways[degree])) for layer in layers]
        for data in range(1, problem.num_devices // degree + 1):
            if problem.num_microbatches % data == 0:
                for ways in itertools.product(*counts):
                    yield Stage(layers=layers, data_degree=data, tensor_degree=degree, ways=ways)


def _ordered_partitions(layers: list[int]) -> Iterator[list[list[int]]]:
    """Every way to deal layers out to stages in order; pricing refuses those that edges forbid."""
    for num_stages in range(1, len(layers) + 1):
        for places in itertools.product(range(num_stages), repeat=len(layers)):
            if len(set(places)) == num_stages:
                yield [
                    [layer for layer, place in zip(layers, places, strict=True) if place == i]
                    for i in range(num_stages)
                ]
