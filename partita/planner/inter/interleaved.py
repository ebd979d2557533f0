"""Branch and bound over the chunks of the interleaved schedule.

Stage q of Q = v S runs on group q mod S, so the chunks of a group share devices and memory, and no label over a suffix
can hold them. First the groups' sizes are chosen (`GroupsNode`), then the chunks from the first op on (`ChunkNode`).
With T_s the sum of f + b over the chunks of group s so far, x, y transfers there and back, q the chunks so far and J
their ops, a node's bound is the largest of
    sum of (f + x + y + b) so far + path[q, J]                                      (one microbatch there and back)
    pre_s + m T_s + max(end_s, post_s)                                               (all work of group s)
    sum over s of weight_s (pre_s + m T_s + post_s) + m load[q, J]          (a mean of groups is at most the largest)
pre_s = sum over r < s of (f_r + x_r) and post_s = sum over r < s of (b_r + y_r), as far as known, come before the first
and after the last task of group s. path[q, J] and load[q, J] are shortest paths over down-sets for the chunks from q
on, each on its group and fitting its memory alone: of transfers + f + b, and of weight_(r mod S) (f + b), for the
weights 1 / S and (devices of s) / L.
Until the sizes are known: the least f + b, and the least (devices)(f + b) / L, on any sub-mesh of the setting.
Memory: static bytes of all chunks of a group and, at every moment of the task order, the sum over chunks of saved bytes
times microbatches in flight (`schedule_time.chunk_peaks`). Of options that hold the same ops, those that another one
undercuts in every time and byte are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from partita.planner.inter.incumbent import even_pipelines, fits_memory, peaks_of
from partita.planner.inter.labels import Array, Indices
from partita.planner.inter.pipeline import Choice, Setting
from partita.planner.inter.search import ROUNDING, Search
from partita.planner.inter.tables import Tables


@dataclass(frozen=True)
class GroupsNode:
    """All interleaved pipelines of a setting whose first groups have the given numbers of devices."""

    setting: Setting
    bound_s: float
    sizes: tuple[int, ...] = ()

    def expand(self, search: Search) -> None:
        tables, groups = search.tables, self.setting.num_stages
        assert groups is not None
        if not self.sizes:
            for choices in even_pipelines(tables, self.setting, groups):
                search.offer(self.setting, choices)
        if len(self.sizes) == groups:
            rest = Rest(tables, self.setting, self.sizes)
            root = ChunkNode(rest, (), 0.0, (0.0,) * groups, (0.0,) * groups, (0.0,), (0.0,))
            search.push(max(self.bound_s, root.bound_s() * (1 - ROUNDING)), len(self.sizes), root)
            return
        room, after = self.setting.num_devices - sum(self.sizes), groups - len(self.sizes) - 1
        sizes = tables.sizes(room)
        for d in sizes:
            if after * sizes[0] <= room - d <= after * sizes[-1]:
                search.push(self.bound_s, len(self.sizes), replace(self, sizes=(*self.sizes, d)))


class Rest:
    """Bounds on the chunks from q on, for given groups: `path_s` and each of `loads_s` are Q + 1 arrays of F."""

    def __init__(self, tables: Tables, setting: Setting, sizes: tuple[int, ...]) -> None:
        assert setting.num_stages is not None
        self.tables, self.setting, self.sizes = tables, setting, sizes
        self.groups, self.chunks, self.m = setting.num_stages, setting.num_chunks, setting.num_microbatches
        self.count = self.groups * self.chunks
        self.places = [sum(sizes[:s]) for s in range(self.groups)]
        self.weights = [[1 / self.groups] * self.groups, [d / setting.num_devices for d in sizes]]
        if self.weights[0] == self.weights[1]:
            del self.weights[1]
        passes = [self._passes(q) for q in range(self.count)]
        self.path_s = self._shortest([one + self._moves(q)[None, :] for q, one in enumerate(passes)])
        self.loads_s = [
            self._shortest([w[q % self.groups] * one for q, one in enumerate(passes)]) for w in self.weights
        ]

    def mesh(self, group: int) -> tuple[int, ...]:
        return self.setting.order[self.places[group] : self.places[group] + self.sizes[group]]

    def in_flight(self, q: int) -> int:
        """The most microbatches of chunk q in flight."""
        peaks = peaks_of(q % self.groups, self.groups, self.m, self.chunks)
        return max(held[q // self.groups] for held in peaks)

    def _passes(self, q: int) -> Array:
        return self.tables.passes(self.mesh(q % self.groups), self.m, self.in_flight(q))[0]

    def _moves(self, q: int) -> Array:
        """Both transfers at every boundary behind chunk q."""
        size = len(self.tables.family)
        if q + 1 == self.count:
            return np.zeros(size)
        there, back = self.moves(q, np.arange(size))
        return there + back

    def moves(self, q: int, cuts: Indices) -> tuple[Array, Array]:
        source, target = self.mesh(q % self.groups), self.mesh((q + 1) % self.groups)
        return self.tables.transfers(source, target, cuts, self.m)

    def _shortest(self, costs: list[Array]) -> list[Array]:
        rest = np.full(len(self.tables.family), np.inf)
        rest[-1] = 0.0
        result = [rest]
        for cost in reversed(costs):
            rest = (cost + rest[None, :]).min(axis=1)
            result.append(rest)
        return result[::-1]


@dataclass(frozen=True, eq=False)
class ChunkNode:
    """All interleaved pipelines of given groups that begin with given chunks. `loads_s`: T_s; `pre_s`, `post_s`: of the
    groups that have begun, and the next."""

    rest: Rest
    choices: tuple[Choice, ...]
    path_s: float
    loads_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    pre_s: tuple[float, ...]
    post_s: tuple[float, ...]

    @property
    def _low(self) -> int:
        return self.choices[-1].high if self.choices else 0

    @cached_property
    def _waits_s(self) -> tuple[list[float], list[float]]:
        """pre_s and post_s of every group; what is not known yet counts as the last that is."""
        more = self.rest.groups - len(self.pre_s)
        return [*self.pre_s, *[self.pre_s[-1]] * more], [*self.post_s, *[self.post_s[-1]] * more]

    def bound_s(self) -> float:
        rest, q = self.rest, len(self.choices)
        pre, post = self._waits_s
        bound_s = self.path_s + float(rest.path_s[q][self._low])
        for a, load, end, b in zip(pre, self.loads_s, self.ends_s, post, strict=True):
            bound_s = max(bound_s, a + rest.m * load + max(end, b))
        for weights, left in zip(rest.weights, rest.loads_s, strict=True):
            own = sum(w * (a + rest.m * t + b) for w, a, t, b in zip(weights, pre, self.loads_s, post, strict=True))
            bound_s = max(bound_s, own + rest.m * float(left[q][self._low]))
        return bound_s

    def expand(self, search: Search) -> None:
        rest, q = self.rest, len(self.choices)
        group = q % rest.groups
        mesh, last = rest.mesh(group), q + 1 == rest.count
        fits = np.stack(search.tables.fits(mesh, rest.m, rest.in_flight(q)))[:, self._low]
        fits &= np.isfinite(rest.path_s[q + 1])  # the ops left can be cut into the chunks left
        highs = np.flatnonzero(fits.any(axis=0))
        there_s, back_s = (np.zeros(len(highs)),) * 2 if last else rest.moves(q, highs)
        for place, high in enumerate(highs.tolist()):
            for option in self._options(search.tables, mesh, high, np.flatnonzero(fits[:, high])):
                choice = Choice(self._low, high, rest.places[group], rest.sizes[group], option)
                self._child(search, choice, float(there_s[place]), float(back_s[place]))

    def _options(self, tables: Tables, mesh: tuple[int, ...], high: int, fitting: Indices) -> list[int]:
        """Those that no other undercuts."""
        if len(fitting) == 1:
            return [int(fitting[0])]
        options, at = tables.of(mesh, self.rest.m), (self._low, high)
        rows = np.array(
            [
                [float(array[at]) for array in (t.forward_s, t.backward_s, t.end_s, *t.static_bytes, *t.saved_bytes)]
                for t in (options[option] for option in fitting)
            ]
        )
        _, first = np.unique(rows, axis=0, return_index=True)
        rows, fitting = rows[first], fitting[first]  # in lexical order: only an earlier one can undercut
        below = (rows[:, None, :] <= rows[None, :, :]).all(axis=2)
        return [int(option) for option in fitting[~np.triu(below, 1).any(axis=0)]]

    def _child(self, search: Search, choice: Choice, there_s: float, back_s: float) -> None:
        rest, q = self.rest, len(self.choices)
        table = search.tables.of(rest.mesh(q % rest.groups), rest.m)[choice.option]
        at = (choice.low, choice.high)
        f, b, end = float(table.forward_s[at]), float(table.backward_s[at]), float(table.end_s[at])
        known = q + 1 < rest.groups
        child = ChunkNode(
            rest,
            (*self.choices, choice),
            self.path_s + f + b + there_s + back_s,
            _with(self.loads_s, q % rest.groups, f + b),
            _with(self.ends_s, q % rest.groups, end),
            (*self.pre_s, self.pre_s[-1] + f + there_s) if known else self.pre_s,
            (*self.post_s, self.post_s[-1] + b + back_s) if known else self.post_s,
        )
        bound_s = child.bound_s() * (1 - ROUNDING)
        if bound_s >= search.cutoff_s or not fits_memory(search.tables, rest.setting, child.choices, q % rest.groups):
            return
        if q + 1 == rest.count:
            search.offer(rest.setting, child.choices)
        else:
            search.push(bound_s, q + 1, child)


def _with(values: tuple[float, ...], place: int, more: float) -> tuple[float, ...]:
    return (*values[:place], values[place] + more, *values[place + 1 :])


def _whole_bound_s(tables: Tables, order: tuple[int, ...], m: int) -> float:
    """The bound of a setting on all devices of `order` before the groups are known."""
    shape = tables.family.inside.shape
    least, device_s = np.full(shape, np.inf), np.full(shape, np.inf)
    for d in tables.sizes(len(order)):
        meshes = {tables.key(order[p : p + d]): order[p : p + d] for p in range(len(order) - d + 1)}
        for mesh in meshes.values():
            one = tables.least_pass(mesh, m)
            np.minimum(least, one, out=least)
            np.minimum(device_s, d * one, out=device_s)
    return max(_to_the_end(least), m * _to_the_end(device_s) / len(order))


def _to_the_end(costs: Array) -> float:
    """The shortest path from no op to all."""
    rest = np.full(len(costs), np.inf)
    rest[-1] = 0.0
    for low in range(len(costs) - 2, -1, -1):
        rest[low] = (costs[low] + rest).min()
    return float(rest[0])


def push_interleaved(search: Search) -> list[Setting]:
    """Push the root nodes of every interleaved setting; returns the settings."""
    found = []
    problem, tables = search.tables.problem, search.tables
    least, most = min(problem.stage_sizes), max(problem.stage_sizes)
    for m in problem.microbatch_counts:
        for order in problem.beginnings(2):
            groups = [s for s in range(2, len(order) // least + 1) if m % s == 0 and s * most >= len(order)]
            bound_s = _whole_bound_s(tables, order, m) * (1 - ROUNDING) if groups else np.inf
            for s in groups:
                for chunks in problem.chunk_counts:
                    if s * chunks <= problem.num_ops and np.isfinite(bound_s):
                        setting = Setting(
                            order=order, schedule="interleaved", num_microbatches=m, num_stages=s, num_chunks=chunks
                        )
                        search.push(bound_s, 0, GroupsNode(setting, bound_s))
                        found.append(setting)
    return found
