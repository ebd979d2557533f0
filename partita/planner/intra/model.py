"""The integer programme of an `IntraProblem`.

Variables (binary unless said otherwise; of tied ops, inputs, values and blocks one set stands for all)

    x[o, c, r]     op o runs by choice c; r = 1: and is run again (only ops that can be)
    i[p, c]        input p is stored by choice c
    r[b]           block b is recomputed
    k[v, s]        value v is saved in placement s
    e[w, v, n, s, t] >= 0   in window w reader n of value v has it in t, made from the window's first copy, in s
    z[w, v, s, t]  >= 0     that conversion is paid; s != t. With one reader z is e.
    u[w], u1[w]    >= 0     overlappable exchanges that compute does not hide: in every microbatch, in the last or first

Objective: the time T of `partita.planner.intra.problem`, with u for the maxima.

Constraints

    (1) sum_c x[o, c, 0] = 1 - r[b],  sum_c x[o, c, 1] = r[b];  sum_c x[o, c] = 1 for ops that never run again
    (2) sum_c i[p, c] = 1
    (3) sum_s k[v, s] = 1 - r[b] if v is inner to b, else 1
    (4) sum_s e[w, v, n, s, t] = D[n, t]           what reader n wants: the sum of its x, i or k with placement t
    (5) sum_t e[w, v, n, s, t] <= S[w, v, s]       what there is: the source's x, i, or k (backward: + x[., ., 1])
    (6) z[w, v, s, t] >= e[w, v, n, s, t]          a conversion is paid once for all readers
    (7) u[w] >= O_w - h C_w,  u1[w] >= O_w + once_w - h C_w
    (8) memory(point) <= limit, for the points at which it would be broken otherwise (added when a solution breaks it)

With x, i, r, k whole, e and z are too. (4) and (5) are the marginals of each edge, which makes the relaxation exact
where the graph of values is a tree (Wainwright and Jordan 2008, section 8.2). `_choose` adds (1) and (2), `_save`
(3), `_read`
(4)-(6), `_overlap` (7), `memory_row` (8).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from partita.planner.intra.linear import INFINITY, Floats, LinearModel
from partita.planner.intra.problem import Assignment, IntraProblem, Window
from partita.planner.intra.timetable import Timetable, Use

Expression = dict[int, tuple[int, ...]]
"""Placement -> the columns that sum to whether it is there, or wanted."""
Pairs = list[tuple[int, int, int]]
"""``(source, target, column)`` of paid conversions."""


@dataclass
class Spans:
    """Who takes memory from when to when: parallel lists."""

    columns: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)

    def add(self, column: int, first: int, last: int, num_bytes: int) -> None:
        if num_bytes and first <= last:
            self.columns.append(column)
            self.first.append(first)
            self.last.append(last)
            self.num_bytes.append(num_bytes)


class IntraModel:
    """Builds the programme; see the module's text. Without ``recompute`` every r is 0."""

    def __init__(self, problem: IntraProblem, table: Timetable, *, recompute: bool) -> None:
        self.problem, self.table = problem, table
        self.linear = LinearModel()
        self.again: dict[int, int] = {}  # class of blocks -> r
        self.kept: dict[int, tuple[int, ...]] = {}  # value -> k by placement
        self._ops: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # columns by choice, for r = 0 and r = 1
        self._inputs: list[tuple[int, ...]] = []
        self._spans = Spans()
        self._tied: dict[Hashable, tuple[tuple[int, ...], ...]] = {}
        self._families: dict[Hashable, Pairs] = {}
        self._compute: dict[Window, dict[int, float]] = {window: {} for window in Window}
        self._exchange: dict[Window, dict[int, float]] = {window: {} for window in Window}
        self._once: dict[Window, dict[int, float]] = {window: {} for window in Window}
        if recompute:
            for block in self._recomputable():
                self.again[block] = self.linear.add_column(upper=1.0, integral=True)
        self._choose()
        self._source_of = {item.value: index for index, item in enumerate(problem.inputs)}
        for value in range(len(problem.values)):
            self._save(value)
            self._forward(value)
            self._backward(value)
        self._overlap()
        self._arrays = tuple(
            np.array(part, dtype=np.int64)
            for part in (self._spans.columns, self._spans.first, self._spans.last, self._spans.num_bytes)
        )

    def _recomputable(self) -> list[int]:
        blocks = {self.problem.ops[op].block for op in self.table.rerun_position}
        return sorted({self.table.block_class[block] for block in blocks if block is not None})

    def _again(self, block: int | None) -> int | None:
        return None if block is None else self.again.get(self.table.block_class[block])

    # -- choices ----------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Constraints (1) and (2), and what choices cost by themselves."""
        keys = [("op", index) if op.tie is None else ("ops", op.tie) for index, op in enumerate(self.problem.ops)]
        again = {key: self._again(op.block) for key, op in zip(keys, self.problem.ops, strict=True) if op.reruns}
        for index, (key, op) in enumerate(zip(keys, self.problem.ops, strict=True)):
            if key not in self._tied:
                self._tied[key] = self._new_choices(len(op.choices), again.get(key))
            once, twice = self._tied[key]
            self._ops.append((once, twice))
            place, later = self.table.position[index], self.table.rerun_position.get(index)
            for columns in (once, twice):
                for column, choice in zip(columns, op.choices, strict=False):
                    self._add(self._compute[op.window], column, choice.time_s)
                    self._spans.add(column, place, place, choice.temporary_bytes)
                    if columns is twice and later is not None:
                        self._add(self._compute[Window.BACKWARD], column, choice.time_s)
                        self._spans.add(column, later, later, choice.temporary_bytes)
        for index, _ in enumerate(self.problem.inputs):
            self._store(index)

    def _new_choices(self, count: int, again: int | None) -> tuple[tuple[int, ...], ...]:
        once = tuple(self.linear.add_column(upper=1.0, integral=True) for _ in range(count))
        if again is None:
            self.linear.add_row(1, 1, [(column, 1.0) for column in once])
            return once, ()
        twice = tuple(self.linear.add_column(upper=1.0, integral=True) for _ in range(count))
        self.linear.add_row(1, 1, [*((column, 1.0) for column in once), (again, 1.0)])
        self.linear.add_row(0, 0, [*((column, 1.0) for column in twice), (again, -1.0)])
        return once, twice

    def _store(self, index: int) -> None:
        item = self.problem.inputs[index]
        key = ("input", index) if item.tie is None else ("inputs", item.tie)
        if key not in self._tied:
            self._tied[key] = self._new_choices(len(item.choices), None)
        columns = self._tied[key][0]
        self._inputs.append(columns)
        end = len(self.table.steps) - 1
        source = None if item.returned is None else self.table.producer[item.returned]
        for column, option in zip(columns, item.choices, strict=True):
            self.linear.costs[column] += option.update_s
            self._add(self._once[Window.FORWARD], column, option.gather_s)
            self._add(self._once[Window.BACKWARD], column, option.reduce_s)
            self._spans.add(column, 0, end, option.fixed_bytes)
            if source is not None:
                first = 0 if self.problem.num_microbatches > 1 else self.table.position[source[0]] + 1
                self._spans.add(column, first, end, option.returned_bytes)

    @staticmethod
    def _add(sums: dict[int, float], column: int, time_s: float) -> None:
        if time_s:
            sums[column] = sums.get(column, 0.0) + time_s

    # -- values -----------------------------------------------------------------------------------------------------

    def _save(self, value: int) -> None:
        """Constraint (3)."""
        if value not in self.table.saved:
            return
        item = self.problem.values[value]
        block = self.table.inner[value]
        again = self._again(block)
        alike = None if block is None else self.table.block_class[block]
        key = ("value", value) if item.tie is None else ("values", item.tie, alike)
        if key not in self._tied:
            columns = tuple(self.linear.add_column(upper=1.0, integral=True) for _ in item.placements)
            terms = [(column, 1.0) for column in columns] + ([(again, 1.0)] if again is not None else [])
            self.linear.add_row(1, 1, terms)
            self._tied[key] = (columns,)
        self.kept[value] = self._tied[key][0]
        source = self.table.producer[value]
        assert source is not None
        start = max(self.table.position[source[0]], self.table.forward[value].last) + 1
        more = self.problem.num_in_flight - 1
        for column, num_bytes in zip(self.kept[value], item.num_bytes, strict=True):
            self._spans.add(column, start, self.table.backward[value].last, num_bytes)
            self._spans.add(column, 0, len(self.table.steps) - 1, more * num_bytes)

    def _given(self, value: int, *parts: int) -> Expression:
        """What the source of `value` gives; ``parts``: of its columns those for r = 0, r = 1."""
        source = self.table.producer[value]
        found: dict[int, list[int]] = {}
        if source is None:
            index = self._source_of[value]
            for column, option in zip(self._inputs[index], self.problem.inputs[index].choices, strict=True):
                found.setdefault(option.placement, []).append(column)
        else:
            op, slot = source
            for part in parts:
                for column, choice in zip(self._ops[op][part], self.problem.ops[op].choices, strict=False):
                    found.setdefault(choice.outputs[slot], []).append(column)
        return _frozen(found)

    def _wanted(self, use: Use, *parts: int) -> Expression:
        """What an op wants of a value; ``parts`` as in `_given`."""
        op, slot = use
        found: dict[int, list[int]] = {}
        for part in parts:
            for column, choice in zip(self._ops[op][part], self.problem.ops[op].choices, strict=False):
                placement = choice.inputs[slot]
                if placement is not None:
                    found.setdefault(placement, []).append(column)
        return _frozen(found)

    def _taken_back(self, index: int) -> Expression:
        found: dict[int, list[int]] = {}
        for column, option in zip(self._inputs[index], self.problem.inputs[index].choices, strict=True):
            assert option.returned is not None
            found.setdefault(option.returned, []).append(column)
        return _frozen(found)

    def _forward(self, value: int) -> None:
        source, reading = self.table.producer[value], self.table.forward[value]
        if self.table.window_of(self.problem, value) is Window.BACKWARD or (source is None and not reading):
            return
        given = self._given(value, 0, 1)
        readers = [(given, self._wanted(use, 0, 1)) for use in reading.ops]
        readers += [(given, self._taken_back(index)) for index in reading.returned_to]
        if value in self.kept:
            whole = self._given(value, 0) if self._again(self.table.inner[value]) is not None else given
            readers.append((whole, {place: (column,) for place, column in enumerate(self.kept[value])}))
        start = self.table.position[source[0]] if source is not None else 0
        first, last = (reading.first if reading else start), max(reading.last, start)
        if source is not None:
            self._hold(value, given, start, last)
        self._read(value, readers, first, last, Window.FORWARD)

    def _backward(self, value: int) -> None:
        source, reading = self.table.producer[value], self.table.backward[value]
        given, rerun = self._given(value, 0, 1), None
        if source is not None and self.problem.ops[source[0]].window is Window.BACKWARD:
            start = self.table.position[source[0]]
            self._hold(value, given, start, max(reading.last, start))
        elif source is not None:
            rerun = self._rerun_copy(value, source[0])
            kept: Expression = {place: (column,) for place, column in enumerate(self.kept.get(value, ()))}
            given = _sum(kept, rerun or {})
        if not reading:
            return
        readers = [(given, self._wanted(use, 0, 1)) for use in reading.ops]
        readers += [(given, self._taken_back(index)) for index in reading.returned_to]
        for use in reading.reruns:
            readers.append((rerun if rerun is not None else given, self._wanted(use, 1)))
        self._read(value, readers, reading.first, reading.last, Window.BACKWARD)

    def _rerun_copy(self, value: int, op: int) -> Expression | None:
        """The copy of an inner value that the second run of its op gives."""
        start = self.table.rerun_position.get(op)
        if self._again(self.table.inner[value]) is None or start is None:
            return None
        rerun = self._given(value, 1)
        self._hold(value, rerun, start, max(self.table.backward[value].last, start))
        return rerun

    def _hold(self, value: int, copies: Expression, first: int, last: int) -> None:
        if self.problem.values[value].alias_of is not None:
            return
        for placement, columns in copies.items():
            for column in columns:
                self._spans.add(column, first, last, self.problem.values[value].num_bytes[placement])

    def _read(
        self, value: int, readers: Sequence[tuple[Expression, Expression]], first: int, last: int, window: Window
    ) -> None:
        """Constraints (4) to (6), and what the conversions cost."""
        item = self.problem.values[value]
        distinct = list({_key(pair): pair for pair in readers if pair[1]}.values())
        for source, target, column in self._family(value, distinct):
            conversion = item.conversions[(source, target)]
            if item.overlappable:
                self._add(self._exchange[window], column, conversion.time_s)
            else:
                self.linear.costs[column] += conversion.time_s * self.problem.num_microbatches
            self._spans.add(column, first, last, item.num_bytes[target])
            self._spans.add(column, first, first, conversion.temporary_bytes)

    def _family(self, value: int, readers: list[tuple[Expression, Expression]]) -> Pairs:
        """The paid conversions of a value; values with equal readers and possibilities share their columns."""
        possible = frozenset(self.problem.values[value].conversions)
        key = (possible, tuple(_key(pair) for pair in readers))
        if key not in self._families:
            paid: dict[tuple[int, int], int] = {}
            for given, wanted in readers:
                edges = self._edges(given, wanted, possible)
                for pair, edge in edges.items():
                    if pair[0] == pair[1]:
                        continue
                    if len(readers) == 1:
                        paid[pair] = edge
                        continue
                    if pair not in paid:
                        paid[pair] = self.linear.add_column(upper=1.0)
                    self.linear.add_row(0, INFINITY, [(paid[pair], 1.0), (edge, -1.0)])
            self._families[key] = [(source, target, column) for (source, target), column in paid.items()]
        return self._families[key]

    def _edges(
        self, given: Expression, wanted: Expression, possible: frozenset[tuple[int, int]]
    ) -> dict[tuple[int, int], int]:
        edges = {
            (source, target): self.linear.add_column(upper=1.0)
            for source in given
            for target in wanted
            if source == target or (source, target) in possible
        }
        for target, columns in wanted.items():
            terms = [(edge, 1.0) for (_, into), edge in edges.items() if into == target]
            self.linear.add_row(0, 0, [*terms, *((column, -1.0) for column in columns)])
        for source, columns in given.items():
            terms = [(edge, 1.0) for (start, _), edge in edges.items() if start == source]
            if terms:
                self.linear.add_row(-INFINITY, 0, [*terms, *((column, -1.0) for column in columns)])
        return edges

    def _overlap(self) -> None:
        """Constraint (7), and the objective of what is left."""
        share, count = self.problem.hidden_share, self.problem.num_microbatches
        for window in Window:
            compute, exchange, once = self._compute[window], self._exchange[window], self._once[window]
            for column, time_s in compute.items():
                self.linear.costs[column] += count * time_s
            if share == 0 or not (exchange or once):
                for factor, sums in ((count, exchange), (1, once)):
                    for column, time_s in sums.items():
                        self.linear.costs[column] += factor * time_s
                continue
            scale = sum(max(sums.values(), default=0.0) for sums in (compute, exchange, once)) or 1.0
            hidden = [(column, share * time_s / scale) for column, time_s in compute.items()]
            for factor, parts in ((count - 1, (exchange,)), (1, (exchange, once))):
                if factor:
                    rest = self.linear.add_column()  # in units of `scale`, so that the row's figures are near 1
                    self.linear.costs[rest] += factor * scale
                    shown = [(column, -time_s / scale) for sums in parts for column, time_s in sums.items()]
                    self.linear.add_row(0, INFINITY, [(rest, 1.0), *shown, *hidden])

    # -- memory -----------------------------------------------------------------------------------------------------

    def memory_of(self, values: Floats) -> Floats:
        """Bytes at every step of ``Timetable.steps`` for the columns' values, fractional or not."""
        columns, first, last, num_bytes = self._arrays
        change = np.zeros(len(self.table.steps) + 1)
        amounts = values[columns] * num_bytes if len(columns) else np.zeros(0)
        np.add.at(change, first, amounts)
        np.add.at(change, last + 1, -amounts)
        result: Floats = np.cumsum(change)[:-1]
        return result

    def memory_row(self, step: int, unit_bytes: float) -> list[tuple[int, float]]:
        """Constraint (8): the terms of the memory at ``step`` in units of ``unit_bytes``."""
        columns, first, last, num_bytes = self._arrays
        chosen = (first <= step) & (step <= last)
        pairs = zip(columns[chosen].tolist(), (num_bytes[chosen] / unit_bytes).tolist(), strict=True)
        return list(pairs)

    # -- solutions --------------------------------------------------------------------------------------------------

    def assignment(self, values: Floats) -> Assignment:
        """The decisions nearest to the columns' values."""

        def best(parts: Sequence[Sequence[int]], count: int) -> int:
            sums = [sum(float(values[columns[c]]) for columns in parts if columns) for c in range(count)]
            return max(range(count), key=lambda c: sums[c])

        recompute = [self._again(block) for block in range(self.problem.num_blocks)]
        return Assignment(
            ops=tuple(best(parts, len(op.choices)) for parts, op in zip(self._ops, self.problem.ops, strict=True)),
            inputs=tuple(best((columns,), len(columns)) for columns in self._inputs),
            recompute=tuple(column is not None and values[column] > 0.5 for column in recompute),
            saved={value: best((columns,), len(columns)) for value, columns in self.kept.items()},
        )

    def exclusion(self, values: Floats) -> tuple[float, list[tuple[int, float]]]:
        """``(low, terms)`` of a row that cuts off exactly the binary solution ``values``."""
        ones = [column for column in self.linear.integral if values[column] > 0.5]
        return -(len(ones) - 1.0), [(column, -1.0) for column in ones]


def _frozen(found: dict[int, list[int]]) -> Expression:
    return {placement: tuple(columns) for placement, columns in sorted(found.items())}


def _sum(one: Expression, two: Expression) -> Expression:
    return {place: one.get(place, ()) + two.get(place, ()) for place in sorted(one.keys() | two.keys())}


def _key(pair: tuple[Expression, Expression]) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]:
    return tuple(pair[0].items()), tuple(pair[1].items())
