"""Op calls and values: the light form of a graph on which sharding works.

An `OpCall` is one call of an ATen op with its tensor arguments taken out and replaced by numbered `Slot`s, so that
equal calls (an LSTM has thousands) share their rules, decompositions and local shapes. Tuples that ops return are
resolved on the way in: an `Op` has a tuple of output `Value`s, and `operator.getitem` nodes vanish.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from partita.errors import CaptureError
from partita.graph.graph import OpInfo
from partita.sharding.communication import COMMUNICATION_OPS


@dataclass(frozen=True)
class Slot:
    """Stands for tensor argument number ``index`` of a call, counted from the left through args, then kwargs."""

    index: int


@dataclass(frozen=True)
class TensorSpec:
    """Shape, element type and device of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...] = ()

    @property
    def num_elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(
            tuple(int(extent) for extent in tensor.shape),
            tensor.dtype,
            tensor.device,
            tuple(int(step) for step in tensor.stride()),
        )


@functools.lru_cache(maxsize=4096)
def _name_of(target: Callable[..., Any]) -> str:
    """An op's name is put together anew each time that it is asked for, and planners ask tens of thousands of times."""
    return str(target)


@functools.lru_cache(maxsize=4096)
def _base_name_of(target: Callable[..., Any]) -> str:
    parts = str(target).split(".")
    return parts[1] if len(parts) > 2 else parts[0]


