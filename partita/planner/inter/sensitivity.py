"""What would help most: the problem solved again with a little more of one thing.

Each change relaxes the problem (or adds to its space), so the optimum cannot get worse; `saved_s` is the difference
of the two objectives, `saved_at_most_s` that of the old objective and the new lower bound: what is proven. For small
changes saved_s over the change is the shadow price.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from partita.planner.inter.costs import OptionCosts, StageCosts
from partita.planner.inter.problem import Array, InterProblem, Links
from partita.planner.inter.solve import InterSolution, solve_inter
from partita.units import format_time


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """One change and what it saves a step; `solution` is the best pipeline after it."""

    change: str
    saved_s: float
    saved_at_most_s: float
    solution: InterSolution

    def __str__(self) -> str:
        return f"{self.change}: saves {format_time(self.saved_s)} a step"


def sensitivities(
    problem: InterProblem,
    solution: InterSolution,
    *,
    memory_factor: float = 1.25,
    bandwidth_factor: float = 2.0,
    gap: float = 0.0,
    time_limit_s: float = 2.0,
) -> tuple[Sensitivity, ...]:
    """More memory, more bandwidth, lower latency, one more device of each kind; the most helpful first.

    Args:
        problem, solution: a problem and what `solve_inter` found for it.
        memory_factor: of every device's memory limit; left out where no device has one.
        bandwidth_factor: of every link's bandwidth, and by which latencies are divided.
        gap, time_limit_s: of each solve.
    """
    result = []
    for change, changed in _changes(problem, memory_factor, bandwidth_factor):
        found = solve_inter(changed, gap=gap, time_limit_s=time_limit_s)
        result.append(
            Sensitivity(
                change=change,
                saved_s=max(0.0, solution.objective_s - found.objective_s),
                saved_at_most_s=max(0.0, solution.objective_s - found.lower_bound_s),
                solution=found,
            )
        )
    return tuple(sorted(result, key=lambda one: -one.saved_s))


def _changes(problem: InterProblem, memory_factor: float, bandwidth_factor: float) -> list[tuple[str, InterProblem]]:
    changes = []
    if any(np.isfinite(device.memory_bytes) for device in problem.devices):
        more = tuple(replace(device, memory_bytes=memory_factor * device.memory_bytes) for device in problem.devices)
        changes.append((f"{memory_factor:g} times the memory of every device", replace(problem, devices=more)))
    if len(problem.devices) > 1:
        links = problem.links
        faster = Links(latency_s=links.latency_s, bytes_per_s=bandwidth_factor * links.bytes_per_s)
        quicker = Links(latency_s=links.latency_s / bandwidth_factor, bytes_per_s=links.bytes_per_s)
        changes.append((f"{bandwidth_factor:g} times the bandwidth of every link", replace(problem, links=faster)))
        changes.append((f"1/{bandwidth_factor:g} of the latency of every link", replace(problem, links=quicker)))
    for kind in dict.fromkeys(device.kind for device in problem.devices):
        twin = next(g for g, device in enumerate(problem.devices) if device.kind == kind)
        changes.append((f"one more device of kind {kind}", _with_twin(problem, twin)))
    return changes


def _with_twin(problem: InterProblem, twin: int) -> InterProblem:
    """One more device, like `twin` and linked as it is (to `twin` itself by `twin`'s best link), put behind it or at
    the end of every order."""
    count = len(problem.devices)
    latency_s, bytes_per_s = problem.links.latency_s, problem.links.bytes_per_s
    others = [g for g in range(count) if g != twin]
    best = max(others, key=lambda g: bytes_per_s[twin, g], default=twin)
    orders = []
    for order in problem.orders:
        orders += [order, (*order, count)]
        if twin in order:
            place = order.index(twin) + 1
            orders.append((*order[:place], count, *order[place:]))
    device = replace(problem.devices[twin], name=f"{problem.devices[twin].name}+")
    return replace(
        problem,
        devices=(*problem.devices, device),
        links=Links(
            latency_s=_grown(latency_s, twin, latency_s[twin, best] if others else 0.0),
            bytes_per_s=_grown(bytes_per_s, twin, bytes_per_s[twin, best] if others else np.inf),
        ),
        orders=tuple(dict.fromkeys(orders)),
        costs=_for_twin(problem.costs, count, twin),
    )


def _grown(matrix: Array, twin: int, between: float) -> Array:
    """One row and column more, equal to those of `twin`."""
    count = len(matrix)
    grown = np.full((count + 1, count + 1), between)
    grown[:count, :count] = matrix
    grown[count, :count], grown[:count, count] = matrix[twin], matrix[:, twin]
    grown[count, twin] = grown[twin, count] = between
    return grown


def _for_twin(costs: StageCosts, new: int, twin: int) -> StageCosts:
    """An oracle of single devices is asked about the twin instead of the new device."""
    if not isinstance(costs, OptionCosts):
        return costs

    def known(devices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(twin if g == new else g for g in devices)

    return OptionCosts(
        options=lambda ops, devices, rows: costs.options(ops, known(devices), rows),
        same=lambda devices: costs.same(known(devices)),
    )
