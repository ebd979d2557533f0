"""What a solution costs, computed again from the problem alone.

Nothing of the solver's tables is used: the ops, devices and options of the solution are checked against the problem,
the costs are asked anew for just the stages' down-sets, transfers are summed over values, memory is counted along the
task orders, and the makespan is the longest path over the graph of all tasks (an edge for each thing that a task
waits for), visited in topological order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from partita.planner.inter.family import Family
from partita.planner.inter.problem import InterProblem
from partita.planner.inter.schedule_time import passes_of_group
from partita.planner.inter.solve import InterSolution, InterStage

Task = tuple[str, int, int]  # kind, stage, microbatch


@dataclass(frozen=True, kw_only=True)
class PricedInter:
    """`broken`: the rules that the solution breaks, in words; empty for a valid one."""

    objective_s: float
    memory_bytes: dict[int, float]
    broken: tuple[str, ...]


def price_inter(problem: InterProblem, solution: InterSolution) -> PricedInter:
    """Price a solution and list the rules that it breaks."""
    memory = _memory(solution)
    broken = [*_broken_stages(problem, solution), *_broken_options(problem, solution)]
    for device, need in sorted(memory.items()):
        limit = problem.devices[device].memory_bytes
        if need > limit * (1 + 1e-9):
            broken.append(f"{problem.devices[device].name} needs {need:.0f} bytes of {limit:.0f}")
    return PricedInter(
        objective_s=problem.fixed_s + _longest_path_s(problem, solution),
        memory_bytes=memory,
        broken=tuple(broken),
    )


def _broken_stages(problem: InterProblem, solution: InterSolution) -> Iterator[str]:
    stages, groups = solution.stages, solution.num_groups
    stage_of = {op: s for s, stage in enumerate(stages) for op in stage.ops}
    if sorted(op for stage in stages for op in stage.ops) != list(range(problem.num_ops)):
        yield "every op must be in exactly one stage"
    elif any(stage_of[first] > stage_of[second] for first, second in problem.precedence()):
        yield "an op must not be in an earlier stage than what it needs"
    if any(not stage.ops for stage in stages):
        yield "a stage must hold an op"
    used = tuple(device for stage in stages[:groups] for device in stage.devices)
    if used not in problem.beginnings():
        whole = "hold an order" if problem.uses_all else "follow each other from the beginning of an order"
        yield f"the sub-meshes must {whole}"
    if any(len(stage.devices) not in problem.stage_sizes for stage in stages):
        yield "a stage's number of devices must be in stage_sizes"
    if any(stage.devices != stages[q % groups].devices for q, stage in enumerate(stages)):
        yield "the chunks of a group must be on the same devices"
    if solution.schedule not in problem.schedules or solution.num_microbatches not in problem.microbatch_counts:
        yield "schedule and microbatch count must be candidates"
    if solution.schedule == "interleaved":
        if solution.num_microbatches % groups or groups < 2 or solution.num_chunks not in problem.chunk_counts:
            yield "interleaved needs a candidate number of chunks, two groups and a multiple of them of microbatches"
    elif solution.num_chunks != 1:
        yield "only the interleaved schedule has chunks"


def _broken_options(problem: InterProblem, solution: InterSolution) -> Iterator[str]:
    done: set[int] = set()
    rows = problem.rows(solution.num_microbatches)
    for s, stage in enumerate(solution.stages):
        family = _stage_family(problem, done, stage)
        ends = [set(np.flatnonzero(row).tolist()) for row in family.sets]
        low, high = ends.index(done), ends.index(done | set(stage.ops))
        tables = problem.costs.tables(problem, family, stage.devices, rows)
        offered = [table.option(low, high) for table in tables if np.isfinite(table.forward_s[low, high])]
        if not any(_same(stage, offer) for offer in offered):
            yield f"stage {s} has an option that the costs do not offer: {stage.option}"
        done |= set(stage.ops)


def _same(stage: InterStage, offer: object) -> bool:
    """Equal to rounding."""
    one, two = vars(stage.option), vars(offer)
    return one["rows"] == two["rows"] and all(
        np.allclose(one[key], two[key], rtol=1e-9, atol=1e-12) for key in one if key not in ("name", "rows")
    )


def _stage_family(problem: InterProblem, done: set[int], stage: InterStage) -> Family:
    """The down-sets of one stage alone, with the empty one and all ops."""
    ends = [set[int](), done, done | set(stage.ops), set(range(problem.num_ops))]
    sets = np.array([[op in end for op in range(problem.num_ops)] for end in ends])
    sets = sets[[i for i in range(4) if i == 0 or ends[i] != ends[i - 1]]]
    sizes = sets.sum(axis=1)
    inside = sizes[:, None] < sizes[None, :]
    crossing = [_crossing(problem, set(np.flatnonzero(row).tolist())) for row in sets]
    there, back = np.array(crossing).T
    return Family(sets=sets, inside=inside, forward_bytes=there, backward_bytes=back, complete=False)


def _crossing(problem: InterProblem, done: set[int]) -> tuple[float, float]:
    """Bytes of one row that cross the boundary after `done`, there and back."""
    values = [v for v in problem.values if v.producer in done and not done.issuperset(v.consumers)]
    return (
        float(sum(v.forward_bytes_per_row for v in values)),
        float(sum(v.backward_bytes_per_row for v in values)),
    )


def _memory(solution: InterSolution) -> dict[int, float]:
    """Peak bytes by walking every group's task order."""
    groups, freed_by = solution.num_groups, "W" if solution.schedule == "zero_bubble" else "B"
    result: dict[int, float] = {}
    for s in range(groups):
        own = solution.stages[s::groups]
        for place, device in enumerate(own[0].devices):
            held = peak = sum(stage.option.static_bytes[place] for stage in own)
            for kind, chunk, _ in _passes(solution, s):
                size = own[chunk].option.saved_bytes[place]
                held += size if kind == "F" else -size if kind == freed_by else 0.0
                peak = max(peak, held)
            result[device] = peak
    return result


