"""What an assignment costs and which constraints it breaks, straight from the definition in `problem`.

No solver's arithmetic is used here, and every solution passes through here before it is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partita.planner.placement.parse import topological_order
from partita.planner.placement.problem import PlacementProblem


@dataclass(frozen=True, kw_only=True)
class PricedPlacement:
    """An assignment's facts: `loads` and `size_bytes` by device (sizes of CPU cores are not limited)."""

    loads: tuple[float, ...]
    size_bytes: tuple[float, ...]
    objective: float  # the largest load
    contiguous: bool
    rounds: int  # samples in flight: parts on the longest path, a part being what a device runs without a break
    broken: tuple[str, ...]  # constraints that do not hold, one sentence each


def price_placement(problem: PlacementProblem, devices: Sequence[int]) -> PricedPlacement:
    """Price the assignment of operator i to `devices[i]`."""
    loads = _loads(problem, devices)
    sizes = [0.0] * problem.num_devices
    for operator, device in zip(problem.operators, devices, strict=True):
        sizes[device] += operator.size_bytes
    return PricedPlacement(
        loads=tuple(loads),
        size_bytes=tuple(sizes),
        objective=max(loads, default=0.0),
        contiguous=is_contiguous(problem, devices),
        rounds=_rounds(problem, devices),
        broken=tuple(_broken(problem, devices, sizes)),
    )


def _loads(problem: PlacementProblem, devices: Sequence[int]) -> list[float]:
    loads = [0.0] * problem.num_devices
    readers: list[set[int]] = [set() for _ in devices]  # devices that read the output of an operator
    for tail, head in problem.edges:
        readers[tail].add(devices[head])
    for i, operator in enumerate(problem.operators):
        own = devices[i]
        on_accelerator = own < problem.num_accelerators
        loads[own] += operator.accelerator_latency if on_accelerator else operator.cpu_latency
        others = readers[i] - {own}
        paying = others | {own} if others else others
        for device in paying:
            if device < problem.num_accelerators:
                loads[device] += operator.transfer_latency
    return loads


def is_contiguous(problem: PlacementProblem, devices: Sequence[int]) -> bool:
    """Whether the forward, and the backward, operators of each accelerator are convex."""
    heads = _heads(problem)
    parts: dict[tuple[int, bool], set[int]] = {}
    for i, operator in enumerate(problem.operators):
        if devices[i] < problem.num_accelerators:
            parts.setdefault((devices[i], operator.is_backward), set()).add(i)
    return all(is_convex(heads, part) for part in parts.values())


def is_convex(heads: Sequence[Iterable[int]], part: set[int]) -> bool:
    """Whether no path leaves `part` and comes back; `heads[i]` are the heads of i's edges."""
    reached = {head for i in part for head in heads[i]} - part
    waiting = list(reached)
    while waiting:
        for head in heads[waiting.pop()]:
            if head in part:
                return False
            if head not in reached:
                reached.add(head)
                waiting.append(head)
    return True


def _rounds(problem: PlacementProblem, devices: Sequence[int]) -> int:
    heads = _heads(problem)
    part = [1] * len(devices)
    for i in topological_order([operator.id for operator in problem.operators], problem.edges):
        for head in heads[i]:
            part[head] = max(part[head], part[i] + (devices[i] != devices[head]))
    return max(part, default=0)


def _heads(problem: PlacementProblem) -> list[list[int]]:
    heads: list[list[int]] = [[] for _ in problem.operators]
    for tail, head in problem.edges:
        heads[tail].append(head)
    return heads


def _broken(problem: PlacementProblem, devices: Sequence[int], sizes: Sequence[float]) -> list[str]:
    broken = []
    for device, size in enumerate(sizes[: problem.num_accelerators]):
        if size > problem.limit_bytes:
            broken.append(f"accelerator {device} holds {size:g} bytes, but its limit is {problem.limit_bytes:g}")
    color_device: dict[int, int] = {}
    for operator, device in zip(problem.operators, devices, strict=True):
        if device < problem.num_accelerators and operator.accelerator_latency == float("inf"):
            broken.append(f"node {operator.id} is on accelerator {device}, which does not support it")
        if operator.color is not None and color_device.setdefault(operator.color, device) != device:
            broken.append(f"colour class {operator.color} is on devices {color_device[operator.color]} and {device}")
    return broken
