"""Dynamic programme over (stages left, place in the device order, sub-mesh, down-set) for one setting.

cell(j, p, d) holds, for every down-set I, the undominated labels (`partita.planner.inter.labels`) of pipelines of j
stages for the ops not in I, the first of them on the devices order[p : p + d], together on order[p : L]:

    cell(j, p, d)[I] = undominated { put_in_front(option(I, J), label) :  option that fits with the microbatches that a
                       group j stages from the end has in flight,  label of cell(j - 1, p + d, d')[J],  any d', J > I }

A label is dropped if, with the bounds on first stages (`tables`), it cannot lead below `cutoff_s`:
    max(E + forward[p, I], A + path[p, I], m load[p, I], D + path[p, I] + start[p, I]) >= cutoff_s.
The least E of the cells with p = 0, I = {} bounds every pipeline of the setting from below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from partita.planner.inter.family import Mask
from partita.planner.inter.labels import Array, GroupOrder, Indices, Labels, StageTimes, put_in_front, undominated
from partita.planner.inter.tables import FirstStages, Tables


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything but the stages: the first `num_devices` devices of an order, schedule, m, and S where the schedule's
    order depends on it."""

    order: tuple[int, ...]
    schedule: str
    num_microbatches: int
    num_stages: int | None = None
    num_chunks: int = 1

    @property
    def num_devices(self) -> int:
        return len(self.order)

    def group_order(self, from_end: int) -> GroupOrder:
        return GroupOrder(
            schedule=self.schedule,
            num_microbatches=self.num_microbatches,
            from_end=from_end,
            num_stages=self.num_stages,
        )


@dataclass(frozen=True)
class Choice:
    """A stage: the ops between two down-sets on order[p : p + d] by one of the options of that sub-mesh."""

    low: int
    high: int
    place: int
    num_devices: int
    option: int


@dataclass(frozen=True, eq=False)
class Cell:
    """Labels of one (j, p, d), and the first choice behind each: option, down-set J, and the label (cell, column)
    behind."""

    state: Indices
    labels: Labels
    option: Indices
    high: Indices
    behind_d: Indices
    behind: Indices


@dataclass(frozen=True, eq=False)
class Behind:
    """Labels that a stage of given devices may be put in front of, with the transfers between."""

    high: Indices
    labels: tuple[Array, ...] | None  # None: nothing is behind
    there_s: Array
    back_s: Array
    behind_d: Indices
    behind: Indices


