"""What would help most, and what would make a plan possible: the same model planned on a changed fabric.

Each change adds to what the fabric has, so no plan that was possible becomes slower under the cost model; what is
reported is the difference of two searches' best times, and of the old time and the new lower bound ("at most").
Captures, placements and, where machines stay as they are, prices are kept between the searches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from partita.cost.networks import Fabric, NodeGroup
from partita.errors import InfeasibleError
from partita.planner.scale.plan import ScalePlanner
from partita.planner.scale.solution import ScaleConstraints, ScaleSolution
from partita.units import format_bytes

MEMORY_FACTOR, RATE_FACTOR = 1.25, 2.0
_MOST_MACHINES_FACTOR = 256
_MOST_MEMORY_FACTOR = 64.0
_SAME = 1e-9
_STEPS = 6  # of a bisection


@dataclass(frozen=True, kw_only=True)
class Help:
    """One change and what it saves a step.

    Attributes:
        change: in words.
        saved_s: by the best plan found after it; 0 where none is faster.
        saved_at_most_s: by no plan of the searched space more (from the new lower bound).
        way: the best plan after it, in one line.
    """

    change: str
    saved_s: float
    saved_at_most_s: float
    way: str


def what_helps(
    planner: ScalePlanner, fabric: Fabric, step_time_s: float, constraints: ScaleConstraints | None = None
) -> tuple[Help, ...]:
    """More memory, faster links in and between machines, more machines; the best first. What each saves is counted from
    the best plan on `fabric` as it is; if that is faster than `step_time_s`, it is the first of the answers.

    Args:
        step_time_s: of a plan on `fabric` as it is.
        constraints: kept fixed.

    Raises:
        InfeasibleError: nothing fits `fabric` as it is.
    """
    found = []
    now = planner.plan(fabric, constraints)
    if now.step_time_s < step_time_s * (1 - _SAME):
        found.append(
            Help(
                change="another plan on the same GPUs",
                saved_s=step_time_s - now.step_time_s,
                saved_at_most_s=step_time_s - now.lower_bound_s,
                way=now.text(),
            )
        )
    first = len(found)
    for change, changed in _changes(fabric):
        solution = _try(planner, changed, constraints)
        if solution is None:
            continue
        found.append(
            Help(
                change=change,
                saved_s=max(0.0, now.step_time_s - solution.step_time_s),
                saved_at_most_s=max(0.0, now.step_time_s - solution.lower_bound_s),
                way=solution.text(),
            )
        )
    return (*found[:first], *sorted(found[first:], key=lambda one: -one.saved_s))


def _try(planner: ScalePlanner, fabric: Fabric, constraints: ScaleConstraints | None) -> ScaleSolution | None:
    try:
        return planner.plan(fabric, constraints)
    except InfeasibleError:
        return None


def _changes(fabric: Fabric) -> list[tuple[str, Fabric]]:
    changes = [(f"{MEMORY_FACTOR:g} times the memory of every GPU", with_memory(fabric, MEMORY_FACTOR))]
    if any(group.gpus_per_machine > 1 for group in fabric.groups):
        changes.append((f"{RATE_FACTOR:g} times the bandwidth between GPUs of a machine", _with(fabric, _faster_links)))
    if sum(group.num_machines for group in fabric.groups) > 1:
        changes.append((f"{RATE_FACTOR:g} times the bandwidth between machines", _with(fabric, _faster_network)))
    changes.append((f"{RATE_FACTOR:g} times the machines", with_machines(fabric, RATE_FACTOR)))
    return changes


def _with(fabric: Fabric, change: Callable[[NodeGroup], NodeGroup]) -> Fabric:
    return Fabric(groups=tuple(change(group) for group in fabric.groups))


def _faster_links(group: NodeGroup) -> NodeGroup:
    link = msgspec.structs.replace(group.link, bytes_per_s=RATE_FACTOR * group.link.bytes_per_s)
    return replace(group, link=link)


def _faster_network(group: NodeGroup) -> NodeGroup:
    network = msgspec.structs.replace(group.network, bytes_per_s=RATE_FACTOR * group.network.bytes_per_s)
    return replace(group, network=network)


def with_memory(fabric: Fabric, factor: float) -> Fabric:
    """Every GPU with `factor` times the memory."""

    def more(group: NodeGroup) -> NodeGroup:
        gpu = msgspec.structs.replace(group.kind.gpu, memory_bytes=int(factor * group.kind.gpu.memory_bytes))
        return replace(group, kind=replace(group.kind, gpu=gpu))

    return _with(fabric, more)


def with_machines(fabric: Fabric, factor: float) -> Fabric:
    """Every group with `factor` times the machines (rounded up)."""
    return _with(fabric, lambda group: replace(group, num_machines=-(-int(factor * 1024) * group.num_machines // 1024)))


def smallest_change(planner: ScalePlanner, fabric: Fabric, constraints: ScaleConstraints) -> str:
    """For what fits nowhere: the least more of memory, and of machines, with which there is a plan; in words, "" if
    neither is found. Found by doubling and bisection, so exact where more never harms, to 1/64 of the last doubling."""
    texts = []
    memory = _least_factor(lambda f: _try(planner, with_memory(fabric, f), constraints), _MOST_MEMORY_FACTOR)
    if memory is not None:
        limit = min(group.kind.gpu.memory_bytes for group in fabric.groups)
        more = format_bytes((memory - 1) * limit)
        texts.append(f"{memory:.3g} times the memory of every GPU ({more} more)")
    machines = _least_factor(lambda f: _try(planner, with_machines(fabric, f), constraints), _MOST_MACHINES_FACTOR)
    if machines is not None:
        count = sum(group.num_machines for group in with_machines(fabric, machines).groups)
        now = sum(group.num_machines for group in fabric.groups)
        texts.append(f"{count} such machines instead of {now}")
    return f"The smallest change that helps: {', or '.join(texts)}." if texts else ""


def _least_factor(attempt: Callable[[float], ScaleSolution | None], most: float) -> float | None:
    low, high = 1.0, 2.0
    while attempt(high) is None:
        low, high = high, 2 * high
        if high > most:
            return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if attempt(middle) is not None else (middle, high)
    return high
