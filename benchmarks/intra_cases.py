"""Small random problems of the intra-stage solver, and their optimum by exhaustive enumeration.

`best_by_enumeration` follows the definitions in `partita.planner.intra.problem`, but shares no code with the solver,
its price or its timetable: it asks at every point in time which copies are alive.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from partita.planner.intra import Choice, Conversion, Input, InputChoice, IntraProblem, Op, Value, Window

MOST_ASSIGNMENTS = 4000
Point = tuple[int, bool]  # op, whether it is run again


# -- random problems -----------------------------------------------------------------------------------------------


@dataclass
class _Mesh:
    """One or two axes of unequal devices; shares of a cut are even ("S") or in proportion to speed ("U")."""

    sizes: tuple[int, ...]
    speeds: dict[tuple[int, ...], float]
    latency_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]

    @classmethod
    def draw(cls, draw: random.Random) -> _Mesh:
        sizes = tuple(draw.choice([2, 2, 3]) for _ in range(draw.choice([1, 1, 2])))
        places = list(itertools.product(*map(range, sizes)))
        speeds = {place: draw.choice([1.0, 1.0, 2.0, 3.0]) for place in places}
        return cls(sizes, speeds, tuple(draw.uniform(0, 2) for _ in sizes), tuple(draw.uniform(5, 50) for _ in sizes))

    def shares(self, placement: tuple[str, ...]) -> list[float]:
        """Share of a tensor on every device."""
        found = []
        for place in self.speeds:
            share = 1.0
            for axis, (kind, coordinate) in enumerate(zip(placement, place, strict=True)):
                if kind == "S":
                    share /= self.sizes[axis]
                elif kind == "U":
                    slowest = [self._slowest(axis, other) for other in range(self.sizes[axis])]
                    share *= slowest[coordinate] / sum(slowest)
            found.append(share)
        return found

    def _slowest(self, axis: int, coordinate: int) -> float:
        return min(speed for place, speed in self.speeds.items() if place[axis] == coordinate)

    def time_s(self, work: float, placement: tuple[str, ...]) -> float:
        """Work in these shares on the slowest device."""
        pairs = zip(self.shares(placement), self.speeds.values(), strict=True)
        return max(work * share / speed for share, speed in pairs)

    def conversion_s(self, source: tuple[str, ...], target: tuple[str, ...], num_bytes: int) -> float:
        time_s = 0.0
        for axis, (old, new) in enumerate(zip(source, target, strict=True)):
            if old != new and not (old == "R" and new != "P"):
                passes = 2 if (old, new) == ("P", "R") else 1
                time_s += self.latency_s[axis] + passes * num_bytes / self.bytes_per_s[axis]
        return time_s


def random_problem(seed: int) -> IntraProblem:
    """A problem with at most `MOST_ASSIGNMENTS` assignments; the same for the same seed."""
    for attempt in itertools.count():
        problem = _Drawing(random.Random(seed * 1000 + attempt)).problem()
        if num_assignments(problem) <= MOST_ASSIGNMENTS:
            return problem
    raise AssertionError("unreachable")


class _Drawing:
    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.mesh = _Mesh.draw(draw)
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.inputs: list[Input] = []

    def problem(self) -> IntraProblem:
        draw = self.draw
        num_blocks = draw.choice([0, 1, 1, 2])
        for index in range(draw.choice([1, 1, 2])):
            self._value(f"w{index}", overlappable=draw.random() < 0.7)
        stored = list(range(len(self.values)))
        num_forward = draw.choice([1, 2, 2, 3])
        for index in range(num_forward):
            block = index * num_blocks // num_forward if num_blocks and draw.random() < 0.85 else None
            self._op(f"f{index}", Window.FORWARD, block)
        gradients = []
        for index in range(draw.choice([1, 2, 2, 3])):
            self._op(f"b{index}", Window.BACKWARD, None)
            gradients.append(self.ops[-1].outputs[0])
        for value in stored:
            returned = draw.choice([*gradients, None])
            self._input(value, returned)
        self._tie()
        count = draw.choice([1, 1, 2, 4])
        whole = IntraProblem(
            values=tuple(self.values),
            ops=tuple(self.ops),
            inputs=tuple(self.inputs),
            num_blocks=num_blocks,
            hidden_share=draw.choice([0.0, 0.0, 0.5, 1.0]),
            num_microbatches=count,
            num_in_flight=draw.randint(1, count),
        )
        return _limited(whole, draw)

    def _value(self, name: str, *, overlappable: bool = False, alias_of: int | None = None) -> int:
        draw = self.draw
        kinds = draw.sample("RSUP", draw.choice([2, 2, 3]))
        every = list(itertools.product(kinds, repeat=len(self.mesh.sizes)))
        placements = draw.sample(every, min(len(every), draw.choice([1, 2, 2, 3])))
        size = draw.randint(1, 40)
        num_bytes = tuple(math.ceil(size * max(self.mesh.shares(placement))) for placement in placements)
        conversions = {}
        for (i, source), (j, target) in itertools.permutations(enumerate(placements), 2):
            if draw.random() < 0.9:
                time_s = self.mesh.conversion_s(source, target, size)
                conversions[(i, j)] = Conversion(time_s, draw.choice([0, 0, draw.randint(0, 20)]))
        self.values.append(Value(name, tuple(placements), num_bytes, conversions, overlappable, alias_of))
        return len(self.values) - 1

    def _op(self, name: str, window: Window, block: int | None) -> None:
        draw = self.draw
        known = range(len(self.values))
        recent = list(known)[-3:]
        inputs = tuple(draw.choice([*known, *recent]) for _ in range(draw.choice([1, 1, 2])))
        outputs = tuple(
            self._value(
                f"{name}.{slot}",
                overlappable=window is Window.BACKWARD and draw.random() < 0.5,
                alias_of=draw.choice(inputs) if draw.random() < 0.2 else None,
            )
            for slot in range(draw.choice([1, 1, 1, 2]))
        )
        work = draw.uniform(0, 10)
        choices = tuple(self._choice(index, inputs, outputs, work) for index in range(draw.choice([1, 2, 2, 3])))
        reruns = block is not None and draw.random() < 0.8
        self.ops.append(Op(name, window, inputs, outputs, choices, block, reruns))

    def _choice(self, index: int, inputs: tuple[int, ...], outputs: tuple[int, ...], work: float) -> Choice:
        draw = self.draw

        def any_of(value: int) -> int:
            return draw.randrange(len(self.values[value].placements))

        given = tuple(any_of(value) for value in outputs)
        time_s = self.mesh.time_s(work, self.values[outputs[0]].placements[given[0]])  # type: ignore[arg-type]
        wanted = tuple(None if draw.random() < 0.1 else any_of(value) for value in inputs)
        return Choice(index, time_s, wanted, given, draw.choice([0, 0, draw.randint(0, 15)]))

    def _input(self, value: int, returned: int | None) -> None:
        draw = self.draw
        choices = []
        for placement in range(len(self.values[value].placements)):
            for _ in range(draw.choice([1, 1, 2])):
                back = None if returned is None else draw.randrange(len(self.values[returned].placements))
                choices.append(
                    InputChoice(
                        len(choices), placement, back,
                        fixed_bytes=self.values[value].num_bytes[placement] * draw.choice([1, 2, 4]),
                        returned_bytes=0 if returned is None else draw.randint(0, 30),
                        update_s=draw.choice([0.0, draw.uniform(0, 4)]),
                        gather_s=draw.choice([0.0, draw.uniform(0, 4)]),
                        reduce_s=draw.choice([0.0, draw.uniform(0, 4)]),
                    )
                )  # fmt: skip
        self.inputs.append(Input(self.values[value].name, value, tuple(choices), returned))

    def _tie(self) -> None:
        """Tie some ops, inputs and values that can be."""
        draw = self.draw
        if draw.random() < 0.5:
            return
        for index, op in enumerate(self.ops):
            if draw.random() < 0.6:
                tie = len(op.choices) if draw.random() < 0.5 else (op.window, len(op.choices), op.reruns)
                self.ops[index] = Op(**{**op.__dict__, "tie": tie})
        for index, item in enumerate(self.inputs):
            if draw.random() < 0.6:
                self.inputs[index] = Input(**{**item.__dict__, "tie": len(item.choices)})
        for index, value in enumerate(self.values):
            if draw.random() < 0.6:
                self.values[index] = Value(**{**value.__dict__, "tie": len(value.placements)})


def _limited(problem: IntraProblem, draw: random.Random) -> IntraProblem:
    """The problem with a limit between a little below the least peak and the peak of the fastest assignment."""
    if num_assignments(problem) > MOST_ASSIGNMENTS or draw.random() < 0.15:
        return problem
    costs = [cost for cost in map(_Simulation(problem).cost, assignments(problem)) if cost is not None]
    if not costs:
        return problem
    low, high, most = min(peak for _, peak in costs), min(costs)[1], max(peak for _, peak in costs)
    limit = draw.choice([high, draw.randint(low - 1, high), draw.randint(low, most)])
    return IntraProblem(**{**problem.__dict__, "memory_bytes": limit})


# -- enumeration ---------------------------------------------------------------------------------------------------

Decisions = tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...], dict[int, int]]


def _groups(ties: list[object]) -> list[list[int]]:
    """Indices that choose alike; None is tied to nothing."""
    found: dict[object, list[int]] = {}
    for index, tie in enumerate(ties):
        found.setdefault(("alone", index) if tie is None else ("tied", tie), []).append(index)
    return list(found.values())


def _spread(groups: list[list[int]], picks: tuple[int, ...], count: int) -> tuple[int, ...]:
    result = [0] * count
    for group, pick in zip(groups, picks, strict=True):
        for index in group:
            result[index] = pick
    return tuple(result)


def _block_groups(problem: IntraProblem) -> list[list[int]]:
    """Blocks joined by tied ops that run again."""
    groups = [{block} for block in range(problem.num_blocks)]
    for one, two in itertools.combinations([op for op in problem.ops if op.reruns and op.tie is not None], 2):
        if one.tie == two.tie:
            joined = [group for group in groups if one.block in group or two.block in group]
            groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return [sorted(group) for group in groups]


def _value_groups(problem: IntraProblem) -> list[list[int]]:
    blocks = {block: tuple(group) for group in _block_groups(problem) for block in group}
    simulation = _Simulation(problem)
    ties: list[object] = []
    for index, value in enumerate(problem.values):
        inner = simulation.inner(index)
        ties.append(None if value.tie is None else (value.tie, None if inner is None else blocks[inner]))
    return [[v for v in group if simulation.may_be_saved(v)] for group in _groups(ties)]


def num_assignments(problem: IntraProblem) -> int:
    count = 2 ** len(_block_groups(problem))
    for group in _groups([op.tie for op in problem.ops]):
        count *= len(problem.ops[group[0]].choices)
    for group in _groups([item.tie for item in problem.inputs]):
        count *= len(problem.inputs[group[0]].choices)
    for group in _value_groups(problem):
        count *= len(problem.values[group[0]].placements) if group else 1
    return count


def assignments(problem: IntraProblem) -> Iterator[Decisions]:
    """All of them, ties respected."""
    op_groups = _groups([op.tie for op in problem.ops])
    input_groups = _groups([item.tie for item in problem.inputs])
    block_groups = _block_groups(problem)
    value_groups = [group for group in _value_groups(problem) if group]
    for ops in itertools.product(*(range(len(problem.ops[g[0]].choices)) for g in op_groups)):
        for stored in itertools.product(*(range(len(problem.inputs[g[0]].choices)) for g in input_groups)):
            for blocks in itertools.product((0, 1), repeat=len(block_groups)):
                for kept in itertools.product(*(range(len(problem.values[g[0]].placements)) for g in value_groups)):
                    yield (
                        _spread(op_groups, ops, len(problem.ops)),
                        _spread(input_groups, stored, len(problem.inputs)),
                        tuple(map(bool, _spread(block_groups, blocks, problem.num_blocks))),
                        {value: pick for group, pick in zip(value_groups, kept, strict=True) for value in group},
                    )


def best_by_enumeration(problem: IntraProblem) -> float | None:
    """The least time of all assignments that fit; None if none does."""
    simulation = _Simulation(problem)
    limit = math.inf if problem.memory_bytes is None else problem.memory_bytes
    costs = (simulation.cost(decisions) for decisions in assignments(problem))
    return min((time_s for cost in costs if cost is not None for time_s, peak in [cost] if peak <= limit), default=None)


def cost_by_enumeration(problem: IntraProblem, decisions: Decisions) -> tuple[float, int] | None:
    """``(time, peak)`` of one assignment; None if it needs an impossible conversion."""
    return _Simulation(problem).cost(decisions)


def least_peak_by_enumeration(problem: IntraProblem) -> int | None:
    """The least peak of all assignments."""
    costs = map(_Simulation(problem).cost, assignments(problem))
    return min((cost[1] for cost in costs if cost is not None), default=None)


class _Simulation:
    """Runs a step point by point."""

    def __init__(self, problem: IntraProblem) -> None:
        self.problem = problem
        self.points = self._points()

    def _source(self, value: int) -> int | None:
        return next((index for index, op in enumerate(self.problem.ops) if value in op.outputs), None)

    def _is_forward(self, op: int) -> bool:
        return self.problem.ops[op].window is Window.FORWARD

    def inner(self, value: int) -> int | None:
        source = self._source(value)
        if source is None or not self.problem.ops[source].reruns or value in (i.returned for i in self.problem.inputs):
            return None
        block = self.problem.ops[source].block
        readers = [op for op in self.problem.ops if value in op.inputs and op.window is Window.FORWARD]
        return block if all(op.block == block for op in readers) else None

    def _points(self) -> list[Point]:
        points: list[Point] = [(i, False) for i in range(len(self.problem.ops)) if self._is_forward(i)]
        done: set[int | None] = {None}
        for index, op in enumerate(self.problem.ops):
            if self._is_forward(index):
                continue
            for block in map(self.inner, op.inputs):
                if block not in done:
                    done.add(block)
                    points += [(i, True) for i, o in enumerate(self.problem.ops) if o.block == block and o.reruns]
            points.append((index, False))
        return points

    def _reading_points(self, value: int, *, forward: bool) -> list[int]:
        """Points of a window at which something reads the value, or would if its block is recomputed."""
        found = []
        for place, (index, again) in enumerate(self.points):
            op = self.problem.ops[index]
            if (self._is_forward(index) and not again) == forward:
                if value in op.inputs:
                    found.append(place)
                if not again and value in op.outputs and any(i.returned == value for i in self.problem.inputs):
                    found.append(place)
        return found

    def _alias_readers(self, value: int, *, forward: bool) -> list[int]:
        """Points at which an alias of the value, or an alias of that, is read."""
        found = []
        for alias, item in enumerate(self.problem.values):
            if item.alias_of == value and self._reading_points(value, forward=forward):
                found += self._reading_points(alias, forward=forward) + self._alias_readers(alias, forward=forward)
        return found

    def may_be_saved(self, value: int) -> bool:
        source = self._source(value)
        if source is None or not self._is_forward(source):
            return False
        always = self.inner(value) is None
        return any(always or not self.points[place][1] for place in self._reading_points(value, forward=False))

    def cost(self, decisions: Decisions) -> tuple[float, int] | None:
        """``(time, peak)``, or None if a conversion is impossible."""
        ops, stored, recompute, _ = decisions
        compute, blocking, hideable = ({window: 0.0 for window in Window} for _ in range(3))
        memory = [0] * len(self.points)
        for place, (index, again) in enumerate(self.points):
            op = self.problem.ops[index]
            if not again or (op.block is not None and recompute[op.block]):
                choice = op.choices[ops[index]]
                compute[Window.BACKWARD if again else op.window] += choice.time_s
                memory[place] += choice.temporary_bytes
        options = [item.choices[pick] for item, pick in zip(self.problem.inputs, stored, strict=True)]
        for item, option in zip(self.problem.inputs, options, strict=True):
            for place in range(len(memory)):
                memory[place] += option.fixed_bytes
                if item.returned is not None:
                    made = self.points.index((self._source(item.returned), False))  # type: ignore[arg-type]
                    if place > made or self.problem.num_microbatches > 1:
                        memory[place] += option.returned_bytes
        for value in range(len(self.problem.values)):
            for window in Window:
                if not self._copies(value, window, decisions, memory, blocking, hideable):
                    return None
        count, share = self.problem.num_microbatches, self.problem.hidden_share
        time_s = sum(option.update_s for option in options)
        once = {
            Window.FORWARD: sum(option.gather_s for option in options),
            Window.BACKWARD: sum(option.reduce_s for option in options),
        }
        for window in Window:
            for microbatch in range(count):
                more = once[window] if microbatch == 0 else 0.0
                time_s += compute[window] + blocking[window]
                time_s += max(0.0, hideable[window] + more - share * compute[window])
        return time_s, max(memory)

    def _copies(
        self, value: int, window: Window, decisions: Decisions, memory: list[int],
        blocking: dict[Window, float], hideable: dict[Window, float],
    ) -> bool:  # fmt: skip
        """Add the copies of a value in one window; False if one is impossible."""
        ops, stored, recompute, kept = decisions
        item, source = self.problem.values[value], self._source(value)
        forward = window is Window.FORWARD
        block = self.inner(value)
        dropped = block is not None and recompute[block]
        is_kept = self.may_be_saved(value) and not dropped
        reading = self._reading_points(value, forward=forward)
        starts: list[int] = []
        if source is None:
            if not reading:
                return True
            number = [i.value for i in self.problem.inputs].index(value)
            have = self.problem.inputs[number].choices[stored[number]].placement
        else:
            have = self.problem.ops[source].choices[ops[source]].outputs[self.problem.ops[source].outputs.index(value)]
            if forward != self._is_forward(source) and forward:
                return True
            if not forward and self._is_forward(source):
                if is_kept:
                    have = kept[value]
                elif dropped and (source, True) in self.points:
                    starts = [self.points.index((source, True))]
                else:
                    return True
            else:
                starts = [self.points.index((source, False))]
        last = max([*reading, *starts, *self._alias_readers(value, forward=forward)], default=-1)
        if item.alias_of is None:
            for place in range(starts[0] if starts else 0, last + 1 if starts else 0):
                memory[place] += item.num_bytes[have]
        wanted = self._wanted(value, reading, decisions)
        if forward and is_kept:
            wanted.add(kept[value])
            end = max([*self._reading_points(value, forward=False), *self._alias_readers(value, forward=False)])
            for place in range(len(memory)):
                alive = last < place <= end
                memory[place] += item.num_bytes[kept[value]] * (alive + self.problem.num_in_flight - 1)
        first = min(reading, default=starts[0] if starts else 0)
        for target in wanted - {have}:
            if (have, target) not in item.conversions:
                return False
            conversion = item.conversions[(have, target)]
            (hideable if item.overlappable else blocking)[window] += conversion.time_s
            memory[first] += conversion.temporary_bytes
            for place in range(first, last + 1):
                memory[place] += item.num_bytes[target]
        return True

    def _wanted(self, value: int, reading: list[int], decisions: Decisions) -> set[int]:
        ops, stored, recompute, _ = decisions
        wanted: set[int] = set()
        for place in reading:
            index, again = self.points[place]
            op = self.problem.ops[index]
            if again and not (op.block is not None and recompute[op.block]):
                continue
            pairs = zip(op.inputs, op.choices[ops[index]].inputs, strict=True)
            wanted |= {placement for v, placement in pairs if v == value and placement is not None}
            if value in op.outputs and not again:
                for item, pick in zip(self.problem.inputs, stored, strict=True):
                    back = item.choices[pick].returned
                    if item.returned == value and back is not None:
                        wanted.add(back)
        return wanted
