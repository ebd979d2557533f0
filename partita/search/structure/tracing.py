"""Which widths a network has: the equations of its ops, solved.

Every op tells what the dims of its results are made of and which dims of its inputs must be equal (`equations`,
`movements`). Dims of the network's inputs and results are fixed, and so is what an op reads or writes that has no
equation here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from partita.search.structure.widths import Extent, Uneven, Width, equate, fix, size_of, symbolic_size

Dims = list[Extent]


@dataclass
class Call:
    """One op of a network, with the dims of its inputs.

    Attributes:
        name: of the op, without overload.
        values: its arguments by their names in the op's schema.
    """

    node: fx.Node
    name: str
    values: dict[str, Any]
    trace: Trace

    @property
    def why(self) -> str:
        return f"{self.name} reads it"

    @property
    def tensors(self) -> list[fx.Node]:
        """All inputs that are tensors."""
        return [node for node in self.node.all_input_nodes if node in self.trace.dims]

    def has(self, argument: str) -> bool:
        return self.values.get(argument) is not None

    def dims(self, argument: str) -> Dims:
        return self.dims_of(self.values[argument])

    def dims_of(self, node: fx.Node) -> Dims:
        found = self.trace.dims[node]
        assert isinstance(found, list)
        return list(found)

    def sizes(self, argument: str) -> list[int]:
        return sizes_of(self.values[argument].meta["val"])

    def result(self, index: int | None = None) -> torch.Tensor:
        value = self.node.meta["val"]
        found: torch.Tensor = value if index is None else value[index]
        return found

    def fresh(self, index: int | None = None, fixed: str = "") -> Dims:
        """New widths for a result's dims."""
        return fresh(self.result(index), fixed)

    def mixed(self, extent: Extent, why: str) -> None:
        """Every result depends on all units of ``extent``, through no weight of theirs."""
        self.trace.mixed.append((extent, why))

    def contracted(self, argument: str, dim: int) -> None:
        """The op sums over this dim of an input: a weight of units, if it is a parameter."""
        node = self.values[argument]
        extent = self.dims(argument)[dim]
        while node.op == "call_function" and str(node.target).startswith("aten.t."):
            node, dim = node.args[0], 1 - dim
        if node in self.trace.names:
            self.trace.weights.append((self.trace.names[node], dim % len(self.trace.dims[node])))
        else:
            self.mixed(extent, f"{self.name} sums over it")


Equation = Callable[[Call], Any]
EQUATIONS: dict[str, Equation] = {}  # by the op's name


def equation(*names: str) -> Callable[[Equation], Equation]:
    def add(function: Equation) -> Equation:
        EQUATIONS.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass
