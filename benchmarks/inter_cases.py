"""Small random inter-stage problems, and their optimum by plain enumeration.

Nothing here uses the solver's code: task orders come from `partita.program.schedule`, makespans from the longest path
over its tasks, stage figures from the formulas in the docstring of `partita.planner.inter.costs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, permutations, product

import numpy as np
from hypothesis import strategies as st

from partita.planner.inter import (
    AdditiveCosts,
    InterDevice,
    InterProblem,
    Links,
    OpTimes,
    OptionCosts,
    StageOption,
    Value,
)
from partita.planner.inter.problem import SCHEDULES
from partita.program.schedule import Task, tasks_of_stage

Ops = tuple[int, ...]
KINDS = ("fast", "slow")


# ---------------------------------------------------------------------------------------------------- random problems


@st.composite
def problems(draw: st.DrawFn, max_ops: int = 5, max_devices: int = 4) -> InterProblem:
    num_ops = draw(st.integers(1, max_ops))
    num_devices = draw(st.integers(1, max_devices))
    seed = draw(st.integers(0, 2**32 - 1))  # the figures; structure is drawn, so that it shrinks
    rng = np.random.default_rng(seed)
    tight = draw(st.sampled_from([0.5, 1.0, 1.6, np.inf]))
    schedules = draw(st.lists(st.sampled_from(SCHEDULES), min_size=1, unique=True))
    stage_sizes = draw(st.sampled_from([(1,), (1, 2), (2,), (1, 3)]))
    batch_rows = draw(st.sampled_from([2, 3] if 3 in stage_sizes else [2, 4, 6]))  # shares are many
    divisors = [m for m in (1, 2, 3, 4, 6) if batch_rows % m == 0]
    counts = draw(st.lists(st.sampled_from(divisors), min_size=1, max_size=2, unique=True))
    shape = (num_devices, num_devices)
    additive = draw(st.booleans())
    scale = draw(st.sampled_from([0.0, 1.0, 8.0]))  # of the transfers
    return InterProblem(
        num_ops=num_ops,
        devices=tuple(
            InterDevice(name=f"d{g}", kind=str(rng.choice(KINDS)), memory_bytes=float(tight * rng.integers(12, 60)))
            for g in range(num_devices)
        ),
        links=Links(latency_s=scale * rng.integers(0, 2, shape), bytes_per_s=1.0 + rng.integers(0, 4, shape)),
        costs=_additive(rng, num_ops, draw(st.booleans())) if additive else _options(rng, num_ops),
        batch_rows=batch_rows,
        microbatch_counts=tuple(counts),
        values=tuple(_values(rng, num_ops, draw(st.sampled_from(["chain", "sparse", "none"])), scale)),
        schedules=tuple(schedules),
        chunk_counts=(2,) if draw(st.booleans()) else (2, 3),
        stage_sizes=stage_sizes,
        orders=_orders(rng, num_devices, draw(st.integers(1, 2))),
        fixed_s=float(rng.integers(0, 3)),
        uses_all=draw(st.booleans()),
    )


def _orders(rng: np.random.Generator, num_devices: int, count: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(rng.permutation(num_devices).tolist()) for _ in range(count))


def _values(rng: np.random.Generator, num_ops: int, kind: str, scale: float) -> Iterator[Value]:
    for first in range(num_ops - 1):
        if kind == "chain":
            consumers = [first + 1]
        else:
            consumers = [op for op in range(first + 1, num_ops) if rng.random() < (0.45 if kind == "sparse" else 0.1)]
        if consumers:
            there, back = scale * rng.integers(0, 3, 2)
            yield Value(
                producer=first,
                consumers=tuple(consumers),
                forward_bytes_per_row=float(there),
                backward_bytes_per_row=float(back),
            )


def _additive(rng: np.random.Generator, num_ops: int, recompute: bool) -> AdditiveCosts:
    def times() -> OpTimes:
        weight_fixed, weight_row = rng.integers(0, 2, num_ops), rng.integers(0, 3, num_ops)
        return OpTimes(
            forward_fixed_s=rng.integers(0, 2, num_ops).astype(float),
            forward_row_s=rng.integers(0, 5, num_ops).astype(float),
            backward_fixed_s=(weight_fixed + rng.integers(0, 2, num_ops)).astype(float),
            backward_row_s=(weight_row + rng.integers(0, 5, num_ops)).astype(float),
            weight_fixed_s=weight_fixed.astype(float),
            weight_row_s=weight_row.astype(float),
            update_s=rng.integers(0, 3, num_ops).astype(float),
        )

    return AdditiveCosts(
        times={kind: times() for kind in KINDS},
        static_bytes=rng.integers(0, 6, num_ops).astype(float),
        saved_bytes_per_row=rng.integers(0, 4, num_ops).astype(float),
        gradient_bytes=rng.integers(0, 4, num_ops).astype(float),
        recompute=recompute,
    )


def _options(rng: np.random.Generator, num_ops: int) -> OptionCosts:
    """An oracle without any structure: what two stages cost says nothing of a third."""
    seed = int(rng.integers(2**31))

    def options(ops: Ops, devices: tuple[int, ...], rows: int) -> list[StageOption]:
        own = np.random.default_rng([seed, rows, *ops, 99, *devices])
        result = []
        for _ in range(own.integers(0 if len(ops) > 2 else 1, 3)):
            weight = float(own.integers(0, 4))
            result.append(
                StageOption(
                    name="any",
                    forward_s=float(own.integers(0, 9) * len(ops)),
                    backward_s=weight + float(own.integers(0, 9) * len(ops)),
                    weight_s=weight,
                    end_s=float(own.integers(0, 5)),
                    static_bytes=tuple(own.integers(0, 12, len(devices)).astype(float).tolist()),
                    saved_bytes=tuple(own.integers(0, 6, len(devices)).astype(float).tolist()),
                    rows=(rows,) * len(devices),
                )
            )
        return result

    return OptionCosts(options=options)


# -------------------------------------------------------------------------------------------------------- enumeration


def best_by_enumeration(problem: InterProblem) -> float | None:
    """The least makespan (with `fixed_s`) of all pipelines; None where none fits."""
    cache_of_options: dict[tuple[frozenset[int], Ops, tuple[int, ...], int], list[StageOption]] = {}
    best = np.inf
    for m, schedule in product(problem.microbatch_counts, problem.schedules):
        chunk_counts = problem.chunk_counts if schedule == "interleaved" else (1,)
        for groups, chunks in product(_device_groups(problem), chunk_counts):
            if schedule == "interleaved" and (len(groups) < 2 or m % len(groups)):
                continue
            meshes = groups * chunks
            for stages in _splits(problem, len(meshes)):
                offers = []
                for s, mesh in enumerate(meshes):
                    key = (frozenset(chain(*stages[:s])), stages[s], mesh, m)
                    if key not in cache_of_options:
                        cache_of_options[key] = _offers(problem, *key)
                    offers.append(cache_of_options[key])
                moves = _moves(problem, stages, meshes, m)
                for options in product(*offers):
                    if _fits(problem, schedule, groups, chunks, m, options):
                        best = min(best, makespan(schedule, len(groups), chunks, m, options, moves, best))
    return best + problem.fixed_s if np.isfinite(best) else None


def _device_groups(problem: InterProblem) -> list[tuple[tuple[int, ...], ...]]:
    """Every way to cut a beginning of an order (all of it with `uses_all`) into sub-meshes of allowed sizes."""
    found = []
    for order in problem.orders:
        open_: list[tuple[tuple[int, ...], ...]] = [()]
        while open_:
            groups = open_.pop()
            used = sum(map(len, groups))
            for size in problem.stage_sizes:
                if used + size <= len(order):
                    open_.append((*groups, order[used : used + size]))
                    if not problem.uses_all or used + size == len(order):
                        found.append(open_[-1])
    return list(dict.fromkeys(found))


def _splits(problem: InterProblem, num_stages: int) -> list[tuple[Ops, ...]]:
    """Every assignment of ops to stages in which no op comes before one that it needs and no stage is empty."""
    pairs = problem.precedence()
    found = []
    for stage_of in product(range(num_stages), repeat=problem.num_ops):
        if len(set(stage_of)) == num_stages and all(stage_of[a] <= stage_of[b] for a, b in pairs):
            found.append(tuple(tuple(i for i in range(problem.num_ops) if stage_of[i] == s) for s in range(num_stages)))
    return found


def _moves(
    problem: InterProblem, stages: tuple[Ops, ...], meshes: tuple[tuple[int, ...], ...], m: int
) -> list[tuple[float, float]]:
    result = []
    for s in range(len(stages) - 1):
        before = set(chain(*stages[: s + 1]))
        crossing = [v for v in problem.values if v.producer in before and not before.issuperset(v.consumers)]
        times = []
        for source, target, sizes in (
            (meshes[s], meshes[s + 1], [v.forward_bytes_per_row for v in crossing]),
            (meshes[s + 1], meshes[s], [v.backward_bytes_per_row for v in crossing]),
        ):
            links = list(product(source, target))
            lane = sum(sizes) * (problem.batch_rows // m) / min(len(source), len(target))
            slowest = min(problem.links.bytes_per_s[a, b] for a, b in links)
            latency = max(problem.links.latency_s[a, b] for a, b in links)
            times.append(float(latency + lane / slowest) if sum(sizes) else 0.0)
        result.append((times[0], times[1]))
    return result


def _offers(
    problem: InterProblem, earlier: frozenset[int], ops: Ops, mesh: tuple[int, ...], m: int
) -> list[StageOption]:
    rows = problem.batch_rows // m
    if isinstance(problem.costs, OptionCosts):
        return list(problem.costs.options(ops, mesh, rows))
    costs = problem.costs
    assert isinstance(costs, AdditiveCosts)
    result = []
    for share in product(range(rows + 1), repeat=len(mesh)):
        if sum(share) == rows:
            result += _additive_options(problem, costs, earlier, ops, mesh, share)
    return result


def _additive_options(
    problem: InterProblem,
    costs: AdditiveCosts,
    earlier: frozenset[int],
    ops: Ops,
    mesh: tuple[int, ...],
    share: tuple[int, ...],
) -> Iterator[StageOption]:
    def time(part: str, g: int, r: int) -> float:
        times = costs.times[problem.devices[g].kind]
        return float(sum(getattr(times, f"{part}_fixed_s")[i] + r * getattr(times, f"{part}_row_s")[i] for i in ops))

    busy = [(g, r) for g, r in zip(mesh, share, strict=True) if r]
    forward = max(time("forward", g, r) for g, r in busy)
    backward = max(time("backward", g, r) for g, r in busy)
    inputs = max(time("backward", g, r) - time("weight", g, r) for g, r in busy)
    end = max(sum(costs.times[problem.devices[g].kind].update_s[i] for i in ops) for g in mesh)
    if len(mesh) > 1:
        links = list(permutations(mesh, 2))
        latency = max(problem.links.latency_s[a, b] for a, b in links)
        slowest = min(problem.links.bytes_per_s[a, b] for a, b in links)
        gradients = sum(costs.gradient_bytes[i] for i in ops)
        end += 2 * (len(mesh) - 1) * (latency + gradients / len(mesh) / slowest)
    static = float(sum(costs.static_bytes[i] for i in ops))
    saved = tuple(float(r * sum(costs.saved_bytes_per_row[i] for i in ops)) for r in share)
    plain = StageOption(
        name="",
        forward_s=forward,
        backward_s=backward,
        weight_s=backward - inputs,
        end_s=float(end),
        static_bytes=(static,) * len(mesh),
        saved_bytes=saved,
        rows=share,
    )
    yield plain
    if costs.recompute:
        kept = sum(
            v.forward_bytes_per_row
            for v in problem.values
            if v.producer in earlier and not earlier.issuperset(v.consumers)
        )
        yield StageOption(
            name="",
            forward_s=forward,
            backward_s=backward + forward,
            weight_s=plain.weight_s,
            end_s=plain.end_s,
            static_bytes=tuple(static + one for one in saved),
            saved_bytes=tuple(r * kept for r in share),
            rows=share,
        )


# -------------------------------------------------------------------------------------------------- memory and makespan


def _phase(task: Task) -> str:
    """F, B (with or without weight gradients), W, or FB."""
    if task.part == "weight":
        return "W"
    return "".join(phase.value[0].upper() for phase in task.phases)


@cache
def orders_of(schedule: str, groups: int, m: int, chunks: int) -> list[list[tuple[str, int, int]]]:
    """Per group the passes (F, B or W; stage; microbatch) in order."""
    return [
        [
            (kind, task.chunk * groups + s, task.microbatch)
            for task in tasks_of_stage(schedule, s, groups, m, chunks)
            for kind in _phase(task)
        ]
        for s in range(groups)
    ]


def _fits(
    problem: InterProblem,
    schedule: str,
    groups: tuple[tuple[int, ...], ...],
    chunks: int,
    m: int,
    options: tuple[StageOption, ...],
) -> bool:
    """Walk every group's tasks and count what its devices hold."""
    freed_by = "W" if schedule == "zero_bubble" else "B"
    for s, mesh in enumerate(groups):
        own = options[s :: len(groups)]
        for place, device in enumerate(mesh):
            held = peak = sum(option.static_bytes[place] for option in own)
            for kind, q, _ in orders_of(schedule, len(groups), m, chunks)[s]:
                size = options[q].saved_bytes[place]
                held += size if kind == "F" else -size if kind == freed_by else 0
                peak = max(peak, held)
            if peak > problem.devices[device].memory_bytes * (1 + 1e-12):
                return False
    return True


