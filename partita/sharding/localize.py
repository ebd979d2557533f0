"""Localisation: turns the steps of a propagation into one worker's graph with local shapes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.graph.graph import OpInfo
from partita.graph.torch_adapter import module_of
from partita.sharding import communication
from partita.sharding.calls import OpCall, Slot, TensorSpec, Value, fill_slots
from partita.sharding.halo import WINDOW_KINDS, write_window_conversion
from partita.sharding.local_forms import trace_local
from partita.sharding.placement import Extremum, Placement, Shard
from partita.sharding.placement import local_shape as _local
from partita.sharding.propagate import Call, Conversion, Step
from partita.sharding.rules import Part, Rule, part_of

aten = torch.ops.aten
# Kernels that refuse what is not contiguous, which only running them tells; the ops themselves copy it before.
_WANTS_DENSE = frozenset({aten._pdist_forward.default, aten._pdist_backward.default})
LOCAL_KINDS = frozenset({"slice", "keep", "pad"})


@dataclass(frozen=True)
class Layout:
    """What the local graphs of all workers have in common: steps, placeholders and outputs."""

    axis: str
    placeholders: tuple[tuple[str, Value, Placement], ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[Value, Placement] | Any, ...]
    size: int = 1


def live_steps(steps: Sequence[Step], outputs: Sequence[tuple[Value, Placement] | Any]) -> list[Step]:
    """The steps that an output needs. Decided once for all workers, so that all take part in the same exchanges; those
    along an axis that was split before stay, since other workers of it may need what comes of them."""
    wanted = {item for item in outputs if isinstance(item, tuple)}
    kept: list[Step] = []
    for step in reversed(steps):
        if isinstance(step, Conversion):
            if (step.value, step.target) in wanted:
                kept.append(step)
                wanted.add((step.value, step.source))
            continue
        results = zip(step.op.outputs, step.output_placements, strict=True)
        kept_anyway = step.op.call.is_random or step.op.call.is_exchange
        if kept_anyway or any((value, placement) in wanted for value, placement in results):
            kept.append(step)
            pairs = zip(step.inputs, step.input_placements, strict=True)
            wanted.update((value, placement) for value, placement in pairs if placement is not None)
    return kept[::-1]


def local_shape(spec: TensorSpec, placement: Placement, coordinate: int) -> tuple[int, ...]:
    """Shape of the piece that worker ``coordinate`` has."""
    return _local(spec.shape, placement, coordinate)


class FakeRunner:
    """Shapes, strides and types of local calls, and graphs of local forms, each distinct one once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._results: dict[Any, Any] = {}
        self._forms: dict[Any, fx.GraphModule] = {}

    @classmethod
    def of(cls, module: fx.GraphModule) -> FakeRunner:
        """One for the fake tensors of a graph."""
        values = [node.meta["val"] for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        return cls(detect_fake_mode(values) or FakeTensorMode())

    def run(self, target: Any, args: Any, kwargs: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
        """``target`` on fake ``tensors``, which stand for the slots of ``args`` and ``kwargs``."""
        key = (str(target), repr(args), repr(sorted(kwargs.items())), tuple(TensorSpec.of(t) for t in tensors))
        if key not in self._results:
            filled_args, filled_kwargs = fill_slots((args, dict(kwargs)), tensors)
            with self.mode:
                self._results[key] = target(*filled_args, **filled_kwargs)
        return self._results[key]

    def trace(self, call: OpCall, rule: Rule, part: Part, tensors: tuple[torch.Tensor | None, ...]) -> fx.GraphModule:
        """The local form of a call (`trace_local`); to be read only."""
        layouts = tuple(None if x is None else (TensorSpec.of(x), x.stride(), x.device) for x in tensors)
        key = (call.key, rule.text(), part, layouts)
        if key not in self._forms:
            self._forms[key] = trace_local(call, rule, part, tensors, self.mode)
        return self._forms[key]

    def empty(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        key = ("empty", shape, like.dtype, like.device)
        if key not in self._results:
            with self.mode:
                self._results[key] = torch.empty(shape, dtype=like.dtype, device=like.device)
        result: torch.Tensor = self._results[key]
        return result


class Localizer:
    """Writes the graph of one coordinate."""

    def __init__(self, layout: Layout, coordinate: int, runner: FakeRunner) -> None:
        self.layout = layout
        self.coordinate = coordinate
        self.runner = runner
        self.graph = fx.Graph()
        self.nodes: dict[tuple[Value, Placement], fx.Node] = {}

    def write(self) -> fx.GraphModule:
        for name, value, placement in self.layout.placeholders:
            node = self.graph.create_node("placeholder", name, (), {}, name)
            node.meta = {"val": self._sliced(value, placement), "origin": value.name}
            self.nodes[(value, placement)] = node
        for step in self.layout.steps:
            if isinstance(step, Conversion):
                self._convert(step)
            else:
                self._call(step)
        outputs = tuple(self.nodes[item] if isinstance(item, tuple) else item for item in self.layout.outputs)
        output = self.graph.output(outputs)
        output.meta = {"val": tuple(n.meta["val"] if isinstance(n, fx.Node) else n for n in outputs)}
        return module_of(self.graph)

    def _sliced(self, value: Value, placement: Placement) -> torch.Tensor:
        """The piece of a placeholder: a view of the whole, as the workers of one process have it."""
        meta: torch.Tensor = value.meta
        if not isinstance(placement, Shard):
            return meta
        start, length = placement.offset(self.coordinate), placement.sizes[self.coordinate]
        with self.runner.mode:
            return meta.detach().narrow(placement.dim, start, length)

    # -- calls ------------------------------------------------------------------------------------------------------

    def _call(self, step: Call) -> None:
        call = step.op.call
        pairs = zip(step.output_placements, call.outputs, strict=True)
        shapes = tuple(None if p is None or s is None else local_shape(s, p, self.coordinate) for p, s in pairs)
        target, args, kwargs = call.target, call.args, call.kwargs
        if step.rule.rewrite is not None:
            target, args, kwargs = step.rule.rewrite(call, shapes)
        inputs = tuple(
            None if placement is None else self.nodes[(value, placement)]
            for value, placement in zip(step.inputs, step.input_placements, strict=True)
        )
        if call.is_exchange:
            node = self.graph.create_node("call_function", target, inputs, dict(kwargs), step.op.name)
            assert shapes[0] is not None and step.op.outputs[0] is not None
            node.meta = {**_meta_of(step), "val": self.runner.empty(shapes[0], step.op.outputs[0].meta)}
        elif step.rule.local is not None:
            self._call_local(step, inputs)
            return
        else:
            node = self._emit(target, args, kwargs, inputs, step.op.name, _meta_of(step))
            self._give_info(node, step)
        self._take_outputs(step, node, shapes)

    def _emit(
        self, target: Any, args: Any, kwargs: Any, inputs: tuple[fx.Node | None, ...], name: str, meta: dict[str, Any]
    ) -> fx.Node:
        used = _used_slots(args, kwargs)
        if target in _WANTS_DENSE:
            inputs = tuple(self._dense(node, meta) for node in inputs)
        compact = {index: place for place, index in enumerate(used)}
        small_args, small_kwargs = fx.node.map_aggregate(
            (args, dict(kwargs)), lambda item: Slot(compact[item.index]) if isinstance(item, Slot) else item
        )
        chosen = tuple(node.meta["val"] for index in used if (node := inputs[index]) is not None)
        try:
            value = self.runner.run(target, small_args, small_kwargs, chosen)
        except (RuntimeError, ValueError):
            if target not in (aten.view.default, aten._unsafe_view.default):
                raise
            # The piece does not lie in memory as the whole did (a slice of a whole is not contiguous): copy it first.
            source = inputs[used[0]]
            assert source is not None
            copy = self._emit(
                aten.clone.default, (Slot(0),), {"memory_format": torch.contiguous_format}, (source,), name, meta
            )
            return self._emit(target, args, kwargs, (copy,), name, meta)
        full_args, full_kwargs = fill_slots((args, dict(kwargs)), inputs)
        node = self.graph.create_node("call_function", target, full_args, full_kwargs, name)
        node.meta = {**meta, "val": value}
        return node

    def _call_local(self, step: Call, inputs: tuple[fx.Node | None, ...]) -> None:
        """Write the rule's local form, op by op; the FLOPs are those of the calls of the op itself."""
        call = step.op.call
        part = part_of(call, step.rule, step.blocks, self.coordinate)
        tensors = tuple(None if node is None else node.meta["val"] for node in inputs)
        module = self.runner.trace(call, step.rule, part, tensors)
        given = iter([node for node in inputs if node is not None])
        moved: dict[fx.Node, fx.Node] = {}
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                moved[inner] = next(given)
            elif inner.op == "call_function":
                node = self.graph.node_copy(inner, moved.__getitem__)
                node.name = self.graph._graph_namespace.create_name(f"{step.op.name}_{inner.name}", node)
                node.meta = {**_meta_of(step), "val": inner.meta["val"]}
                if inner.target is call.target:
                    self._give_info(node, step)
                elif inner.target is not operator.getitem:
                    self._local_info(node, next(value for value in step.op.outputs if value is not None))
                moved[inner] = node
        results = next(iter(reversed(module.graph.nodes))).args[0]
        for index, (value, placement) in enumerate(zip(step.op.outputs, step.output_placements, strict=True)):
            if value is not None and placement is not None:
                self._check_shape(step, index, moved[results[index]], part.output_shapes[index])
                self.nodes[(value, placement)] = moved[results[index]]

    def _check_shape(self, step: Call, index: int, node: fx.Node, shape: tuple[int, ...] | None) -> None:
        actual = tuple(node.meta["val"].shape)
        if actual != shape:
            raise AssertionError(
                f"{step.op.name} ({step.op.call.name}) by rule {step.rule.text()}: local output {index} must have "
                f"shape {shape}, but has {actual}"
            )

    def _dense(self, node: fx.Node | None, meta: dict[str, Any]) -> fx.Node | None:
        if node is None or node.meta["val"].is_contiguous():
            return node
        options = {"memory_format": torch.contiguous_format}
        return self._emit(aten.clone.default, (Slot(0),), options, (node,), f"{node.name}_dense", meta)

    def _take_outputs(self, step: Call, node: fx.Node, shapes: tuple[tuple[int, ...] | None, ...]) -> None:
        for index, (value, placement) in enumerate(zip(step.op.outputs, step.output_placements, strict=True)):
            if value is None or placement is None:
                continue
            item = node
            if step.op.call.returns_tuple:
                item = self.graph.create_node("call_function", operator.getitem, (node, index), {}, value.name)
                item.meta = {**_meta_of(step), "val": node.meta["val"][index]}
            self._check_shape(step, index, item, shapes[index])
            if index in step.rule.averaged:
                weight = step.blocks.counts[self.coordinate] / step.rule.extent
                item = self._emit(
                    aten.mul.Scalar, (Slot(0), weight), {}, (item,), f"{value.name}_weighted", _meta_of(step)
                )
                self._local_info(item, None)
            self.nodes[(value, placement)] = item

    def _give_info(self, node: fx.Node, step: Call) -> None:
        info = step.op.info
        if info is None:
            return
        share = step.blocks.counts[self.coordinate] / step.rule.extent if step.rule.extent else 1.0
        num_bytes = 0 if getattr(node.target, "is_view", False) else _bytes_of(node)
        node.meta["op"] = OpInfo(
            flops=round(info.flops * share),
            num_bytes=num_bytes,
            phase=info.phase,
            module=info.module,
            source=info.source,
        )

    def _local_info(self, node: fx.Node, value: Value | None) -> None:
        """Info of a local op that sharding itself inserted: bytes, no FLOPs, phase of the value's op."""
        source = value.producer.info if value is not None and value.producer is not None else None
        if source is not None:
            num_bytes = 0 if getattr(node.target, "is_view", False) else _bytes_of(node)
            node.meta["op"] = OpInfo(
                flops=0, num_bytes=num_bytes, phase=source.phase, module=source.module, source=source.source
            )

    # -- conversions ------------------------------------------------------------------------------------------------

    def _convert(self, step: Conversion) -> None:
        value, node = step.value, self.nodes[(step.value, step.source)]
        meta: dict[str, Any] = {"origin": value.producer.origin if value.producer else value.name}
        runs = max(p.outer for p in (step.source, step.target, Shard(0, ())) if isinstance(p, Shard))
        source, target, shape = step.source, step.target, value.spec.shape
        dim = next((p.dim for p in (source, target) if isinstance(p, Shard)), 0)
        if runs > 1:
            # Taken as (runs, run length), a cut of runs is an ordinary one of the next dim.
            shape = (*shape[:dim], runs, shape[dim] // runs, *shape[dim + 1 :])
            source, target = (p.run if isinstance(p, Shard) else p for p in (source, target))
            node = self._reshape(node, _local(shape, source, self.coordinate), meta, value)
        if step.kind == "renamed":
            pass
        elif step.kind == "all_extreme":
            node = self._take_extreme(step, node, meta)
        elif step.kind in WINDOW_KINDS:
            node = write_window_conversion(self, step, node, meta)
        elif step.kind in LOCAL_KINDS:
            node = self._local_conversion(step, source, target, shape, node, meta)
        else:
            function = getattr(communication, step.kind)
            arguments = self._exchange_arguments(step.kind, source, target)
            node = self.graph.create_node("call_function", function, (node,), arguments, step.name(self.layout.axis))
            node.meta = {**meta, "val": self.runner.empty(_local(shape, target, self.coordinate), value.meta)}
        if runs > 1:
            node = self._reshape(node, local_shape(value.spec, step.target, self.coordinate), meta, value)
        self.nodes[(value, step.target)] = node

    def _take_extreme(self, step: Conversion, node: fx.Node, meta: dict[str, Any]) -> fx.Node:
        """Gather the workers' entries in a new dim 0 and take the largest (smallest) along it."""
        value, name, size = step.value, step.name(self.layout.axis), self.layout.size
        assert isinstance(step.source, Extremum)
        row = self._emit(aten.unsqueeze.default, (Slot(0), 0), {}, (node,), name, meta)
        self._local_info(row, value)
        options: dict[str, Any] = {"axis": self.layout.axis, "dim": 0, "sizes": (1,) * size}
        rows = self.graph.create_node("call_function", communication.all_gather, (row,), options, name)
        rows.meta = {**meta, "val": self.runner.empty((size, *value.spec.shape), value.meta)}
        function = aten.amax.default if step.source.kind == "max" else aten.amin.default
        result = self._emit(function, (Slot(0), [0]), {}, (rows,), name, meta)
        self._local_info(result, value)
        return result

    def _reshape(self, node: fx.Node, shape: tuple[int, ...], meta: dict[str, Any], value: Value) -> fx.Node:
        name = f"{value.name}_runs_{self.layout.axis}"
        new = self._emit(aten.view.default, (Slot(0), list(shape)), {}, (node,), name, meta)
        self._local_info(new, value)
        return new

    def _exchange_arguments(self, kind: str, source: Placement, target: Placement) -> dict[str, Any]:
        arguments: dict[str, Any] = {"axis": self.layout.axis}
        if kind == "reduce_scatter":
            assert isinstance(target, Shard)
            arguments |= {"dim": target.dim, "sizes": target.sizes}
        elif isinstance(source, Shard):
            arguments |= {"dim": source.dim, "sizes": source.sizes}
            if isinstance(target, Shard):
                arguments |= {"new_dim": target.dim, "new_sizes": target.sizes}
        return arguments

    def _local_conversion(
        self,
        step: Conversion,
        source: Placement,
        target: Placement,
        shape: tuple[int, ...],
        node: fx.Node,
        meta: dict[str, Any],
    ) -> fx.Node:
        """Slice, keep or pad ``node``, whose whole value has ``shape``."""
        value, name = step.value, step.name(self.layout.axis)
        if step.kind == "slice":
            assert isinstance(target, Shard)
            start = target.offset(self.coordinate)
            end = start + target.sizes[self.coordinate]
            node = self._emit(aten.slice.Tensor, (Slot(0), target.dim, start, end), {}, (node,), name, meta)
        elif step.kind == "pad":
            assert isinstance(source, Shard)
            before = source.offset(self.coordinate)
            after = sum(source.sizes) - before - source.sizes[self.coordinate]
            pads = [0, 0] * (len(shape) - 1 - source.dim) + [before, after]
            node = self._emit(aten.constant_pad_nd.default, (Slot(0), pads, 0), {}, (node,), name, meta)
        elif self.coordinate == 0:
            return node
        else:
            # Zeros of the source's shape read the source: levels and stages come out alike on all coordinates.
            node = self._emit(aten.zeros_like.default, (Slot(0),), {}, (node,), name, meta)
        self._local_info(node, value)
        return node


def _used_slots(args: Any, kwargs: Any) -> list[int]:
    used: list[int] = []

    def note(item: Any) -> Any:
        if isinstance(item, Slot):
            used.append(item.index)
        return item

    fx.node.map_aggregate((args, dict(kwargs)), note)
    return used


def _meta_of(step: Call) -> dict[str, Any]:
    meta: dict[str, Any] = {"origin": step.op.origin}
    if step.op.stack_trace:
        meta["stack_trace"] = step.op.stack_trace
    return meta


def _bytes_of(node: fx.Node) -> int:
    """What the op reads and writes."""
    tensors = [source.meta["val"] for source in node.all_input_nodes]
    result = node.meta["val"]
    tensors += result if isinstance(result, (tuple, list)) else [result]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def coordinate_key(layout: Layout, coordinate: int) -> tuple[Any, ...]:
    """Equal for coordinates whose local graphs are the same."""
    sizes: set[tuple[int, ...]] = set()
    depends = False
    placements: list[Placement | None] = [placement for _, _, placement in layout.placeholders]
    for step in layout.steps:
        if isinstance(step, Conversion):
            depends = depends or step.kind in LOCAL_KINDS | WINDOW_KINDS
            placements += [step.source, step.target]
        else:
            depends = depends or step.rule.local is not None
            placements += [*step.input_placements, *step.output_placements]
    sizes = {placement.sizes for placement in placements if isinstance(placement, Shard)}
    local = tuple(sorted((s, s[coordinate]) for s in sizes))
    return (local, coordinate if depends else -1)
