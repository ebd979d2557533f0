"""The price of an assignment: step time and memory by the definitions of `partita.planner.intra.problem`, no solver.

Simple on purpose: everything that a solver claims is computed again here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from partita.errors import InputError
from partita.planner.intra.problem import Assignment, Conversion, InputChoice, IntraProblem, Window
from partita.planner.intra.timetable import Reading, Timetable, make_timetable


@dataclass(frozen=True)
class Paid:
    """One conversion that an assignment pays for in every microbatch: of value ``value``, between placement indices."""

    value: int
    window: Window
    source: int
    target: int
    time_s: float


@dataclass(frozen=True)
class Priced:
    """What an assignment costs.

    Attributes:
        time_s: of a step.
        peak_bytes: most memory at any point in time; ``peak_step`` is the place in `Timetable.steps`, ``peak_op`` the
            name of the op that runs then.
        compute_s, blocking_s, overlappable_s: by window, of one microbatch.
        once_s: update, gather and reduction of a step, whether hidden or not.
        conversions: all that are paid for.
    """

    time_s: float
    peak_bytes: int
    peak_step: int
    peak_op: str
    compute_s: dict[Window, float]
    blocking_s: dict[Window, float]
    overlappable_s: dict[Window, float]
    once_s: float
    conversions: tuple[Paid, ...]


def price(problem: IntraProblem, assignment: Assignment, table: Timetable | None = None) -> Priced:
    """Time and peak memory of `assignment`.

    Raises:
        InputError: a decision is missing, or a conversion that it needs is impossible.
    """
    walk = _Walk(problem, assignment, table or make_timetable(problem))
    walk.run()
    return walk.result()


@dataclass
class _Walk:
    problem: IntraProblem
    assignment: Assignment
    table: Timetable
    compute_s: dict[Window, float] = field(default_factory=lambda: dict.fromkeys(Window, 0.0))
    blocking_s: dict[Window, float] = field(default_factory=lambda: dict.fromkeys(Window, 0.0))
    overlappable_s: dict[Window, float] = field(default_factory=lambda: dict.fromkeys(Window, 0.0))
    memory: list[int] = field(default_factory=list)  # by step
    paid: list[Paid] = field(default_factory=list)

    def run(self) -> None:
        self.memory = [0] * len(self.table.steps)
        for step, (index, again) in enumerate(self.table.steps):
            self._run_op(step, index, again)
        for item, number in zip(self.problem.inputs, self.assignment.inputs, strict=True):
            self._store(item.choices[number], item.returned)
        for value in range(len(self.problem.values)):
            self._forward(value)
            self._backward(value)

    def result(self) -> Priced:
        options = [i.choices[c] for i, c in zip(self.problem.inputs, self.assignment.inputs, strict=True)]
        update = sum(option.update_s for option in options)
        gather, reduce = sum(option.gather_s for option in options), sum(option.reduce_s for option in options)
        count = self.problem.num_microbatches
        time_s = update + count * (sum(self.compute_s.values()) + sum(self.blocking_s.values()))
        for window, once in ((Window.FORWARD, gather), (Window.BACKWARD, reduce)):
            time_s += (count - 1) * self._uncovered(window, 0.0) + self._uncovered(window, once)
        peak = max(self.memory, default=0)
        step = self.memory.index(peak) if self.memory else -1
        name = self.problem.ops[self.table.steps[step][0]].name if self.memory else ""
        once_s = update + gather + reduce
        sums = self.compute_s, self.blocking_s, self.overlappable_s
        return Priced(time_s, peak, step, name, *sums, once_s, tuple(self.paid))

    def _uncovered(self, window: Window, more: float) -> float:
        hidden = self.problem.hidden_share * self.compute_s[window]
        return max(0.0, self.overlappable_s[window] + more - hidden)

    def _hold(self, first: int, last: int, num_bytes: int) -> None:
        for step in range(first, last + 1):
            self.memory[step] += num_bytes

    def _run_op(self, step: int, index: int, again: bool) -> None:
        op = self.problem.ops[index]
        if again and not self._recomputed(op.block):
            return
        choice = op.choices[self.assignment.ops[index]]
        self.compute_s[Window.BACKWARD if again else op.window] += choice.time_s
        self._hold(step, step, choice.temporary_bytes)

    def _recomputed(self, block: int | None) -> bool:
        return block is not None and self.assignment.recompute[block]

    def _store(self, option: InputChoice, returned: int | None) -> None:
        self._hold(0, len(self.memory) - 1, option.fixed_bytes)
        if returned is not None:
            source = self.table.producer[returned]
            assert source is not None
            first = 0 if self.problem.num_microbatches > 1 else self.table.position[source[0]] + 1
            self._hold(first, len(self.memory) - 1, option.returned_bytes)

    # -- copies of one value ----------------------------------------------------------------------------------------

    def _given(self, value: int) -> int:
        """The placement in which the value's source gives it."""
        source = self.table.producer[value]
        if source is None:
            index = next(i for i, item in enumerate(self.problem.inputs) if item.value == value)
            return self.problem.inputs[index].choices[self.assignment.inputs[index]].placement
        return self.problem.ops[source[0]].choices[self.assignment.ops[source[0]]].outputs[source[1]]

    def _wanted(self, reading: Reading) -> set[int]:
        found: set[int | None] = set()
        active = [use for use in reading.reruns if self._recomputed(self.problem.ops[use[0]].block)]
        for index, slot in [*reading.ops, *active]:
            found.add(self.problem.ops[index].choices[self.assignment.ops[index]].inputs[slot])
        for index in reading.returned_to:
            found.add(self.problem.inputs[index].choices[self.assignment.inputs[index]].returned)
        return {placement for placement in found if placement is not None}

    def _saved(self, value: int) -> int | None:
        """The placement in which the value is saved; None if it is not."""
        if value not in self.table.saved or self._recomputed(self.table.inner[value]):
            return None
        if value not in self.assignment.saved:
            raise InputError(f"the placement in which value {self.problem.values[value].name} is saved must be given")
        return self.assignment.saved[value]

    def _forward(self, value: int) -> None:
        source, reading = self.table.producer[value], self.table.forward[value]
        if self.table.window_of(self.problem, value) is Window.BACKWARD or (source is None and not reading):
            return
        given, wanted, saved = self._given(value), self._wanted(reading), self._saved(value)
        start = self.table.position[source[0]] if source is not None else 0
        first = reading.first if reading else start
        last = max(reading.last, start)
        num_bytes = self.problem.values[value].num_bytes
        if source is not None and self.problem.values[value].alias_of is None:
            self._hold(start, last, num_bytes[given])
        self._convert(value, given, wanted | ({saved} - {None}), first, last, Window.FORWARD)
        if saved is not None:
            self._hold(last + 1, self.table.backward[value].last, num_bytes[saved])
            more = self.problem.num_in_flight - 1
            self._hold(0, len(self.memory) - 1, more * num_bytes[saved])

    def _backward(self, value: int) -> None:
        source, reading = self.table.producer[value], self.table.backward[value]
        num_bytes = self.problem.values[value].num_bytes
        saved = self._saved(value)
        if source is not None and saved is None:
            op = source[0]
            again = self._recomputed(self.table.inner[value]) and op in self.table.rerun_position
            if self.problem.ops[op].window is Window.FORWARD and not again:
                return
            start = self.table.rerun_position[op] if again else self.table.position[op]
            if self.problem.values[value].alias_of is None:
                self._hold(start, max(reading.last, start), num_bytes[self._given(value)])
        given = saved if saved is not None else self._given(value)
        if reading:
            self._convert(value, given, self._wanted(reading), reading.first, reading.last, Window.BACKWARD)

    def _convert(
        self, value: int, given: int, wanted: set[int | None] | set[int], first: int, last: int, window: Window
    ) -> None:
        for target in wanted:
            if target is None or target == given:
                continue
            conversion = self._conversion(value, given, target)
            sums = self.overlappable_s if self.problem.values[value].overlappable else self.blocking_s
            sums[window] += conversion.time_s
            self.paid.append(Paid(value, window, given, target, conversion.time_s))
            self._hold(first, last, self.problem.values[value].num_bytes[target])
            self._hold(first, first, conversion.temporary_bytes)

    def _conversion(self, value: int, source: int, target: int) -> Conversion:
        item = self.problem.values[value]
        found = item.conversions.get((source, target))
        if found is None:
            names = item.placements[source], item.placements[target]
            raise InputError(f"value {item.name} must be convertible from {names[0]} to {names[1]}, but is not")
        return found
