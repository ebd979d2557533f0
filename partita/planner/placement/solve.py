"""From a placement problem to the best assignment found, with proofs of how good it is.

1. Contract what shares a device anyway (`groups`).
2. A pipeline: the best chain of prefixes of many topological orders, then of orders near the best chain (`chains`).
3. If the order graph has few ideals, the best chain of all of them: the optimum over pipelines, proven.
4. Assignments without order, by annealing from the pipeline (`annealing`).
5. A lower bound over all assignments (`bounds`).
Each solution is priced anew from the definition (`price`), and the least largest load is returned; at equal loads the
contiguous one.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from partita.errors import InfeasibleError
from partita.planner.placement.annealing import Annealing
from partita.planner.placement.bounds import lower_bound
from partita.planner.placement.chains import ChainSearch
from partita.planner.placement.groups import Groups, both_orders, contract_colors, merge_expensive, ordered
from partita.planner.placement.ideals import (
    Ideals,
    all_ideals,
    distinct,
    first_orders,
    orders_near,
    prefixes,
    stage_ends,
)
from partita.planner.placement.price import PricedPlacement, price_placement
from partita.planner.placement.problem import PlacementProblem
from partita.units import format_bytes

FEW_ASSIGNMENTS = 5_000  # are tried one and all
_NEARER = 1 - 1e-9  # a better solution is better by more than rounding
_MAX_IDEALS = 60_000
_MAX_ENTRIES = 20_000_000  # ideals x groups: bounds the memory of a proof


@dataclass(frozen=True, kw_only=True)
class PlacementSolution:
    """`lower_bound` holds over all assignments. `pipeline_lower_bound` holds over pipelines: devices, CPU cores
    included, in an order that no edge between forward operators goes against (and for backward operators, which edges
    all follow or all go against); it is None where the ideals were too many to prove one."""

    devices: tuple[int, ...]  # of each operator
    priced: PricedPlacement
    lower_bound: float
    pipeline_devices: tuple[int, ...] | None  # the best pipeline found
    pipeline_objective: float | None
    pipeline_lower_bound: float | None
    num_ideals: int | None  # with which `pipeline_lower_bound` was proven
    time_s: float

    @property
    def objective(self) -> float:
        return self.priced.objective


@dataclass
class _Search:
    """What is known so far: the best of all assignments, and the best pipeline."""

    problem: PlacementProblem
    best: PricedPlacement | None = None
    devices: tuple[int, ...] = ()
    pipeline: tuple[int, ...] = ()
    pipeline_objective: float = float("inf")
    pipeline_stages: list[int] = field(default_factory=list)  # of each operator

    @property
    def objective(self) -> float:
        return self.best.objective if self.best else float("inf")

    def offer(self, devices: Sequence[int]) -> bool:
        """Keep the assignment if it is valid and better than the best; whether it is."""
        priced = price_placement(self.problem, devices)
        if priced.broken:
            return False
        if self.best and priced.objective >= self.best.objective:
            return False
        self.best, self.devices = priced, tuple(devices)
        return True

    def offer_pipeline(self, devices: Sequence[int], stages: Sequence[int]) -> bool:
        priced = price_placement(self.problem, devices)
        assert priced.contiguous and not priced.broken, f"a chain of ideals must be a valid pipeline: {priced.broken}"
        self.offer(devices)
        if priced.objective >= self.pipeline_objective:
            return False
        self.pipeline, self.pipeline_objective = tuple(devices), priced.objective
        self.pipeline_stages = list(stages)
        return True


def solve_placement(
    problem: PlacementProblem, *, time_limit_s: float = 4.0, seed: int = 0, contiguous_only: bool = False
) -> PlacementSolution:
    """The best assignment found within about `time_limit_s`.

    Raises `InfeasibleError` where no assignment is valid, naming the limit.
    """
    start = time.monotonic()
    _check_feasible(problem)
    search = _Search(problem)
    groups = contract_colors(problem)
    orders = both_orders(groups)
    _offer_simple(search, groups)
    for _, order in orders:
        _improve_pipeline(search, order, start + 0.35 * time_limit_s, seed)
    proofs = [_prove_pipeline(search, *order, start + 0.7 * time_limit_s) for order in orders]
    low = lower_bound(groups, search.objective) if search.best else 0.0
    if not contiguous_only and problem.num_devices**groups.num_groups <= FEW_ASSIGNMENTS:
        _offer_all(search, groups)
    elif search.best and not contiguous_only and low < search.objective * _NEARER:
        _anneal(search, groups, low, start + time_limit_s, seed)
    if search.best is None or (contiguous_only and not search.pipeline):
        raise InfeasibleError(_why_not(problem))
    if contiguous_only or search.pipeline_objective <= search.objective * (1 + 1e-12):
        search.best, search.devices = price_placement(problem, search.pipeline), search.pipeline
    return PlacementSolution(
        devices=search.devices,
        priced=search.best,
        lower_bound=min(low, search.objective),
        pipeline_devices=search.pipeline or None,
        pipeline_objective=search.pipeline_objective if search.pipeline else None,
        pipeline_lower_bound=search.pipeline_objective * _NEARER if all(proofs) and search.pipeline else None,
        num_ideals=sum(proofs) if all(proofs) else None,
        time_s=time.monotonic() - start,
    )


def _offer_simple(search: _Search, groups: Groups) -> None:
    """Everything on each one device, and the largest first where most room is left: starts where no pipeline fits."""
    problem = search.problem
    for device in {0, problem.num_accelerators} & set(range(problem.num_devices)):
        search.offer([device] * len(problem.operators))
    loads, sizes = [0.0] * problem.num_devices, [0.0] * problem.num_devices
    devices = [0] * groups.num_groups
    for group in np.argsort(-groups.size_bytes, kind="stable"):
        times = [
            groups.accelerator_latency[group] if device < problem.num_accelerators else groups.cpu_latency[group]
            for device in range(problem.num_devices)
        ]
        fitting = [
            device
            for device in range(problem.num_devices)
            if device >= problem.num_accelerators or sizes[device] + groups.size_bytes[group] <= problem.limit_bytes
        ]
        device = min(fitting or [0], key=lambda d: loads[d] + times[d])
        devices[group] = device
        loads[device] += times[device]
        sizes[device] += float(groups.size_bytes[group])
    search.offer(groups.devices_of_operators(devices))
    if search.best is None:
        search.offer(groups.devices_of_operators(_spread_sizes(groups, devices)))


def _spread_sizes(groups: Groups, devices: Sequence[int]) -> list[int]:
    """Devices whose sizes fit, if they are found: the largest load of a problem whose latencies are the sizes."""
    supported = np.isfinite(groups.accelerator_latency)
    sizes = replace(
        groups,
        accelerator_latency=np.where(supported, groups.size_bytes, np.inf),
        cpu_latency=np.zeros(groups.num_groups),
        size_bytes=np.zeros(groups.num_groups),
        pins=(),
        costs=np.zeros(0),
    )
    num_steps = 400 * groups.num_groups * groups.problem.num_devices
    _, found = Annealing(sizes, devices, 0).run(min(300_000, num_steps), np.inf, groups.problem.limit_bytes)
    return found


def _improve_pipeline(search: _Search, groups: Groups, deadline: float, seed: int) -> None:
    """Chains over families of prefixes: first of varied orders, then of orders near the best chain."""
    source = random.Random(seed)
    count = groups.num_groups
    size = int(np.clip(np.sqrt(1.5e9 / (1 + len(groups.pins))), 300, 2400))  # ideals: all pairs in about a second
    budget = int(np.clip(size // (count + 1), 3, 24))
    step = -(-budget * (count + 1) // size)
    ideals = prefixes(first_orders(count, groups.before, max(0, budget - 4), seed)[:budget], count, step)
    idle = 0
    while True:
        found = _search_family(search, groups, ideals, deadline)
        idle = 0 if found else idle + 1
        if idle > 3 or time.monotonic() > deadline or not search.pipeline or not _follows(search, groups):
            return
        stages = groups.groups_of_operators(search.pipeline_stages)
        near = orders_near(count, groups.before, stages, budget, source)
        ideals = distinct(np.concatenate([stage_ends(stages), prefixes(near, count, step)]))


def _follows(search: _Search, groups: Groups) -> bool:
    """Whether the best pipeline keeps the groups of this order whole."""
    found = groups.groups_of_operators(search.pipeline_stages)
    return all(found[label] == stage for label, stage in zip(groups.labels, search.pipeline_stages, strict=True))


def _search_family(search: _Search, groups: Groups, ideals: Ideals, deadline: float) -> bool:
    """Whether a better pipeline was found. Bounds rise from a guess: a small one makes narrow windows."""
    known = search.pipeline_objective * _NEARER
    chains = ChainSearch(groups=groups, ideals=ideals, deadline=deadline)
    guess = lower_bound(groups, search.objective, num_steps=8) if search.best else known
    for factor in (1.1, 1.4, 2.0, np.inf) if not search.pipeline else (np.inf,):
        bound = min(known, guess * factor if factor < np.inf else np.inf)
        chain = chains.solve(bound)
        if chain is not None:
            return search.offer_pipeline(
                groups.devices_of_operators(chain.devices), [chain.stages[label] for label in groups.labels]
            )
        if bound == known or time.monotonic() > deadline:
            return False
    return False


def _prove_pipeline(search: _Search, mirrored: bool, groups: Groups, deadline: float) -> int:
    """The number of ideals with which the best pipeline was proven the best of its order, 0 if it was not."""
    bound = search.pipeline_objective * _NEARER
    smaller = ordered(merge_expensive(groups, bound), mirrored) if np.isfinite(bound) else groups
    limit = min(_MAX_IDEALS, _MAX_ENTRIES // (1 + smaller.num_groups))
    ideals = all_ideals(smaller.num_groups, smaller.before, limit)
    if ideals is None:
        return 0
    chains = ChainSearch(groups=smaller, ideals=distinct(ideals), deadline=deadline)
    chain = chains.solve(bound)
    if chain is not None:
        search.offer_pipeline(
            smaller.devices_of_operators(chain.devices), [chain.stages[label] for label in smaller.labels]
        )
    return 0 if chains.expired else len(ideals)


def _offer_all(search: _Search, groups: Groups) -> None:
    """Every assignment of so few groups: annealing can miss the only one that fits."""
    for devices in itertools.product(range(search.problem.num_devices), repeat=groups.num_groups):
        search.offer(groups.devices_of_operators(list(devices)))


def _anneal(search: _Search, groups: Groups, low: float, deadline: float, seed: int) -> None:
    """Annealing runs, each from the best assignment so far, hot and cool in turn."""
    idle = 0
    begun = time.monotonic()
    moves = groups.num_groups * search.problem.num_devices
    num_steps = min(200 * moves, max(20_000, 40 * groups.num_groups))
    heats = (0.3, 0.05, 1.0) if num_steps > 20 * moves else (0.02, 0.005, 0.1)  # few steps must not begin far away
    while time.monotonic() < deadline and idle < 12 and search.objective > low * (1 + 1e-9):
        smaller = merge_expensive(groups, search.objective)
        state = Annealing(smaller, smaller.groups_of_operators(search.devices), seed)
        _, devices = state.run(num_steps, deadline, low * (1 + 1e-9), heats[seed % 3])
        idle = 0 if search.offer(smaller.devices_of_operators(devices)) else idle + 1
        seed += 1
        if seed % 3 == 0 and deadline - time.monotonic() > time.monotonic() - begun:
            num_steps *= 2


def _check_feasible(problem: PlacementProblem) -> None:
    if problem.num_devices == 0:
        raise InfeasibleError("A placement needs a device, but maxFPGAs and maxCPUs are both 0; raise one of them.")
    if problem.num_cpus:
        return
    colors: dict[object, float] = {}
    for operator in problem.operators:
        if operator.accelerator_latency == float("inf"):
            raise InfeasibleError(
                f"node {operator.id} must run on an accelerator, as maxCPUs is 0, but supportedOnFpga is false; "
                "raise maxCPUs."
            )
        key = ("color", operator.color) if operator.color is not None else ("node", operator.id)
        colors[key] = colors.get(key, 0.0) + operator.size_bytes
    total, largest = sum(colors.values()), max(colors.values(), default=0.0)
    need = max(largest, total / problem.num_accelerators)
    if need > problem.limit_bytes:
        raise InfeasibleError(_why_not(problem, need))


def _why_not(problem: PlacementProblem, need: float | None = None) -> str:
    total = sum(operator.size_bytes for operator in problem.operators)
    change = (
        f"at least {format_bytes(need)} each" if need else "a larger maxSizePerFPGA, more accelerators, or a CPU core"
    )
    return (
        f"The operators must fit the memory (maxSizePerFPGA): together they need {format_bytes(total)}, and "
        f"{problem.num_accelerators} accelerator(s) have {format_bytes(problem.limit_bytes)} each, of which colour "
        f"classes cannot be divided. Needed: {change}."
    )
