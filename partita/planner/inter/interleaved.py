"""Branch and bound over the chunks of the interleaved schedule.

Stage q of Q = v S runs on group q mod S, so the chunks of a group share devices and memory, and no label over a suffix
can hold them. Nodes are prefixes of chunks; with T_s the sum of f + b over the chunks of group s so far, d_s its
devices, x, y transfers there and back, J the ops so far, a node's bound is the largest of
    sum of (f + x + y + b) so far + rest_path[J]                                    (one microbatch there and back)
    sum over q < s of (f_q + x_q) + m T_s + max(end_s, sum over q < s of (b_q + y_q))         (all work of group s)
    m (sum over s of d_s T_s + rest_device_seconds[J]) / L                      (the largest load is at least the mean)
rest_path[J], rest_device_seconds[J]: shortest paths over down-sets from J, a stage counting its least f + b, or the
least d (f + b), over all sub-meshes of the setting.
Memory: static bytes of all chunks of a group and, at every moment of the task order, the sum over chunks of saved bytes
times microbatches in flight (`schedule_time.chunk_peaks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from partita.planner.inter.incumbent import even_pipelines, fits_memory
from partita.planner.inter.labels import Array
from partita.planner.inter.pipeline import Choice, Setting
from partita.planner.inter.search import ROUNDING, Search, times_of
from partita.planner.inter.tables import Tables


@dataclass(frozen=True, eq=False)
class Rest:
    """Bounds on what is left after a down-set: F entries each."""

    path_s: Array
    device_s: Array


@dataclass(frozen=True, eq=False)
class ChunkNode:
    """All interleaved pipelines of a setting that begin with given chunks."""

    setting: Setting
    rest: Rest
    choices: tuple[Choice, ...] = ()

    def expand(self, search: Search) -> None:
        tables, m = search.tables, self.setting.num_microbatches
        if not self.choices:
            assert self.setting.num_stages is not None
            for choices in even_pipelines(tables, self.setting, self.setting.num_stages):
                search.offer(self.setting, choices)
        low = self.choices[-1].high if self.choices else 0
        for place, d in self._next_devices(tables):
            devices = self.setting.order[place : place + d]
            for option, fits in enumerate(tables.fits(devices, m, 1)):
                for high in np.flatnonzero(fits[low] & self._ends(tables)).tolist():
                    self._child(search, Choice(low, high, place, d, option))

    def _child(self, search: Search, choice: Choice) -> None:
        choices = (*self.choices, choice)
        if not fits_memory(search.tables, self.setting, choices):
            return
        if len(choices) == self._num_chunks:
            search.offer(self.setting, choices)
            return
        bound_s = self._bound_s(search.tables, choices) * (1 - ROUNDING)
        search.push(bound_s, len(choices), ChunkNode(self.setting, self.rest, choices))

    @cached_property
    def _num_chunks(self) -> int:
        assert self.setting.num_stages is not None
        return self.setting.num_stages * self.setting.num_chunks

    def _next_devices(self, tables: Tables) -> Iterator[tuple[int, int]]:
        """(place, number) of the next chunk's devices."""
        groups, q = self.setting.num_stages, len(self.choices)
        assert groups is not None
        if q >= groups:
            yield self.choices[q - groups].place, self.choices[q - groups].num_devices
            return
        place = self.choices[-1].place + self.choices[-1].num_devices if self.choices else 0
        room = self.setting.num_devices - place
        sizes = tables.sizes(room)
        for d in sizes:
            after, more = room - d, groups - q - 1
            if more * sizes[0] <= after <= more * sizes[-1]:
                yield place, d

    def _ends(self, tables: Tables) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Down-sets that leave an op at least for every chunk that follows."""
        left = self._num_chunks - len(self.choices) - 1
        sizes = tables.family.sets.sum(axis=1)
        return np.asarray(sizes == sizes[-1] if left == 0 else sizes <= sizes[-1] - left)

    def _bound_s(self, tables: Tables, choices: tuple[Choice, ...]) -> float:
        groups, m = self.setting.num_stages, self.setting.num_microbatches
        assert groups is not None
        known = min(groups, len(choices))
        times = times_of(tables, self.setting, choices, num_groups=groups)
        passes = [f + b for f, b in zip(times.forward_s, times.backward_s, strict=True)]
        loads = [sum(passes[s::groups]) for s in range(known)]
        moved = sum(times.forward_transfer_s) + sum(times.backward_transfer_s)
        bound_s = sum(passes) + moved + float(self.rest.path_s[choices[-1].high])
        there = back = spent = 0.0
        for s in range(known):
            bound_s = max(bound_s, there + m * loads[s] + max(times.end_s[s], back))
            spent += choices[s].num_devices * loads[s]
            if s + 1 < len(choices):
                there += times.forward_s[s] + times.forward_transfer_s[s]
                back += times.backward_s[s] + times.backward_transfer_s[s]
        mean = m * (spent + float(self.rest.device_s[choices[-1].high])) / self.setting.num_devices
        return max(bound_s, mean)


def rest_of(tables: Tables, order: tuple[int, ...], num_microbatches: int) -> Rest:
    """The bounds of a setting on the devices of `order`."""
    shape = tables.family.inside.shape
    least, device_s = np.full(shape, np.inf), np.full(shape, np.inf)
    for d in tables.sizes(len(order)):
        meshes = {tables.key(order[p : p + d]): order[p : p + d] for p in range(len(order) - d + 1)}
        for mesh in meshes.values():
            one = tables.least_pass(mesh, num_microbatches)
            np.minimum(least, one, out=least)
            np.minimum(device_s, d * one, out=device_s)
    return Rest(_to_the_end(least), _to_the_end(device_s))


def _to_the_end(costs: Array) -> Array:
    rest = np.full(len(costs), np.inf)
    rest[-1] = 0.0
    for low in range(len(costs) - 2, -1, -1):
        rest[low] = (costs[low] + rest).min()
    return rest


def push_interleaved(search: Search) -> None:
    """The root nodes of every interleaved setting."""
    problem, tables = search.tables.problem, search.tables
    prefixes = dict.fromkeys(order[:length] for order in problem.orders for length in range(2, len(order) + 1))
    least, most = min(problem.stage_sizes), max(problem.stage_sizes)
    for m in problem.microbatch_counts:
        for order in prefixes:
            rest: Rest | None = None
            for groups in range(2, len(order) // least + 1):
                if m % groups or groups * most < len(order):
                    continue
                rest = rest_of(tables, order, m) if rest is None else rest
                bound_s = max(float(rest.path_s[0]), m * float(rest.device_s[0]) / len(order)) * (1 - ROUNDING)
                for chunks in problem.chunk_counts:
                    if groups * chunks <= problem.num_ops and np.isfinite(bound_s):
                        setting = Setting(
                            order=order,
                            schedule="interleaved",
                            num_microbatches=m,
                            num_stages=groups,
                            num_chunks=chunks,
                        )
                        search.push(bound_s, 0, ChunkNode(setting, rest))
