"""A captured graph as ops for the planner: taken apart where needed, windows told apart, views in each window their
own.

* An op that no rule runs in parts is replaced by its decomposition, if torch has one.
* Ops are ordered forward window first.
* A view of a forward value that the backward window reads is made again there, from what it is a view of: views cost
  nothing, so that of a value and its views only the value is saved. The second one follows the first in its choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.graph.graph import Graph, OpInfo, Phase
from partita.planner.intra.problem import Window
from partita.planner.intra.ways import Ways
from partita.sharding.calls import Op, Value, read_graph
from partita.sharding.decompositions import decompose
from partita.sharding.ruleset import find_rules_of, stop_searching

Key = tuple[Value, bool]
"""A value, and whether it is the view that is made again in the backward window."""


@dataclass(frozen=True, eq=False)
class Item:
    """One op of the planner's list; ``again``: a view that is made a second time."""

    op: Op
    window: Window
    inputs: tuple[Key, ...]
    outputs: tuple[Key | None, ...]
    again: bool = False

    @property
    def is_view(self) -> bool:
        return is_view(self.op)


@dataclass
class Listing:
    """All ops in the planner's order; results by output of the graph (None where it is no tensor)."""

    items: list[Item]
    placeholders: Mapping[str, Value]
    results: list[Value | None]
    taken_apart: list[str] = field(default_factory=list)


def is_view(op: Op) -> bool:
    """Whether the op's results share the memory of its one input."""
    return bool(getattr(op.call.target, "is_view", False)) and len(op.call.inputs) == 1


def list_ops(graph: Graph, ways: Ways) -> Listing:
    """The ops of `graph` for the planner."""
    program = read_graph(graph.module)
    mode = _fake_mode(program.placeholders)
    find_rules_of(op.call for op in program.ops)
    try:
        ops, alias, apart = _take_apart(program.ops, ways, mode)
    finally:
        stop_searching()
    results = [_resolve(item, alias) if isinstance(item, Value) else None for item in program.outputs]
    windows = _windows(ops, alias)
    forward = [op for op in ops if windows[op] is Window.FORWARD]
    backward = [op for op in ops if windows[op] is Window.BACKWARD]
    items = [Item(op, Window.FORWARD, _keys(op, alias), _given(op)) for op in forward]
    items += _Backward(windows, alias).items(backward)
    return Listing(items, program.placeholders, results, apart)


def _fake_mode(placeholders: Mapping[str, Value]) -> FakeTensorMode:
    metas = [value.meta for value in placeholders.values() if isinstance(value.meta, torch.Tensor)]
    return detect_fake_mode(metas) or FakeTensorMode()


def _resolve(value: Value, alias: Mapping[Value, Value]) -> Value:
    while value in alias:
        value = alias[value]
    return value


def _keys(op: Op, alias: Mapping[Value, Value]) -> tuple[Key, ...]:
    return tuple((_resolve(value, alias), False) for value in op.inputs)


def _given(op: Op, again: bool = False) -> tuple[Key | None, ...]:
    return tuple(None if value is None else (value, again) for value in op.outputs)


def _take_apart(ops: list[Op], ways: Ways, mode: FakeTensorMode) -> tuple[list[Op], dict[Value, Value], list[str]]:
    """Ops without rules replaced by their decomposition; what stands for their results; their names."""
    found: list[Op] = []
    alias: dict[Value, Value] = {}
    apart: list[str] = []
    for op in ops:
        small = all(spec.num_elements <= 1 for spec in op.call.inputs)  # nothing to be gathered
        whole = small or op.call.is_random or ways.has_rules(op.call)
        inner = None if whole else decompose(op.call, mode)
        if inner is None:
            found.append(op)
            continue
        apart.append(op.name)
        names = [node.name for node in inner.graph.nodes if node.op == "placeholder"]
        values = [_resolve(value, alias) for value in op.inputs]
        info = None
        if op.info is not None:
            info = OpInfo(0, 0, op.info.phase, op.info.module, op.info.source)
        program = read_graph(
            inner, inputs=dict(zip(names, values, strict=True)), prefix=f"{op.name}_", origin=op.origin, info=info
        )
        found += program.ops
        for output, result in zip(op.outputs, program.outputs, strict=True):
            if output is not None:
                alias[output] = result
    return found, alias, apart


def _windows(ops: list[Op], alias: Mapping[Value, Value]) -> dict[Op, Window]:
    """Backward is what the capture says is, what reads it, and what is unmarked and only read there."""
    found: dict[Op, Window] = {}
    for op in ops:
        producers = [_resolve(value, alias).producer for value in op.inputs]
        late = any(producer is not None and found[producer] is Window.BACKWARD for producer in producers)
        marked = op.info is not None and op.info.phase is Phase.BACKWARD
        found[op] = Window.BACKWARD if late or marked else Window.FORWARD
    return found


class _Backward:
    """Lists the backward ops, with the views that they need made again."""

    def __init__(self, windows: Mapping[Op, Window], alias: Mapping[Value, Value]) -> None:
        self.windows, self.alias = windows, alias
        self._made: set[Value] = set()
        self._items: list[Item] = []

    def items(self, ops: list[Op]) -> list[Item]:
        for op in ops:
            inputs = tuple(self._read(_resolve(value, self.alias)) for value in op.inputs)
            self._items.append(Item(op, Window.BACKWARD, inputs, _given(op)))
        return self._items

    def _read(self, value: Value) -> Key:
        chain: list[Op] = []
        current = value
        while self._is_remade(current) and current not in self._made:
            assert current.producer is not None
            chain.append(current.producer)
            self._made.update(output for output in current.producer.outputs if output is not None)
            current = _resolve(current.producer.inputs[0], self.alias)
        for op in reversed(chain):
            source = _resolve(op.inputs[0], self.alias)
            inputs = ((source, self._is_remade(source)),)
            self._items.append(Item(op, Window.BACKWARD, inputs, _given(op, again=True), again=True))
        return value, self._is_remade(value)

    def _is_remade(self, value: Value) -> bool:
        op = value.producer
        return op is not None and self.windows[op] is Window.FORWARD and is_view(op)
