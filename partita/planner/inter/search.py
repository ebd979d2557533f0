"""Best-first branch and bound over settings and stages.

A node is a set of pipelines with a proven lower bound; the heap holds disjoint nodes that cover all pipelines not yet
priced, except those whose bound is at least the best makespan found. So at any moment the optimum is at least
the smaller of that makespan and the least bound in the heap. The search ends when they meet (the optimum is proven),
or at a limit of nodes or time (the rest is the gap).
Source: best-first search as in A* (Hart et al. 1968), the completion bound being the dynamic programme over what is
left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Protocol

import numpy as np

from partita.planner.inter.incumbent import even_pipelines
from partita.planner.inter.labels import Array, StageTimes, put_in_front
from partita.planner.inter.pipeline import Choice, Pipelines, Setting, setting_bound_s
from partita.planner.inter.schedule_time import PipelineTimes, makespan_s
from partita.planner.inter.tables import Tables

ROUNDING = 1e-10  # sums in another order differ by rounding
_LARGE_CELLS = 2e9  # (stages x places x sizes x down-sets^2) up to which the cells of a setting are computed
_FIRST_PASS = 2e6  # and from which even stages give a first pipeline


class Node(Protocol):
    """A set of pipelines: `expand` pushes parts that cover it, or offers what it holds."""

    def expand(self, search: Search) -> None: ...


@dataclass(frozen=True)
class Found:
    """A pipeline that fits and its makespan."""

    setting: Setting
    choices: tuple[Choice, ...]
    makespan_s: float


@dataclass
class Search:
    """The heap and the best pipelines. `keep`: how many of them; `worth_s`: others need not be told apart."""

    tables: Tables
    max_nodes: int
    deadline: float
    gap: float = 0.0  # relative: ends where it is proven
    keep: int = 4
    worth_s: float = np.inf
    best: list[Found] = field(default_factory=list)
    num_nodes: int = 0
    num_labels: int = 0
    unproven_s: float = np.inf  # the least bound of nodes that were given up
    _heap: list[tuple[float, int, int, Node]] = field(default_factory=list)
    _count: count[int] = field(default_factory=count)
    _seen: set[tuple[Setting, tuple[Choice, ...]]] = field(default_factory=set)

    @property
    def best_s(self) -> float:
        """The makespan that is to be undercut."""
        return min(self.best[0].makespan_s, self.worth_s) if self.best else self.worth_s

    @property
    def cutoff_s(self) -> float:
        """What a bound must be below to matter."""
        return self.best_s * (1 - ROUNDING)

    def push(self, bound_s: float, depth: int, node: Node) -> None:
        if bound_s < self.cutoff_s:
            heapq.heappush(self._heap, (bound_s, -depth, next(self._count), node))

    def offer(self, setting: Setting, choices: tuple[Choice, ...]) -> None:
        """Price a pipeline that fits the memory."""
        if (setting, choices) in self._seen:
            return
        self._seen.add((setting, choices))
        times = times_of(self.tables, setting, choices)
        self.best.append(Found(setting, choices, makespan_s(setting.schedule, times, setting.num_microbatches)))
        self.best.sort(key=lambda found: found.makespan_s)
        del self.best[self.keep :]

    def give_up(self, bound_s: float) -> None:
        self.unproven_s = min(self.unproven_s, bound_s)

    def run(self) -> float:
        """Search; returns the proven lower bound of the makespan (infinite where nothing fits)."""
        while self._heap and self._heap[0][0] < self.cutoff_s:
            near = self._heap[0][0] >= self.best_s * (1 - self.gap)
            enough = near or self.num_nodes >= self.max_nodes
            if (enough and self.best) or time.monotonic() > self.deadline:
                self.give_up(self._heap[0][0])
                break
            self.num_nodes += 1
            heapq.heappop(self._heap)[-1].expand(self)
        return min(self.best_s, self.unproven_s)


def times_of(tables: Tables, setting: Setting, choices: Sequence[Choice]) -> PipelineTimes:
    """The times of a pipeline's stages, the end of a group being the sum over its chunks."""
    m, num_groups = setting.num_microbatches, len(choices) // setting.num_chunks
    picked = [tables.of(devices_of(setting, c), m)[c.option] for c in choices]
    at = [(c.low, c.high) for c in choices]
    ends = [0.0] * num_groups
    for q, (table, pair) in enumerate(zip(picked, at, strict=True)):
        ends[q % num_groups] += float(table.end_s[pair])
    moves = [_transfer(tables, setting, one, two) for one, two in pairwise(choices)]
    return PipelineTimes(
        forward_s=[float(table.forward_s[pair]) for table, pair in zip(picked, at, strict=True)],
        backward_s=[float(table.backward_s[pair]) for table, pair in zip(picked, at, strict=True)],
        weight_s=[float(table.weight_s[pair]) for table, pair in zip(picked, at, strict=True)],
        end_s=ends,
        forward_transfer_s=[there for there, _ in moves],
        backward_transfer_s=[back for _, back in moves],
    )


def devices_of(setting: Setting, choice: Choice) -> tuple[int, ...]:
    return setting.order[choice.place : choice.place + choice.num_devices]


