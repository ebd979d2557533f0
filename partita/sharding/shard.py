"""`shard`: one graph over the workers of one mesh axis, exactly.

Example:
    >>> sharded = shard(graph.module, {"x": Shard(0, (4, 3))}, axis="data", size=2)
    >>> sharded.local(1)                     # what worker 1 runs, with local shapes and exchanges
    >>> sharded.output_placements            # loss and gradients: Partial() or Replicate()
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from partita.errors import InputError
from partita.graph.torch_adapter import module_of
from partita.sharding.calls import Op, Program, Value, fill_slots, read_graph
from partita.sharding.conversions import EXCHANGES
from partita.sharding.halo_plain import with_plain_exchanges
from partita.sharding.localize import FakeRunner, Layout, Localizer, coordinate_key, live_steps
from partita.sharding.placement import Partial, Placement, Replicate, Shard
from partita.sharding.propagate import Call, Conversion, Propagation, Step
from partita.sharding.rules import PARTIAL, REPLICATE
from partita.sharding.ruleset import NO_SUMS, find_rules_of, rules_of, stop_searching


@dataclass(frozen=True)
class Exchange:
    """One exchange inside a sharded graph. ``num_bytes`` is the size of the whole value."""

    node: str  # name of the captured graph's node whose value is exchanged
    kind: str  # "all_reduce", "reduce_scatter", "all_gather" or "all_to_all"
    num_bytes: int
    source: str  # "file:line" in the user's code, "" if unknown


@dataclass
class ShardedGraph:
    """One graph over the ``size`` workers of mesh axis ``axis``.

    Attributes:
        input_placements: of every placeholder, the hoisted ones included (they come last, Replicate).
        output_placements: one per element of the output tuple (Replicate where it is no tensor).
        placements: by name of the captured graph's nodes, as far as they still exist.
        exchanges: all exchanges but those that convert outputs.
        gathered: ops that run whole on gathered inputs because no rule fits.
        prologue: computes the hoisted values from whole inputs; None if nothing is hoisted.
        hoisted: names of the hoisted values, in the order of the prologue's output tuple.
        decisions: by op name, the text of the rule that was taken: given to `shard`, the same ones are taken again.
    """

    axis: str
    size: int
    input_placements: Mapping[str, Placement]
    output_placements: tuple[Placement, ...]
    placements: Mapping[str, Placement]
    exchanges: tuple[Exchange, ...]
    gathered: tuple[str, ...]
    prologue: fx.GraphModule | None
    hoisted: tuple[str, ...]
    decisions: Mapping[str, str]
    _layout: Layout
    _runner: FakeRunner
    _locals: dict[object, fx.GraphModule] = field(default_factory=dict)

    def local(self, coordinate: int, *, plain: bool = False) -> fx.GraphModule:
        """What worker ``coordinate`` runs. Workers whose graphs are equal share one module. With ``plain``, halos
        travel by the four plain exchanges."""
        if not 0 <= coordinate < self.size:
            raise InputError(f"0 <= coordinate < {self.size} must hold on axis {self.axis!r}, but got {coordinate}")
        key = (coordinate_key(self._layout, coordinate), plain)
        if key not in self._locals:
            module = Localizer(self._layout, coordinate, self._runner).write()
            self._locals[key] = with_plain_exchanges(module, coordinate) if plain else module
        return self._locals[key]


def shard(
    module: fx.GraphModule,
    seeds: Mapping[str, Placement],
    *,
    axis: str,
    size: int,
    must_replicate: frozenset[int] = frozenset(),
    must_be_partial: frozenset[int] = frozenset(),
    free_inputs: frozenset[str] = frozenset(),
    hoist: bool = False,
    local_statistics: bool = False,
    wanted: Mapping[int, Shard] | None = None,
    decisions: Mapping[str, str] | None = None,
    gathered_inputs: frozenset[str] = frozenset(),
    runner: FakeRunner | None = None,
) -> ShardedGraph:
    """Split ``module`` over ``size`` workers, following the placements of its inputs through the graph.

    Args:
        module: functional ATen graph; every placeholder and op has its global FakeTensor in ``meta["val"]``.
        seeds: placeholder name -> placement; placeholders that are not named are Replicate.
        must_replicate: indices of outputs that every worker shall have whole.
        must_be_partial: indices of outputs that shall be summands. All others are Replicate or Partial, but for those
            in ``wanted``.
        free_inputs: placeholders whose placement is chosen here, as their consumers like.
        hoist: compute values that depend on nothing but the placeholders of ``seeds`` and ``free_inputs`` (and on
            constants made inside) beforehand from whole inputs, where they would need an exchange.
        local_statistics: batch norm uses the statistics of each worker's own samples.
        wanted: index of an output -> the shard that every worker shall have of it (of the gradient of a parameter that
            comes in cut, for instance).
        gathered_inputs: placeholders of ``seeds`` that every worker reads whole, after one gathering.
        decisions: op name -> text of the rule by which it shall run, or "decomposed"; all other ops, and those that
            have no such rule here, run as is cheapest.
        runner: knows local calls of other cuts of the same graph.

    Raises:
        InputError: a seed names no placeholder, or its sizes do not fit.
    """
    program = read_graph(module)
    _check(program, seeds, free_inputs, size, axis)
    runner = FakeRunner.of(module) if runner is None else runner
    propagation = Propagation(
        size=size,
        shares=next((p.sizes for p in seeds.values() if isinstance(p, Shard)), None),
        mode=runner.mode,
        rules=rules_of,
        hoist=hoist,
        local_statistics=local_statistics,
        decisions=decisions,
    )
    for name, value in program.placeholders.items():
        hoistable = name in seeds or name in free_inputs
        propagation.add_placeholder(value, seeds.get(name, REPLICATE), hoistable=hoistable)
        if name in gathered_inputs:
            propagation.gather(value)
    find_rules_of(op.call for op in program.ops)
    try:
        propagation.run(program.ops)
    finally:
        stop_searching()
    num_inner = len(propagation.steps)
    outputs = _place_outputs(propagation, program, must_replicate, must_be_partial, wanted or {})
    return _assemble(propagation, program, seeds, free_inputs, outputs, num_inner, axis, runner)


def _check(program: Program, seeds: Mapping[str, Placement], free_inputs: frozenset[str], size: int, axis: str) -> None:
    if size < 1:
        raise InputError(f"axis {axis!r} must have at least one worker, but size is {size}")
    for name in (*seeds, *free_inputs):
        if name not in program.placeholders:
            known = ", ".join(program.placeholders)
            raise InputError(f"a seed must name a placeholder of the graph, but got {name!r}; the graph has: {known}")
    for name, placement in seeds.items():
        if not isinstance(placement, Shard):
            continue
        shape = program.placeholders[name].spec.shape
        fits = placement.dim < len(shape) and sum(placement.sizes) == shape[placement.dim]
        if not fits or len(placement.sizes) != size or min(placement.sizes) < 1:
            raise InputError(
                f"the sizes of {name!r} on axis {axis!r} must be {size} positive numbers that add up to its extent, "
                f"but got dim {placement.dim}, sizes {placement.sizes} for shape {shape}; use fewer workers"
            )


def _place_outputs(
    propagation: Propagation,
    program: Program,
    must_replicate: frozenset[int],
    must_be_partial: frozenset[int],
    wanted: Mapping[int, Shard],
) -> list[tuple[Value, Placement] | object]:
    outputs: list[tuple[Value, Placement] | object] = []
    for index, item in enumerate(program.outputs):
        if not isinstance(item, Value):
            outputs.append(item)
            continue
        value = propagation.resolve(item)
        known = propagation.available.get(value, ())
        target: Placement
        if index in wanted:
            target = wanted[index]
        elif index in must_replicate or value.spec.dtype in NO_SUMS:
            target = REPLICATE
        elif index in must_be_partial or (PARTIAL in known and REPLICATE not in known):
            target = PARTIAL
        elif REPLICATE in known or not propagation.facts[value].varied:
            target = REPLICATE
        else:
            target = PARTIAL  # a shard becomes a summand without an exchange
        propagation.convert(value, target)
        outputs.append((value, target))
    return outputs


def _assemble(
    propagation: Propagation,
    program: Program,
    seeds: Mapping[str, Placement],
    free_inputs: frozenset[str],
    outputs: list[tuple[Value, Placement] | object],
    num_inner: int,
    axis: str,
    runner: FakeRunner,
) -> ShardedGraph:
    inner = set(map(id, propagation.steps[:num_inner]))
    steps = live_steps(propagation.steps, outputs)
    hoisted = tuple(v for v in propagation.hoisted if _reads(steps, outputs, v))
    placements = {name: seeds.get(name, REPLICATE) for name in program.placeholders}
    steps = _settle_free_inputs(program, free_inputs, steps, outputs, placements)
    placeholders = [(name, value, placements[name]) for name, value in program.placeholders.items()]
    names = tuple(_hoisted_name(value) for value in hoisted)
    placeholders += [(name, value, REPLICATE) for name, value in zip(names, hoisted, strict=True)]
    exchanges = tuple(
        _exchange(step)
        for step in steps
        if isinstance(step, Conversion) and step.kind in EXCHANGES and id(step) in inner
    )
    live_ops = {step.op.name for step in steps if isinstance(step, Call)}
    return ShardedGraph(
        axis=axis,
        size=propagation.size,
        input_placements=placements | dict.fromkeys(names, REPLICATE),
        output_placements=tuple(item[1] if isinstance(item, tuple) else REPLICATE for item in outputs),
        placements=_placements_by_origin(propagation, program, placements),
        exchanges=exchanges,
        gathered=tuple(name for name in propagation.gathered if name in live_ops),
        prologue=_prologue(propagation, hoisted, program) if hoisted else None,
        hoisted=names,
        decisions=dict(propagation.decisions),
        _layout=Layout(axis, tuple(placeholders), tuple(steps), tuple(outputs), propagation.size),
        _runner=runner,
    )


def _hoisted_name(value: Value) -> str:
    """A hoisted value is named like its node; a placeholder that is also needed whole must differ from itself."""
    return value.name if value.producer is not None else f"{value.name}_whole"


def _reads(steps: list[Step], outputs: list[tuple[Value, Placement] | object], value: Value) -> bool:
    """Whether a live step or an output reads ``value`` whole (that is: hoisted)."""
    if (value, REPLICATE) in outputs:
        return True
    for step in steps:
        if isinstance(step, Conversion):
            if step.value is value and step.source == REPLICATE:
                return True
        elif any(v is value and p == REPLICATE for v, p in zip(step.inputs, step.input_placements, strict=True)):
            return True
    return False


def _settle_free_inputs(
    program: Program,
    free_inputs: frozenset[str],
    steps: list[Step],
    outputs: list[tuple[Value, Placement] | object],
    placements: dict[str, Placement],
) -> list[Step]:
    """Free inputs that are only ever sliced, and always the same way, come in sliced."""
    for name in free_inputs & program.placeholders.keys():
        value = program.placeholders[name]
        if isinstance(placements[name], Shard):
            continue
        slices = [s for s in steps if isinstance(s, Conversion) and s.value is value and s.source == REPLICATE]
        targets = {s.target for s in slices}
        read_whole = (value, REPLICATE) in outputs or any(
            isinstance(s, Call)
            and any(v is value and p == REPLICATE for v, p in zip(s.inputs, s.input_placements, strict=True))
            for s in steps
        )
        if len(targets) == 1 and not read_whole and isinstance(target := targets.pop(), Shard) and target.outer == 1:
            placements[name] = target
            steps = [s for s in steps if s not in slices]
    return steps


def _exchange(step: Conversion) -> Exchange:
    producer = step.value.producer
    info = producer.info if producer else None
    return Exchange(
        node=producer.origin if producer else step.value.name,
        kind=step.kind,
        num_bytes=step.value.spec.num_bytes,
        source=info.source if info else "",
    )


def _placements_by_origin(
    propagation: Propagation, program: Program, inputs: Mapping[str, Placement]
) -> dict[str, Placement]:
    found = dict(inputs)
    for op in program.ops:
        for output in op.outputs:
            if output is not None:
                known = propagation.available.get(propagation.resolve(output))
                if known:
                    found.setdefault(op.origin, known[0])
    return found


def _prologue(propagation: Propagation, hoisted: tuple[Value, ...], program: Program) -> fx.GraphModule:
    """The graph that computes ``hoisted`` from whole placeholders."""
    needed: dict[Op, None] = {}
    inputs: set[Value] = set()
    stack = list(hoisted)
    while stack:
        value = stack.pop()
        if value.producer is None:
            inputs.add(value)
        elif value.producer not in needed:
            needed[value.producer] = None
            stack += [propagation.resolve(v) for v in value.producer.inputs]
    graph = fx.Graph()
    nodes: dict[Value, fx.Node] = {}
    for name, value in program.placeholders.items():
        if value in inputs:
            nodes[value] = graph.create_node("placeholder", name, (), {}, name)
            nodes[value].meta = {"val": value.meta, "origin": name}
    for op in sorted(needed, key=propagation.order.__getitem__):
        _write_whole(graph, nodes, op, propagation)
    graph.output(tuple(nodes[value] for value in hoisted))
    return module_of(graph)


def _write_whole(graph: fx.Graph, nodes: dict[Value, fx.Node], op: Op, propagation: Propagation) -> None:
    tensors = tuple(nodes[propagation.resolve(v)] for v in op.inputs)
    args, kwargs = fill_slots((op.call.args, dict(op.call.kwargs)), tensors)
    node = graph.create_node("call_function", op.call.target, args, kwargs, op.name)
    metas = tuple(value.meta if value is not None else None for value in op.outputs)
    node.meta = {"val": metas if op.call.returns_tuple else metas[0], "origin": op.origin}
    if op.info is not None:
        node.meta["op"] = op.info
    for index, value in enumerate(op.outputs):
        if value is None:
            continue
        nodes[value] = node
        if op.call.returns_tuple:
            nodes[value] = graph.call_function(operator.getitem, (node, index))
            nodes[value].meta = {"val": value.meta, "origin": op.origin}


__all__ = ["Exchange", "Partial", "Replicate", "Shard", "ShardedGraph", "shard"]
