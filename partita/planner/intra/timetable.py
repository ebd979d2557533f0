"""When things happen in a step: the order of all runs of ops, and from when to when each value is read.

Facts of an `IntraProblem` that no decision changes; the model and the price both start from them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from partita.planner.intra.problem import IntraProblem, Op, Window

Use = tuple[int, int]
"""``(op, slot)``: who reads a value, and in which of its inputs."""


@dataclass
class Reading:
    """Who reads one value in one window, and when (positions in `Timetable.steps`).

    ``returned_to`` are the inputs that take it back; that counts as a consumer at the producer's position.
    """

    ops: list[Use] = field(default_factory=list)
    reruns: list[Use] = field(default_factory=list)
    returned_to: list[int] = field(default_factory=list)
    first: int = -1
    last: int = -1

    def at(self, position: int) -> None:
        self.first = position if self.first < 0 else min(self.first, position)
        self.last = max(self.last, position)

    def __bool__(self) -> bool:
        return bool(self.ops or self.reruns or self.returned_to)


@dataclass
class Timetable:
    """The order of a step.

    Attributes:
        steps: ``(op, again)`` in order; ``again`` marks the runs that happen only if the op's block is recomputed.
        position: by op: of its run. ``rerun_position``: of its second run, for ops that have one.
        producer: by value: ``(op, slot)``, or None for inputs.
        forward, backward: by value: who reads it in that window.
        inner: by value: the block to which it is inner, or None.
        saved: the values that are saved for the backward window (inner ones: unless recomputed).
        block_class: by block: blocks of one class are recomputed alike, because their ops are tied.
    """

    steps: list[tuple[int, bool]]
    position: dict[int, int]
    rerun_position: dict[int, int]
    producer: list[Use | None]
    forward: list[Reading]
    backward: list[Reading]
    inner: list[int | None]
    saved: list[int]
    block_class: list[int]

    def window_of(self, problem: IntraProblem, value: int) -> Window:
        """The window in which a value first is there (inputs: forward)."""
        source = self.producer[value]
        return Window.FORWARD if source is None else problem.ops[source[0]].window


def make_timetable(problem: IntraProblem) -> Timetable:
    """The facts of `problem` that do not depend on decisions."""
    producer: list[Use | None] = [None] * len(problem.values)
    readers: list[list[Use]] = [[] for _ in problem.values]
    for index, op in enumerate(problem.ops):
        for slot, value in enumerate(op.outputs):
            producer[value] = (index, slot)
        for slot, value in enumerate(op.inputs):
            readers[value].append((index, slot))
    inner = [_inner_block(problem, producer[v], readers[v], v) for v in range(len(problem.values))]
    steps = _order(problem, inner)
    table = Timetable(
        steps=steps,
        position={op: place for place, (op, again) in enumerate(steps) if not again},
        rerun_position={op: place for place, (op, again) in enumerate(steps) if again},
        producer=producer,
        forward=[Reading() for _ in problem.values],
        backward=[Reading() for _ in problem.values],
        inner=inner,
        saved=[],
        block_class=_block_classes(problem),
    )
    for value, uses in enumerate(readers):
        _note_readers(problem, table, value, uses)
    _extend_for_aliases(problem, table)
    for value, source in enumerate(producer):
        if source is not None and problem.ops[source[0]].window is Window.FORWARD:
            later = table.backward[value]
            if later.ops or (later.reruns and inner[value] is None):
                table.saved.append(value)
    return table


def _inner_block(problem: IntraProblem, source: Use | None, uses: list[Use], value: int) -> int | None:
    if source is None or any(item.returned == value for item in problem.inputs):
        return None
    op = problem.ops[source[0]]
    forward = [problem.ops[user] for user, _ in uses if problem.ops[user].window is Window.FORWARD]
    return op.block if op.reruns and all(user.block == op.block for user in forward) else None


def _order(problem: IntraProblem, inner: list[int | None]) -> list[tuple[int, bool]]:
    again: dict[int, list[int]] = {}
    for index, op in enumerate(problem.ops):
        if op.reruns and op.block is not None:
            again.setdefault(op.block, []).append(index)
    steps: list[tuple[int, bool]] = []
    for index, op in enumerate(problem.ops):
        if op.window is Window.BACKWARD:
            for block in dict.fromkeys(inner[value] for value in op.inputs):
                if block is not None:
                    steps += [(item, True) for item in again.pop(block, [])]
        steps.append((index, False))
    return steps


def _note_readers(problem: IntraProblem, table: Timetable, value: int, uses: list[Use]) -> None:
    forward, backward = table.forward[value], table.backward[value]
    for use in uses:
        op = problem.ops[use[0]]
        reading = forward if op.window is Window.FORWARD else backward
        reading.ops.append(use)
        reading.at(table.position[use[0]])
        if use[0] in table.rerun_position:
            backward.reruns.append(use)
            backward.at(table.rerun_position[use[0]])
    for index, item in enumerate(problem.inputs):
        source = table.producer[value]
        if item.returned == value and source is not None:
            reading = forward if problem.ops[source[0]].window is Window.FORWARD else backward
            reading.returned_to.append(index)
            reading.at(table.position[source[0]])


def _extend_for_aliases(problem: IntraProblem, table: Timetable) -> None:
    """What has an alias is alive in each window until the alias' last reader."""
    for op in reversed(problem.ops):
        for value in op.outputs:
            base = problem.values[value].alias_of
            if base is not None:
                for readings in (table.forward, table.backward):
                    if readings[base]:
                        readings[base].last = max(readings[base].last, readings[value].last)


def _block_classes(problem: IntraProblem) -> list[int]:
    """Blocks that share a tied op that runs again are one class (by its first block)."""
    leader = list(range(problem.num_blocks))

    def find(block: int) -> int:
        while leader[block] != block:
            block = leader[block]
        return block

    first: dict[Hashable, Op] = {}
    for op in problem.ops:
        if op.tie is not None and op.reruns and op.block is not None:
            other = first.setdefault(op.tie, op)
            assert other.block is not None
            one, two = sorted((find(other.block), find(op.block)))
            leader[two] = one
    return [find(block) for block in range(problem.num_blocks)]