def _transfer(tables: Tables, setting: Setting, one: Choice, two: Choice) -> tuple[float, float]:
    there, back = tables.transfers(
        devices_of(setting, one), devices_of(setting, two), np.array([one.high]), setting.num_microbatches
    )
    return float(there[0]), float(back[0])


@dataclass(frozen=True)
class SettingNode:
    """All pipelines of a setting (not the interleaved schedule)."""

    setting: Setting
    bound_s: float

    def expand(self, search: Search) -> None:
        tables, sizes = search.tables, tuple(search.tables.sizes(self.setting.num_devices))
        work = self._work(tables, sizes)
        if work > _FIRST_PASS:
            for d in sizes:
                groups = self.setting.num_devices // d
                if self.setting.num_stages in (None, groups):
                    for choices in even_pipelines(tables, self.setting, groups):
                        search.offer(self.setting, choices)
        if work > _LARGE_CELLS:
            search.give_up(self.bound_s)
            return
        most = 64 if len(tables.family) <= 64 else 8 if len(tables.family) <= 200 else 2
        pipelines = Pipelines(tables, self.setting, search.cutoff_s, most, sizes)
        search.num_labels += sum(len(cell.state) for cell in pipelines.cells.values())
        self._offer_best(search, pipelines)
        least: dict[int, float] = {}
        for bound_s, (num_stages, _, _), _ in pipelines.roots():
            least.setdefault(num_stages, bound_s)
        for num_stages, bound_s in least.items():
            search.push(max(bound_s, self.bound_s), 0, PrefixNode(pipelines, (), num_stages))

    def _offer_best(self, search: Search, pipelines: Pipelines) -> None:
        for _, key, column in pipelines.roots()[:2]:
            search.offer(self.setting, pipelines.trace(key, column))

    def _work(self, tables: Tables, sizes: tuple[int, ...]) -> float:
        """Pairs of down-sets that the cells look at, cut-off ignored; with one size, j follows from the place."""
        count = self.setting.num_devices
        stages = min(count // min(sizes), tables.problem.num_ops) if len(sizes) > 1 else 1
        return float(stages * count * len(sizes)) * len(tables.family) ** 2


@dataclass(frozen=True, eq=False)
class PrefixNode:
    """All pipelines of a setting that begin with given stages and have `left` more."""

    pipelines: Pipelines
    prefix: tuple[Choice, ...]
    left: int

    def expand(self, search: Search) -> None:
        pipelines, setting = self.pipelines, self.pipelines.setting
        low = self.prefix[-1].high if self.prefix else 0
        place = self.prefix[-1].place + self.prefix[-1].num_devices if self.prefix else 0
        for d in search.tables.sizes(setting.num_devices - place):
            behind = pipelines.behind(self.left, place, d)
            if behind is None:
                continue
            for option, (labels, valid) in enumerate(pipelines.in_front(self.left, place, d, behind, np.array([low]))):
                columns = np.flatnonzero(valid[0])
                if len(columns) == 0:
                    continue
                bounds = self._through(search.tables, labels[:, 0, columns], low, place, d)
                highs = behind.high[columns]
                for high in np.unique(highs).tolist():
                    bound_s = float(bounds[highs == high].min())
                    if bound_s < search.cutoff_s:
                        self._child(search, Choice(low, high, place, d, option), bound_s)

    def _child(self, search: Search, choice: Choice, bound_s: float) -> None:
        prefix = (*self.prefix, choice)
        if self.left == 1:
            search.offer(self.pipelines.setting, prefix)
        else:
            search.push(bound_s, len(prefix), PrefixNode(self.pipelines, prefix, self.left - 1))

    def _through(self, tables: Tables, labels: Array, low: int, place: int, d: int) -> Array:
        """E of whole pipelines: the prefix put in front of labels of stages that begin at (low, place, d)."""
        setting = self.pipelines.setting
        parts: tuple[Array, ...] = tuple(labels)
        following = Choice(low, low, place, d, 0)
        for i, choice in enumerate(reversed(self.prefix)):
            table = tables.of(devices_of(setting, choice), setting.num_microbatches)[choice.option]
            at = (choice.low, choice.high)
            there_s, back_s = _transfer(tables, setting, choice, following)
            stage = StageTimes(
                table.forward_s[at], table.backward_s[at], table.weight_s[at], table.end_s[at], there_s, back_s
            )
            parts = put_in_front(setting.group_order(self.left + 1 + i), stage, parts)
            following = choice
        return parts[3]


def settings_of(tables: Tables) -> list[tuple[float, Setting]]:
    """Every setting of the schedules with one chunk, with its bound; those without any pipeline are left out."""
    problem = tables.problem
    found = []
    for m in problem.microbatch_counts:
        for schedule in problem.schedules:
            if schedule == "interleaved":
                continue
            for order in problem.beginnings():
                stages: Sequence[int | None] = (None,)
                if schedule == "zero_bubble":
                    least = -(-len(order) // max(problem.stage_sizes))
                    stages = range(least, min(len(order) // min(problem.stage_sizes), problem.num_ops) + 1)
                for num_stages in stages:
                    setting = Setting(order=order, schedule=schedule, num_microbatches=m, num_stages=num_stages)
                    bound_s = setting_bound_s(tables, setting)
                    if np.isfinite(bound_s):
                        found.append((bound_s * (1 - ROUNDING), setting))
    return found