class Pipelines:
    """The cells of one setting; `most` labels for a state, `sizes` of stages (a subset of the problem's)."""

    def __init__(self, tables: Tables, setting: Setting, cutoff_s: float, most: int, sizes: tuple[int, ...]) -> None:
        self.tables, self.setting = tables, setting
        self._cutoff_s, self._most, self._sizes = cutoff_s, most, sizes
        self._all = len(tables.family) - 1
        self.cells: dict[tuple[int, int, int], Cell] = {}
        self.longest = min(setting.num_devices // min(sizes), tables.problem.num_ops)
        if setting.num_stages is not None:
            self.longest = min(self.longest, setting.num_stages)
        for from_end in range(1, self.longest + 1):
            for place in range(setting.num_devices - 1, -1, -1):
                for d in sizes:
                    if place + d <= setting.num_devices:
                        self._build(from_end, place, d)

    @cached_property
    def first(self) -> FirstStages:
        return first_stages(self.tables, self.setting)

    def roots(self) -> list[tuple[float, tuple[int, int, int], int]]:
        """(bound, cell, column) of the whole pipelines, best first."""
        found = []
        for key, cell in self.cells.items():
            whole = key[1] == 0 and self.setting.num_stages in (None, key[0])
            if whole:
                found += [(float(cell.labels[3, i]), key, int(i)) for i in np.flatnonzero(cell.state == 0)]
        return sorted(found)

    def trace(self, key: tuple[int, int, int], column: int) -> tuple[Choice, ...]:
        """The stages behind a label."""
        choices = []
        while True:
            from_end, place, d = key
            cell = self.cells[key]
            low, high = int(cell.state[column]), int(cell.high[column])
            choices.append(Choice(low, high, place, d, int(cell.option[column])))
            if from_end == 1:
                return tuple(choices)
            key, column = (from_end - 1, place + d, int(cell.behind_d[column])), int(cell.behind[column])

    def devices(self, place: int, d: int) -> tuple[int, ...]:
        return self.setting.order[place : place + d]

    def behind(self, from_end: int, place: int, d: int) -> Behind | None:
        """What a stage on these devices, `from_end` from the end, may be put in front of; None: nothing."""
        end = place + d
        if from_end == 1:
            if end < self.setting.num_devices:
                return None
            none = np.zeros(1, dtype=np.int64)
            return Behind(none + self._all, None, np.zeros(1), np.zeros(1), none, none)
        parts = []
        for size in self._sizes:
            cell = self.cells.get((from_end - 1, end, size))
            if cell is not None:
                there_s, back_s = self.tables.transfers(
                    self.devices(place, d), self.devices(end, size), cell.state, self.setting.num_microbatches
                )
                columns = np.arange(len(cell.state))
                parts.append((cell.state, cell.labels, there_s, back_s, np.full(len(columns), size), columns))
        if not parts:
            return None
        high, labels, there_s, back_s, sizes, columns = (np.concatenate(p, axis=-1) for p in zip(*parts, strict=True))
        return Behind(high, tuple(labels), there_s, back_s, sizes, columns)

    def in_front(self, from_end: int, place: int, d: int, behind: Behind, lows: Indices) -> list[tuple[Array, Mask]]:
        """For every option: (4 x lows x behind labels, which of them are valid)."""
        devices, m = self.devices(place, d), self.setting.num_microbatches
        order = self.setting.group_order(from_end)
        at = np.ix_(lows, behind.high)
        result = []
        options = zip(self.tables.of(devices, m), self.tables.fits(devices, m, order.in_flight), strict=True)
        for table, fits in options:
            valid = fits[at]
            forward_s = np.where(valid, table.forward_s[at], 0.0)
            stage = StageTimes(
                forward_s, table.backward_s[at], table.weight_s[at], table.end_s[at], behind.there_s, behind.back_s
            )
            result.append((np.stack(put_in_front(order, stage, behind.labels)), valid))
        return result

    def hopeless(self, labels: Array, place: int, lows: Indices) -> Mask:
        """Which labels (4 x lows x any) cannot lead below the cut-off."""
        first, m = self.first, self.setting.num_microbatches
        forward, path, load, start = (
            array[place, lows][:, None] for array in (first.forward_s, first.path_s, first.load_s, first.start_s)
        )
        least = np.maximum(labels[3] + forward, labels[2] + path)
        least = np.maximum(least, np.maximum(m * load, labels[0] + path + start))
        return np.asarray((least >= self._cutoff_s) | ~np.isfinite(least))

    def _lows(self, place: int, d: int, behind: Behind) -> Indices:
        """Down-sets that a stage here may begin with: cheap tests before labels are made."""
        first, m = self.first, self.setting.num_microbatches
        if place == 0:
            return np.zeros(1, dtype=np.int64)
        reached = np.isfinite(first.path_s[place]) & (m * first.load_s[place] < self._cutoff_s)
        reached &= first.path_s[place] + first.start_s[place] < self._cutoff_s
        reached[0] = False
        lows = np.flatnonzero(reached)
        if np.isfinite(self._cutoff_s) and len(lows):
            highs = np.unique(behind.high)
            loads = m * self.tables.least_pass(self.devices(place, d), m)[np.ix_(lows, highs)]
            lows = lows[(loads < self._cutoff_s).any(axis=1)]
        return lows

    def _build(self, from_end: int, place: int, d: int) -> None:
        if self.setting.num_stages is not None and (place == 0) != (from_end == self.setting.num_stages):
            return  # the first of S stages is the one on the first device
        behind = self.behind(from_end, place, d)
        if behind is None:
            return
        lows = self._lows(place, d, behind)
        if len(lows) == 0:
            return
        found = []
        for option, (labels, valid) in enumerate(self.in_front(from_end, place, d, behind, lows)):
            row, column = np.nonzero(valid & ~self.hopeless(labels, place, lows))
            found.append((lows[row], labels[:, row, column], np.full(len(row), option), column))
        if not found:
            return
        state, labels, options, columns = (np.concatenate(part, axis=-1) for part in zip(*found, strict=True))
        if len(state) == 0:
            return
        state, labels, at = undominated(state, labels, self._most)
        columns = columns[at]
        self.cells[from_end, place, d] = Cell(
            state, labels, options[at], behind.high[columns], behind.behind_d[columns], behind.behind[columns]
        )


def first_stages(tables: Tables, setting: Setting) -> FirstStages:
    """The bounds on first stages along the order that the setting uses the beginning of."""
    problem, count = tables.problem, setting.num_devices
    whole = max((order for order in problem.orders if order[:count] == setting.order), key=len)
    most = min(problem.num_ops, max(len(order) for order in problem.orders))
    return tables.first_stages(whole, setting.num_microbatches, setting.schedule == "zero_bubble", most)


def setting_bound_s(tables: Tables, setting: Setting) -> float:
    """A lower bound of every pipeline of a setting with one chunk a group; infinite where there is none."""
    first, m = first_stages(tables, setting), setting.num_microbatches
    at = (setting.num_devices, -1)
    path, load, start = (float(array[at]) for array in (first.path_s, first.load_s, first.start_s))
    return max(m * load, path + start)
