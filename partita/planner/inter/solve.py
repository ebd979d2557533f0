"""From an inter-stage problem to its best pipeline, with a proven lower bound over the whole space.

The objective is the makespan (`problem`). `search` visits settings and stages by their bounds; `pipeline` computes the
bounds of a setting by dynamic programming, `interleaved` those of chunks. What is proven at the end: no pipeline of
the space (boundaries in the family, orders, sizes, options, shares, m, schedules as given) has a makespan below
`lower_bound_s`. On small instances it meets the objective; large ones end at `max_nodes` or `time_limit_s`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from partita.errors import InfeasibleError
from partita.planner.inter.costs import StageOption
from partita.planner.inter.family import family_of
from partita.planner.inter.incumbent import even_pipelines
from partita.planner.inter.infeasible import explain_infeasible
from partita.planner.inter.interleaved import push_interleaved
from partita.planner.inter.pipeline import Setting
from partita.planner.inter.problem import InterProblem
from partita.planner.inter.schedule_time import chunk_peaks, in_flight
from partita.planner.inter.search import Found, Search, SettingNode, devices_of, settings_of
from partita.planner.inter.tables import Tables
from partita.units import gap_of


@dataclass(frozen=True, kw_only=True)
class InterStage:
    """One stage: stage q of an interleaved pipeline runs on the devices of q mod S."""

    ops: tuple[int, ...]
    devices: tuple[int, ...]
    option: StageOption


@dataclass(frozen=True, kw_only=True)
class InterSolution:
    """The best pipeline found.

    Attributes:
        stages: in order; v S of them for v chunks.
        objective_s: predicted step time; `lower_bound_s`: no pipeline of the space is below; `gap` relative.
        memory_bytes: peak of each used device.
        complete: whether all down-sets were possible boundaries.
        num_labels, num_nodes: size of the search; `time_s` what it took.
        alternatives: the next best pipelines that were priced (objective_s and stages' devices and ops).
    """

    stages: tuple[InterStage, ...]
    num_microbatches: int
    schedule: str
    num_chunks: int
    order: tuple[int, ...]
    objective_s: float
    lower_bound_s: float
    memory_bytes: dict[int, float]
    complete: bool
    num_labels: int
    num_nodes: int
    time_s: float
    alternatives: tuple[InterSolution, ...] = ()

    @property
    def gap(self) -> float:
        return gap_of(self.objective_s, self.lower_bound_s)

    @property
    def num_groups(self) -> int:
        return len(self.stages) // self.num_chunks


def solve_inter(
    problem: InterProblem,
    *,
    gap: float = 0.0,
    max_nodes: int = 20_000,
    time_limit_s: float = 10.0,
    worth_s: float = np.inf,
) -> InterSolution:
    """The best pipeline, searched until the relative gap is proven to be at most `gap`, or to one of the limits
    (that of nodes counts once a pipeline is found). Pipelines that take `worth_s` or longer are not told apart: the
    search ends when none is below.

    Raises `InfeasibleError` where no pipeline fits, naming the limit and the smallest change, or is below `worth_s`.

    Example: see `tests/planner/test_planner_inter_solve.py`.
    """
    begin = time.monotonic()
    tables = Tables(problem, family_of(problem))
    search = Search(tables, max_nodes, begin + time_limit_s, gap, worth_s=worth_s - problem.fixed_s)
    settings = []
    for bound_s, setting in sorted(settings_of(tables), key=lambda one: one[0]):
        search.push(bound_s, 0, SettingNode(setting, bound_s))
        settings.append(setting)
    if "interleaved" in problem.schedules:
        settings += push_interleaved(search)
    _offer_even(search, settings, begin + 0.5 * time_limit_s)
    lower_bound_s = search.run()
    if not search.best:
        if np.isfinite(search.unproven_s):
            raise InfeasibleError(
                f"No pipeline was found that fits within time_limit_s={time_limit_s:g}, and none was proven not to "
                "exist. Raise it, or give fewer orders, sizes or microbatch counts."
            )
        if np.isfinite(worth_s):
            raise InfeasibleError(f"No pipeline that fits takes less than worth_s={worth_s:g}.")
        raise explain_infeasible(tables)
    solutions = [_solution(tables, found, search, lower_bound_s, begin) for found in reversed(search.best)]
    best = solutions.pop()
    return InterSolution(**{**vars(best), "alternatives": tuple(reversed(solutions))})


def _offer_even(search: Search, settings: list[Setting], deadline: float) -> None:
    """A first pipeline of every setting that uses all devices of its order: schedules with weak bounds must not keep
    the search from finding those of others."""
    tables = search.tables
    whole = set(tables.problem.orders)
    for setting in settings:
        for d in tables.sizes(setting.num_devices) if setting.order in whole else ():
            if time.monotonic() > deadline:
                return
            groups = setting.num_devices // d
            if setting.num_stages in (None, groups):
                for choices in even_pipelines(tables, setting, groups):
                    search.offer(setting, choices)


def _solution(tables: Tables, found: Found, search: Search, lower_bound_s: float, begin: float) -> InterSolution:
    setting, problem = found.setting, tables.problem
    stages = tuple(
        InterStage(
            ops=tables.family.ops(c.low, c.high),
            devices=devices_of(setting, c),
            option=tables.of(devices_of(setting, c), setting.num_microbatches)[c.option].option(c.low, c.high),
        )
        for c in found.choices
    )
    return InterSolution(
        stages=stages,
        num_microbatches=setting.num_microbatches,
        schedule=setting.schedule,
        num_chunks=setting.num_chunks,
        order=setting.order,
        objective_s=found.makespan_s + problem.fixed_s,
        lower_bound_s=lower_bound_s + problem.fixed_s,
        memory_bytes=device_memory(stages, setting.schedule, setting.num_microbatches, setting.num_chunks),
        complete=tables.family.complete,
        num_labels=search.num_labels,
        num_nodes=search.num_nodes,
        time_s=time.monotonic() - begin,
    )


def device_memory(
    stages: tuple[InterStage, ...], schedule: str, num_microbatches: int, chunks: int
) -> dict[int, float]:
    """Peak bytes of every device that holds a stage."""
    groups = len(stages) // chunks
    memory = {}
    for s in range(groups):
        own = stages[s::groups]
        if chunks > 1:
            peaks = chunk_peaks(s, groups, num_microbatches, chunks)
        else:
            peaks = [(in_flight(schedule, s, groups, num_microbatches),)]
        for g, device in enumerate(own[0].devices):
            saved = [stage.option.saved_bytes[g] for stage in own]
            peak = max(sum(n * size for n, size in zip(held, saved, strict=True)) for held in peaks)
            memory[device] = sum(stage.option.static_bytes[g] for stage in own) + peak
    return memory
