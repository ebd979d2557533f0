"""Every stage that can be part of a pipeline, as arrays: the options of the dynamic programme in `piper_solve`.

An option is a pair of ideals (start I, end J; the stage holds J - I), degrees d and t, its time T, and `cap`, the
largest s (sum of the data degrees of this and all later stages) at which its memory fits: with sums (tau, w, a, b) of a
choice of ways, ceil(s / d) <= M = floor((limit - b) / a), so cap = d M. Of choices with equal (I, J, d, t) only those
stay that no other beats in both T and cap.

For one start I the frontiers (`piper_frontier`) grow along the ideals: J has one layer more than another of the family.
Edges that enter depend on I and the layer alone, so they are part of its tau. Edges that leave depend on J; what all
ways of a layer have in common is added afterwards, and where ways differ the frontier is made anew.

A stage with d t devices and time at most B has t tau <= d t B, and the layers of other stages need their least t tau:
t tau + sum over layers not in J - I of min t tau <= K B prunes a stage, and with it all larger ones from the same I.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from partita.planner.placement.groups import Array
from partita.planner.placement.ideals import Ideals
from partita.planner.placement.piper_frontier import (
    FIXED,
    PER_MICROBATCH,
    TAU,
    WEIGHT,
    Thinning,
    add_layer,
    way_sums,
)
from partita.planner.placement.piper_problem import PiperProblem, least_device_time_s

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Options:
    """One entry for each option, ordered by (start, end, t, d, time); `start` and `end` are rows of `ideals`."""

    ideals: Ideals
    start: Indices
    end: Indices
    data_degree: Indices
    tensor_degree: Indices
    cap: Indices
    time_s: Array
    ub_s: float  # no option takes longer
    complete: bool  # whether the deadline left time for all of them


@dataclass
class OptionBuilder:
    """Builds options over a family of ideals, ascending in size, the empty one first and the full one last."""

    problem: PiperProblem
    ideals: Ideals
    thinning: Thinning
    _smaller: list[list[tuple[int, int]]] = field(init=False)  # (layer, row without it) of each row
    _rows: dict[tuple[int, int], Array] = field(init=False)  # (layer, degree)

    def __post_init__(self) -> None:
        problem = self.problem
        self.degrees = sorted({degree for layer in problem.layers for degree in layer.ways})
        self.data_degrees = np.array(
            [d for d in range(1, problem.num_devices + 1) if problem.num_microbatches % d == 0], dtype=np.int64
        )
        self._thrift = np.array([least_device_time_s(layer) for layer in problem.layers])
        row_of = {row.tobytes(): i for i, row in enumerate(self.ideals)}
        self._smaller = []
        for row in self.ideals:
            found = []
            for layer in np.flatnonzero(row).tolist():
                row[layer] = False
                smaller = row_of.get(row.tobytes())
                row[layer] = True
                if smaller is not None:
                    found.append((layer, smaller))
            self._smaller.append(found)
        self._rows = {}
        for layer in range(len(problem.layers)):
            for degree in self.degrees:
                sums = way_sums(problem, layer, degree)
                if sums is not None:
                    self._rows[layer, degree] = sums
        self._in_edges: list[list[int]] = [[] for _ in problem.layers]
        for edge, (_, head, _) in enumerate(problem.edges):
            self._in_edges[head].append(edge)
        self._tails = np.array([edge[0] for edge in problem.edges], dtype=np.int64)
        self._heads = np.array([edge[1] for edge in problem.edges], dtype=np.int64)
        self._sync = {degree: self._sync_out(degree) for degree in self.degrees}

    def _sync_out(self, degree: int) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Of each edge: bytes that leave, there and back, for the cheapest way; and whether ways differ."""
        bytes_, differ = np.zeros(len(self.problem.edges)), np.zeros(len(self.problem.edges), dtype=bool)
        for edge, (tail, head, size) in enumerate(self.problem.edges):
            sync = [way.sync_out_bytes[head] for way in self.problem.layers[tail].ways.get(degree, ())]
            if sync:
                bytes_[edge], differ[edge] = 2 * (size + min(sync)), min(sync) < max(sync)
        return bytes_, differ

    def build(self, ub_s: float, deadline: float, ends: npt.NDArray[np.bool_] | None = None) -> Options:
        """Options of at most `ub_s` between the ideals of `ends` (all of them if None)."""
        ends = np.ones(len(self.ideals), dtype=bool) if ends is None else ends
        parts: list[tuple[npt.NDArray[Any], ...]] = []
        complete = True
        for start in np.flatnonzero(ends[:-1]):
            if time.monotonic() > deadline:
                complete = False
                break
            for degree in self.degrees:
                for end, points in self._frontiers(int(start), degree, ub_s):
                    if ends[end]:
                        found = self._options(points, degree, ub_s)
                        count = len(found[0])
                        if count:
                            parts.append((np.full(count, start), np.full(count, end), np.full(count, degree), *found))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 6
        order = np.lexsort((columns[5], columns[3], columns[2], columns[1], columns[0]))
        starts, others, degrees, data, caps = (column[order].astype(np.int64) for column in columns[:5])
        return Options(
            ideals=self.ideals,
            start=starts,
            end=others,
            tensor_degree=degrees,
            data_degree=data,
            cap=caps,
            time_s=columns[5][order],
            ub_s=ub_s,
            complete=complete,
        )

    def _frontiers(self, start: int, degree: int, ub_s: float) -> Iterator[tuple[int, Array]]:
        """(end, frontier with all edges in tau) for every stage from `start` that fits the memory and the time."""
        problem, inner = self.problem, self.ideals[start]
        above = np.flatnonzero((self.ideals >= inner).all(axis=1))
        leaving, anew = self._leaving(inner, above, degree)
        allowed = self.data_degrees[self.data_degrees * degree <= problem.num_devices]
        if len(allowed) == 0:
            return
        slack_s = ub_s * problem.num_devices - float(self._thrift.sum())
        budget_s = (slack_s + (self.ideals[above] & ~inner) @ self._thrift) * (1 + 1e-9) / degree
        core: dict[int, Array] = {start: np.zeros((1, 4))}
        rows: dict[int, Array | None] = {}
        columns = zip(above.tolist(), leaving.tolist(), anew.tolist(), budget_s.tolist(), strict=True)
        for end, extra_s, fresh, most_s in list(columns)[1:]:
            points = self._core(start, end, degree, core, rows)
            if points is None or len(points) == 0:
                continue
            points = points[points[:, TAU] <= most_s]
            if len(points) == 0:
                continue
            core[end] = points
            if fresh:
                points = self._anew(start, end, degree, rows)
            total = points.copy()
            total[:, TAU] += extra_s
            yield end, total

    def _core(
        self, start: int, end: int, degree: int, core: dict[int, Array], rows: dict[int, Array | None]
    ) -> Array | None:
        """The frontier without edges that leave; None where a part of the stage already does not fit."""
        inner = self.ideals[start]
        smaller = [(layer, row) for layer, row in self._smaller[end] if not inner[layer]]
        for layer, row in smaller:
            if row in core:
                sums = self._with_edges_in(layer, degree, inner, rows)
                return None if sums is None else add_layer(core[row], sums, self.problem.limit_bytes, self.thinning)
        if smaller:
            return None
        points = np.zeros((1, 4))
        for layer in np.flatnonzero(self.ideals[end] & ~inner).tolist():
            sums = self._with_edges_in(layer, degree, inner, rows)
            if sums is None:
                return None
            points = add_layer(points, sums, self.problem.limit_bytes, self.thinning)
        return points

    def _with_edges_in(
        self, layer: int, degree: int, inner: npt.NDArray[np.bool_], rows: dict[int, Array | None]
    ) -> Array | None:
        if layer not in rows:
            sums = self._rows.get((layer, degree))
            if sums is not None:
                entering = [self.problem.edges[e] for e in self._in_edges[layer] if inner[self._tails[e]]]
                ways = self.problem.layers[layer].ways[degree]
                bytes_ = [sum(2 * (size + way.sync_in_bytes[tail]) for tail, _, size in entering) for way in ways]
                sums = sums.copy()
                sums[:, TAU] += np.array(bytes_) / self.problem.bandwidth_bytes_per_s
            rows[layer] = sums
        return rows[layer]

    def _leaving(
        self, inner: npt.NDArray[np.bool_], above: Indices, degree: int
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Of each end: the seconds of edges that leave, and whether ways of a layer differ in them."""
        outer = self.ideals[above]
        leaves = outer[:, self._tails] & ~inner[self._tails] & ~outer[:, self._heads]
        bytes_, differ = self._sync[degree]
        return leaves @ bytes_ / self.problem.bandwidth_bytes_per_s, np.asarray((leaves & differ).any(axis=1))

    def _anew(self, start: int, end: int, degree: int, rows: dict[int, Array | None]) -> Array:
        """The frontier with what the ways of a layer do not have in common in edges that leave."""
        points = np.zeros((1, 4))
        bytes_, differ = self._sync[degree]
        for layer in np.flatnonzero(self.ideals[end] & ~self.ideals[start]).tolist():
            sums = self._with_edges_in(layer, degree, self.ideals[start], rows)
            assert sums is not None
            leaving = np.flatnonzero((self._tails == layer) & ~self.ideals[end][self._heads] & differ)
            if len(leaving):
                ways = self.problem.layers[layer].ways[degree]
                edges = [(self._heads[e], self.problem.edges[e][2], bytes_[e]) for e in leaving]
                more = [sum(2 * (size + w.sync_out_bytes[head]) - least for head, size, least in edges) for w in ways]
                sums = sums.copy()
                sums[:, TAU] += np.array(more) / self.problem.bandwidth_bytes_per_s
            points = add_layer(points, sums, self.problem.limit_bytes, self.thinning)
        return points

    def _options(self, points: Array, degree: int, ub_s: float) -> tuple[npt.NDArray[Any], ...]:
        """(d, cap, time) of all d, the choices of one d ascending in time and cap."""
        problem = self.problem
        data = self.data_degrees[self.data_degrees * degree <= problem.num_devices]
        most = min(problem.num_microbatches, problem.num_devices)  # no s is larger
        shared = 4.0 * (data - 1) / (problem.num_microbatches * problem.bandwidth_bytes_per_s)
        times = (points[:, TAU, None] + shared * points[:, WEIGHT, None]) / data
        room = problem.limit_bytes - points[:, FIXED]
        with np.errstate(divide="ignore", invalid="ignore"):
            fitting = np.where(points[:, PER_MICROBATCH] > 0, np.floor(room / points[:, PER_MICROBATCH]), most)
        fitting = np.minimum(fitting, most)
        order = np.argsort(times, axis=0, kind="stable")
        times = np.take_along_axis(times, order, axis=0)
        in_flight = fitting[order]
        caps = np.minimum(in_flight * data, most)
        best = np.maximum.accumulate(caps, axis=0)
        keep = np.ones(caps.shape, dtype=bool)
        keep[1:] = caps[1:] > best[:-1]
        keep &= (times <= ub_s) & (in_flight >= 1)
        rows, columns = np.nonzero(keep)
        return data[columns], caps[rows, columns], times[rows, columns]