def _passes(solution: InterSolution, group: int) -> Sequence[tuple[str, int, int]]:
    return passes_of_group(
        solution.schedule, group, solution.num_groups, solution.num_microbatches, solution.num_chunks
    )


def _moves(problem: InterProblem, solution: InterSolution) -> list[tuple[float, float]]:
    """Transfer times of one microbatch between neighbouring stages, there and back."""
    done: set[int] = set()
    rows, result = problem.rows(solution.num_microbatches), []
    for one, two in pairwise(solution.stages):
        done |= set(one.ops)
        times = []
        for num_bytes, source, target in zip(
            _crossing(problem, done), (one.devices, two.devices), (two.devices, one.devices), strict=True
        ):
            latency_s = max(problem.links.latency_s[a, b] for a in source for b in target)
            bytes_per_s = min(problem.links.bytes_per_s[a, b] for a in source for b in target)
            lanes = min(len(source), len(target))
            times.append(float(latency_s + rows * num_bytes / lanes / bytes_per_s) if num_bytes else 0.0)
        result.append((times[0], times[1]))
    return result


def _longest_path_s(problem: InterProblem, solution: InterSolution) -> float:
    """The makespan by Kahn's algorithm over all tasks; infinite where they wait in a circle."""
    stages, groups = solution.stages, solution.num_groups
    split, moves, last = solution.schedule == "zero_bubble", _moves(problem, solution), len(stages) - 1
    after: dict[Task, list[tuple[Task, float]]] = defaultdict(list)
    missing: dict[Task, int] = {}
    for group in range(groups):
        order = [(kind, chunk * groups + group, i) for kind, chunk, i in _passes(solution, group)]
        for place, task in enumerate(order):
            kind, q, i = task
            needs: list[tuple[Task, float]] = [(order[place - 1], 0.0)] if place else []
            if kind == "F" and q:
                needs.append((("F", q - 1, i), moves[q - 1][0]))
            if kind == "B" and q < last:
                needs.append((("B", q + 1, i), moves[q][1]))
            if kind != "F":
                needs.append((("F" if kind == "B" else "B", q, i), 0.0))
            missing[task] = len(needs)
            for need, move_s in needs:
                after[need].append((task, move_s))
    start_s: dict[Task, float] = defaultdict(float)
    ready, ends_s = [task for task, count in missing.items() if count == 0], [0.0] * groups
    while ready:
        task = ready.pop()
        option = stages[task[1]].option
        late_s = option.weight_s if split else 0.0
        own_s = {"F": option.forward_s, "B": option.backward_s - late_s, "W": option.weight_s}[task[0]]
        end_s = start_s[task] + own_s
        ends_s[task[1] % groups] = max(ends_s[task[1] % groups], end_s)
        for other, move_s in after[task]:
            start_s[other] = max(start_s[other], end_s + move_s)
            missing[other] -= 1
            if missing[other] == 0:
                ready.append(other)
    if any(missing.values()):
        return float("inf")  # the task orders wait in a circle
    return max(end + sum(stage.option.end_s for stage in stages[s::groups]) for s, end in enumerate(ends_s))