def makespan(
    schedule: str,
    groups: int,
    chunks: int,
    m: int,
    options: tuple[StageOption, ...],
    moves: list[tuple[float, float]],
    below: float,
) -> float:
    """Longest path over the tasks; infinite where one group's work alone reaches `below`."""
    work = [m * sum(o.forward_s + o.backward_s for o in options[s::groups]) for s in range(groups)]
    if max(work) >= below:
        return np.inf
    split = schedule == "zero_bubble"
    orders = orders_of(schedule, groups, m, chunks)
    ends: dict[tuple[str, int, int], float] = {}
    now, place, last = [0.0] * groups, [0] * groups, len(options) - 1
    while any(place[s] < len(orders[s]) for s in range(groups)):
        for s in range(groups):
            if place[s] == len(orders[s]):
                continue
            kind, q, k = orders[s][place[s]]
            needs = {
                "F": [(("F", q - 1, k), moves[q - 1][0])] if q else [],
                "B": [(("F", q, k), 0.0)] + ([(("B", q + 1, k), moves[q][1])] if q < last else []),
                "W": [(("B", q, k), 0.0)],
            }[kind]
            if any(need not in ends for need, _ in needs):
                continue
            option = options[q]
            late = option.weight_s if split else 0.0
            time_s = {"F": option.forward_s, "B": option.backward_s - late, "W": option.weight_s}[kind]
            now[s] = max([now[s], *(ends[need] + move for need, move in needs)]) + time_s
            ends[kind, q, k] = now[s]
            place[s] += 1
    return max(now[s] + sum(o.end_s for o in options[s::groups]) for s in range(groups))