class Trace:
    """The dims of all values of one exported network.

    Attributes:
        dims: of each node; a list of them where it has several results.
        names: first names of the parameters and buffers that placeholders stand for.
        weights: (name, dim) of parameters over whose dim an op sums.
        made: (name, dim) of parameters that are read by index, with the features that this gives.
        products: extents that are multiplied in a product or a convolution.
        scales: parameters that a norm multiplies with.
        mixed: extents all of whose units another op reads at once, and which.
        unknown: ops without equations.
    """

    dims: dict[fx.Node, Any] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    weights: list[tuple[str, int]] = field(default_factory=list)
    made: list[tuple[str, int]] = field(default_factory=list)
    products: list[list[Extent]] = field(default_factory=list)
    scales: set[str] = field(default_factory=set)
    mixed: list[tuple[Extent, str]] = field(default_factory=list)
    unknown: dict[str, fx.Node] = field(default_factory=dict)

    def read(self, program: ExportedProgram, tied: Mapping[str, str]) -> None:
        """Read the ops of ``program``. ``tied`` has the first name of each parameter and buffer."""
        by_name: dict[str, Dims] = {}
        kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = kinds[node.name]
                if spec.kind == InputKind.USER_INPUT:
                    self._note(node, f"it is a dim of the input {node.name}")
                else:
                    self.names[node] = name = tied.get(str(spec.target), str(spec.target))
                    self._note(node, "")
                    self.dims[node] = by_name.setdefault(name, self.dims[node])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self._fix(value, "it is a dim of the result")

    def _note(self, node: fx.Node, fixed: str) -> None:
        if isinstance(node.meta.get("val"), torch.Tensor):
            self.dims[node] = fresh(node.meta["val"], fixed)

    def _fix(self, node: fx.Node, why: str) -> None:
        for extent in _flat(self.dims.get(node, [])):
            fix(extent, why)

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source = self.dims.get(node.args[0])  # type: ignore[arg-type]
            if source is not None:
                self.dims[node] = source[node.args[1]]
            return
        values = node.meta.get("val")
        if not isinstance(values, torch.Tensor | Sequence) or not isinstance(node.target, torch._ops.OpOverload):
            return  # sizes, and arithmetic with them
        call = Call(node, op_name(node), arguments_of(node), self)
        name = call.name.removesuffix("_") if in_place(node) else call.name
        known = EQUATIONS.get(name) or (EQUATIONS["pointwise"] if torch.Tag.pointwise in node.target.tags else None)
        try:
            found = known(call) if known else None
        except Uneven:
            found = None
        if found is None:
            self._unknown(node, values, call)
            return
        self.dims[node] = _checked(node, values, found)

    def _unknown(self, node: fx.Node, values: Any, call: Call) -> None:
        self.unknown.setdefault(str(node.target), node)
        for source in call.tensors:
            self._fix(source, call.why)
        why = f"{call.name} makes it"
        self.dims[node] = (
            fresh(values, why) if isinstance(values, torch.Tensor) else [
                fresh(value, why) if isinstance(value, torch.Tensor) else [] for value in values
            ]
        )  # fmt: skip


def fresh(value: torch.Tensor, fixed: str = "") -> Dims:
    return [width_of(size, fixed) for size in value.shape]


def width_of(size: int | torch.SymInt, fixed: str = "") -> Width:
    """A new width of a size that may depend on those of the inputs."""
    hint = hint_of(size)
    symbol = symbol_of(size)
    fixed = fixed or ("its size depends on the inputs" if symbol is not None else "it is one" if hint == 1 else "")
    return Width(hint, fixed, symbol)


def hint_of(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def symbol_of(size: int | torch.SymInt) -> sympy.Expr | None:
    if isinstance(size, int):
        return None
    expr = size.node.expr
    return expr if expr.free_symbols else None


def sizes_of(value: torch.Tensor) -> list[int]:
    return [hint_of(size) for size in value.shape]


def equal(a: Sequence[Extent], b: Sequence[Extent]) -> None:
    for x, y in zip(a, b, strict=True):
        equate(x, y)


def op_name(node: fx.Node) -> str:
    """The op's name, without overload; "" if it is none of torch's."""
    return node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else ""


def in_place(node: fx.Node) -> bool:
    """Whether the op changes its first input."""
    name = op_name(node)
    return name.endswith("_") and not name.endswith("__")


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """By their names in the op's schema, with defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= {argument.name: value for argument, value in zip(arguments, node.args, strict=False)}
    return given | dict(node.kwargs)


def _flat(dims: Any) -> list[Extent]:
    return [extent for item in dims for extent in _flat(item)] if isinstance(dims, list) else [dims]


def _checked(node: fx.Node, values: Any, found: Any) -> Any:
    """Equations that give a wrong shape are a mistake of ours, and better found here. Where sizes agree for this
    example alone, the dim is a new one."""
    if not isinstance(values, torch.Tensor):
        pairs = zip(values, found, strict=True)
        return [_checked(node, *pair) if isinstance(pair[0], torch.Tensor) else [] for pair in pairs]
    if list(map(size_of, found)) != sizes_of(values):
        raise AssertionError(f"{node.format_node()} has shape {sizes_of(values)}, but its dims are {found}")
    return [_same_always(extent, size) for extent, size in zip(found, values.shape, strict=True)]


def _same_always(extent: Extent, size: int | torch.SymInt) -> Extent:
    symbol = symbol_of(size)
    known = symbolic_size(extent)
    if not known.free_symbols and symbol is None:
        return extent
    if symbol is not None and sympy.expand(known - symbol) == 0:
        return extent
    fix(extent, "its size depends on the inputs")
    return width_of(size)