@dataclass(frozen=True)
class OpCall:
    """One call: ``target(*args, **kwargs)`` with `Slot`s for tensors, and the global shapes that go in and come out."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec | None, ...]
    returns_tuple: bool

    @property
    def name(self) -> str:
        """E.g. ``aten.mm.default``."""
        return _name_of(self.target)

    @property
    def base_name(self) -> str:
        """E.g. ``mm``: the name without name space and overload."""
        return _base_name_of(self.target)

    @property
    def overload(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that differ at most in the identity of their tensors."""
        return (self.name, repr(self.args), repr(sorted(self.kwargs.items())), self.inputs, self.outputs)

    @property
    def is_random(self) -> bool:
        """Whether the op draws random numbers (attention only does with dropout)."""
        tags = getattr(self.target, "tags", ())
        return torch.Tag.nondeterministic_seeded in tags and self.schema_argument("dropout_p", 1.0) != 0.0

    @property
    def is_exchange(self) -> bool:
        """Whether the call is an exchange along an axis over which the graph was split before."""
        return self.target in COMMUNICATION_OPS

    def schema_argument(self, name: str, default: Any = None) -> Any:
        """The argument that the op's schema calls ``name``; ``default`` if the schema has none of that name."""
        schema = getattr(self.target, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.name == name:
                if place < len(self.args):
                    return self.args[place]
                return self.kwargs.get(name, argument.default_value)
        return default

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at ``position`` or of that name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


@dataclass(eq=False)
class Value:
    """A tensor of the graph. ``producer`` is None for placeholders."""

    name: str
    spec: TensorSpec
    meta: Any  # the FakeTensor of the whole value
    producer: Op | None = None
    index: int = 0

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Op:
    """One op of the graph: a call on values. ``origin`` names the node of the captured graph that it stems from."""

    name: str
    call: OpCall
    inputs: tuple[Value, ...]
    origin: str
    info: OpInfo | None
    stack_trace: str | None = None
    outputs: tuple[Value | None, ...] = field(default=())

    def __repr__(self) -> str:
        return self.name


@dataclass
class Program:
    """A graph in this form: placeholders by name, ops in order, outputs (a value or a plain number/None)."""

    placeholders: dict[str, Value]
    ops: list[Op]
    outputs: tuple[Value | Any, ...]


def make_call(target: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> tuple[OpCall, tuple[Value, ...]]:
    """Split ``target(*args, **kwargs)``, whose tensors are `Value`s, into a call with slots and its values."""
    values: list[Value] = []

    def take(item: Any) -> Any:
        if isinstance(item, Value):
            values.append(item)
            return Slot(len(values) - 1)
        return item

    new_args = map_aggregate(tuple(args), take)
    new_kwargs = map_aggregate(dict(kwargs), take)
    returns_tuple = isinstance(result, (tuple, list))
    results = tuple(result) if returns_tuple else (result,)
    outputs = tuple(TensorSpec.of(item) if isinstance(item, torch.Tensor) else None for item in results)
    call = OpCall(target, tuple(new_args), dict(new_kwargs), tuple(v.spec for v in values), outputs, returns_tuple)
    return call, tuple(values)


def fill_slots(call_args: Any, tensors: tuple[Any, ...]) -> Any:
    """``call_args`` with every `Slot` replaced by its tensor (or node)."""
    return map_aggregate(call_args, lambda item: tensors[item.index] if isinstance(item, Slot) else item)


def attach_outputs(op: Op, results: Any) -> None:
    """Make the output values of ``op`` from the fake results of its call."""
    items = tuple(results) if isinstance(results, (tuple, list)) else (results,)
    outputs: list[Value | None] = []
    for index, item in enumerate(items):
        if isinstance(item, torch.Tensor):
            name = op.name if len(items) == 1 else f"{op.name}_{index}"
            outputs.append(Value(name, TensorSpec.of(item), item, op, index))
        else:
            outputs.append(None)
    op.outputs = tuple(outputs)


def read_graph(
    module: fx.GraphModule,
    *,
    inputs: Mapping[str, Value] | None = None,
    prefix: str = "",
    origin: str = "",
    info: OpInfo | None = None,
    stack_trace: str | None = None,
) -> Program:
    """The ops of ``module``; with ``inputs``, its placeholders stand for those values (used for decompositions)."""
    values: dict[fx.Node, Any] = {}
    program = Program({}, [], ())
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = inputs[node.name] if inputs is not None else Value(node.name, *_spec_and_meta(node))
            values[node] = program.placeholders[node.name] = value
        elif node.op == "get_attr":
            raise CaptureError(
                f"every tensor of the graph must be a placeholder, but node {node.name} reads attribute {node.target}; "
                "make it a constant input of the graph",
                op=str(node.target),
            )
        elif node.op == "call_function" and node.target is operator.getitem:
            source, index = node.args
            values[node] = values[source].outputs[index]
        elif node.op == "call_function":
            values[node] = _read_op(node, values, program, prefix, origin, info, stack_trace)
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            program.outputs = tuple(_single(values[r]) if isinstance(r, fx.Node) else r for r in results)
    return program


def _single(item: Any) -> Any:
    return item.outputs[0] if isinstance(item, Op) else item


def _spec_and_meta(node: fx.Node) -> tuple[TensorSpec, Any]:
    meta = node.meta["val"]
    if not isinstance(meta, torch.Tensor):
        raise CaptureError(f"every placeholder must be a tensor, but {node.name} is a {type(meta).__name__}")
    return TensorSpec.of(meta), meta


def _read_op(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    program: Program,
    prefix: str,
    origin: str,
    info: OpInfo | None,
    stack_trace: str | None,
) -> Op:
    args, kwargs = map_aggregate(
        (node.args, node.kwargs), lambda item: _single(values[item]) if isinstance(item, fx.Node) else item
    )
    assert callable(node.target)
    call, inputs = make_call(node.target, args, kwargs, node.meta.get("val"))
    own_info = node.meta.get("op")
    op = Op(
        name=prefix + node.name,
        call=call,
        inputs=inputs,
        origin=origin or node.meta.get("origin", node.name),
        info=own_info if isinstance(own_info, OpInfo) else info,
        stack_trace=stack_trace or node.stack_trace,
    )
    attach_outputs(op, node.meta.get("val"))
    program.ops.append(op)
    return op