# ------------------------------------------------------------------------------------------------- where pipelines pay


def chain_problem(
    num_ops: int,
    kinds: tuple[str, ...],
    *,
    num_microbatches: int,
    batch_rows: int,
    row_s: dict[str, float],
    saved: float = 0.0,
    weight: float = 1.0,
    crossing: float = 0.0,
) -> InterProblem:
    """A chain of equal ops: forward 1, backward 2 times `row_s` of the device's kind for every row, `weight` of it for
    weight gradients; links of one byte a second."""

    def times(one: float) -> OpTimes:
        zero, row = np.zeros(num_ops), np.full(num_ops, one)
        return OpTimes(
            forward_fixed_s=zero,
            forward_row_s=row,
            backward_fixed_s=zero,
            backward_row_s=2 * row,
            weight_fixed_s=zero,
            weight_row_s=weight * row,
            update_s=zero,
        )

    zero = np.zeros(num_ops)
    return InterProblem(
        num_ops=num_ops,
        devices=tuple(InterDevice(name=f"{kind}{g}", kind=kind) for g, kind in enumerate(kinds)),
        links=Links.uniform(len(kinds), 0.0, 1.0),
        costs=AdditiveCosts(
            times={kind: times(one) for kind, one in row_s.items()},
            static_bytes=zero,
            saved_bytes_per_row=zero + saved,
            gradient_bytes=zero,
        ),
        batch_rows=batch_rows,
        microbatch_counts=(num_microbatches,),
        values=tuple(
            Value(producer=i, consumers=(i + 1,), forward_bytes_per_row=crossing, backward_bytes_per_row=crossing)
            for i in range(num_ops - 1)
        ),
    )


@st.composite
def long_pipelines(draw: st.DrawFn) -> InterProblem:
    """Chains of unequal ops with cheap transfers and many microbatches, one schedule at a time."""
    num_ops, num_devices = draw(st.integers(4, 7)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    schedule = draw(st.sampled_from(SCHEDULES))
    problem = chain_problem(num_ops, KINDS[:1] * num_devices, num_microbatches=4, batch_rows=12, row_s={"fast": 1.0})
    tight = draw(st.sampled_from([1.0, 1.5, np.inf]))
    return replace(
        problem,
        devices=tuple(
            InterDevice(name=f"d{g}", kind=str(rng.choice(KINDS)), memory_bytes=float(tight * rng.integers(30, 90)))
            for g in range(num_devices)
        ),
        costs=_additive(rng, num_ops, False),
        links=Links(
            latency_s=0.5 * rng.integers(0, 3, (num_devices, num_devices)),
            bytes_per_s=10.0 + rng.integers(0, 40, (num_devices, num_devices)),
        ),
        values=tuple(_values(rng, num_ops, "chain", draw(st.sampled_from([0.0, 1.0, 10.0])))),
        schedules=(schedule,),
        microbatch_counts=draw(st.sampled_from([(4,), (6, 12), (3, 12)])),
    )
