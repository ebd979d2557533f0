"""Ops as lines of Python.

torch generates its functions and methods from the same schemas as its ops, so an op's arguments are those of the
builtin function of its name. Arguments that are sizes are written anew from the widths that they are made of.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from partita.errors import InputError
from partita.search.structure.leaves import New, Reader, groups_of
from partita.search.structure.tracing import Trace, arguments_of, op_name, symbol_of
from partita.search.structure.widths import Extent, Product, Sum, Width, resolved, size_of, symbolic_size

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "__and__": "&", "__or__": "|", "__xor__": "^"}
_METHODS_IN_PYTHON = {"split", "unflatten"}
_FUNCTIONS_IN_PYTHON = {"silu", "mish", "pad"}
_MODES = {"train", "training"}  # arguments that say whether the network trains


class Wording:
    """Writes the ops of one call of a module.

    Args:
        value: text of a tensor.
        expression: text of a size that depends on those of the inputs.
        device: text of the device on which new tensors are made.
        trains: whether the network was traced while training.
    """

    def __init__(
        self,
        trace: Trace,
        new: New,
        value: Callable[[fx.Node], str],
        expression: Callable[[sympy.Expr], str],
        device: str,
        trains: bool,
    ) -> None:
        self._trace, self._new, self._value, self.expression = trace, new, value, expression
        self._device, self._trains = device, trains

    def op(self, node: fx.Node) -> str:
        assert isinstance(node.target, torch._ops.OpOverload)
        name = op_name(node)
        if node.target.namespace not in ("aten", "prims"):
            raise InputError(
                f"ops must be torch's own to be written, but {node.target} is not: that model has no file of its own"
            )
        values = arguments_of(node) | _rewritten(_Op(self, node), name)
        if name in ("split", "split_with_sizes", "unsafe_split") or (name == "chunk" and "sizes" in values):
            return f"{self.text(values['self'])}.split({self.text(values['sizes'])}, {values.get('dim', 0)})"
        if name in _SUBSCRIPTS:
            subscript = _SUBSCRIPTS[name](self, values)
            whole = subscript.replace(":, ", "") == ":"
            return self.text(values["self"]) if whole else f"{self.text(values['self'])}[{subscript}]"
        schema = node.target._schema.arguments
        given = [argument for place, argument in enumerate(schema) if place < len(node.args)
                 or argument.name in node.kwargs or argument.name == "reduction"]  # fmt: skip
        given = [argument for argument in given if argument.name not in ("layout", "pin_memory")]
        if name in _INFIX and len(given) == 2:
            a, b = (self.text(values[argument.name]) for argument in given)
            return f"({a} {_INFIX[name]} {b})"
        texts = []
        for argument in given:
            text = self._argument(argument.name, values[argument.name])
            by_name = argument.kwarg_only or argument.name == "reduction"  # functions have defaults of their own
            texts.append(f"{argument.name}={text}" if by_name else text)
        return self._called(node.target, name, texts, is_method=bool(given) and given[0].name == "self")

    def _argument(self, name: str, value: Any) -> str:
        if name in _MODES and value == self._trains:
            return "self.training"
        if name == "dropout_p" and value and self._trains:
            return f"{value!r} if self.training else 0.0"
        return self._device if name == "device" and value is not None else self.text(value)

    def _called(self, target: torch._ops.OpOverload, name: str, texts: list[str], is_method: bool) -> str:
        method = getattr(torch.Tensor, name, None)
        if is_method and (inspect.ismethoddescriptor(method) or name in _METHODS_IN_PYTHON):
            return f"{texts[0]}.{name}({', '.join(texts[1:])})"
        for module, prefix in ((torch, "torch"), (F, "F")):
            function = getattr(module, name, None)
            if inspect.isbuiltin(function) or (name in _FUNCTIONS_IN_PYTHON and callable(function)):
                return f"{prefix}.{name}({', '.join(texts)})"
        return f"torch.ops.aten.{name}.{target._overloadname}({', '.join(texts)})"

    def text(self, value: Any) -> str:
        if isinstance(value, _Words):
            return str(value)
        if isinstance(value, fx.Node):
            found = value.meta.get("val")
            return self._value(value) if isinstance(found, torch.Tensor | tuple | list) else self.number(found)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self.text, value))}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return self._device
        return str(value) if isinstance(value, torch.dtype | torch.memory_format) else repr(value)

    def number(self, value: Any) -> str:
        """A size, or what was computed from sizes."""
        if isinstance(value, int | float | bool):
            return repr(value)
        return self.expression(value.node.expr)

    def size(self, extent: Extent) -> str:
        """The size of a dim, from the widths of which it is made."""
        extent = resolved(extent)
        if isinstance(extent, Width):
            return str(size_of(extent, self._new)) if extent.symbol is None else self.expression(extent.symbol)
        if not _has_symbol(extent):
            return str(size_of(extent, self._new))
        if isinstance(extent, Sum):
            return "(" + " + ".join(map(self.size, extent.parts)) + ")"
        return " * ".join(f"({text})" if " " in text else text for text in map(self.size, extent.factors))


class _Words(str):
    """Text that stands as it is."""


def text_of(expr: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> str:
    """An expression of sizes in Python.

    Raises:
        InputError: it is not made by integer arithmetic.
    """
    text: str = str(expr.xreplace({symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}))
    if any(part in text for part in ("Piecewise", "ToFloat", "Pow", "Where", "TruncTo")):
        raise InputError(f"sizes must be integers made by + - * // % to be written, but one is {text}")
    return text


def _has_symbol(extent: Extent) -> bool:
    return bool(symbolic_size(extent).free_symbols)


def _slice_text(wording: Wording, values: Mapping[str, Any]) -> str:
    start, end = values.get("start"), values.get("end")
    step = f":{values['step']}" if values.get("step", 1) != 1 else ""
    bounds: str = ("" if start in (None, 0) else wording.text(start)) + ":"
    bounds += "" if end is None or (isinstance(end, int) and end >= 2**62) else wording.text(end)
    dim: int = values.get("dim", 0)
    if dim >= 0:
        return ":, " * dim + bounds + step
    return "..., " + bounds + step + ", :" * (-dim - 1)


def _index_text(wording: Wording, values: Mapping[str, Any]) -> str:
    return ", ".join(":" if index is None else wording.text(index) for index in values["indices"])


_SUBSCRIPTS: dict[str, Callable[[Wording, Mapping[str, Any]], str]] = {"slice": _slice_text, "index": _index_text}


# -- arguments that are sizes -----------------------------------------------------------------------------------------


class _Op(Reader):
    """One op whose sizes are written."""

    def __init__(self, wording: Wording, node: fx.Node) -> None:
        super().__init__(node, wording._trace, wording._new)
        self.wording = wording

    @property
    def result(self) -> Any:
        return self.trace.dims[self.node]

    def sizes(self, extents: list[Extent]) -> _Words:
        return _Words(f"[{', '.join(map(self.wording.size, extents))}]")


Rewritten = dict[str, Any]


def _shape(argument: str) -> Callable[[_Op], Rewritten]:
    return lambda op: {argument: op.sizes(op.result)}


def _unflattened(op: _Op) -> Rewritten:
    place = op.values["dim"] % len(op.extents("self"))
    return {"sizes": op.sizes(op.result[place : place + len(op.values["sizes"])])}


def _normalized(op: _Op) -> Rewritten:
    num = len(op.values["normalized_shape"])
    return {"normalized_shape": op.sizes(op.extents("input")[-num:])}


def _cut(op: _Op) -> Rewritten:
    place = op.values.get("dim", 0)
    parts = [dims[place] for dims in op.result]
    return {"sizes": op.sizes(parts)}


def _chunks(op: _Op) -> Rewritten:
    """An uneven change makes chunks pieces of their own sizes."""
    place = op.values.get("dim", 0)
    parts = [dims[place] for dims in op.result]
    even = len({size_of(part, op.new) for part in parts}) == 1 or any(map(_has_symbol, parts))
    return {} if even else _cut(op)


def _sliced(op: _Op) -> Rewritten:
    place = op.values.get("dim", 0)
    extent, taken = op.extents("self")[place], op.result[place]
    is_open = symbol_of(op.node.meta["val"].shape[place]) is not None or isinstance(op.values.get("start"), fx.Node)
    if is_open or op.values.get("step", 1) != 1:
        return {}
    if not op.new or size_of(extent) == size_of(taken):
        return {} if not op.new or op.values.get("end") is None else {"end": 2**63 - 1}
    start = op.values.get("start") or 0
    start = start + size_of(extent) if start < 0 else start
    at = offset(extent, start, op.new)
    return {"start": at, "end": at + size_of(taken, op.new)}


def _narrowed(op: _Op) -> Rewritten:
    place = op.values["dim"]
    extent, taken = op.extents("self")[place], op.result[place]
    if not op.new or isinstance(op.values["start"], fx.Node):
        return {}
    start = op.values["start"] % max(1, size_of(extent))
    return {"start": offset(extent, start, op.new), "length": _Words(op.wording.size(taken))}


def offset(extent: Extent, start: int, new: Mapping[Width, int]) -> int:
    """Where the entry ``start`` of a dim lies when widths have ``new`` sizes: a bound of its parts."""
    extent = resolved(extent)
    if start == 0:
        return 0
    if start == size_of(extent):
        return size_of(extent, new)
    if isinstance(extent, Sum):
        at = 0
        for part in extent.parts:
            if start < size_of(part):
                return at + offset(part, start, new)
            at, start = at + size_of(part, new), start - size_of(part)
        return at
    if isinstance(extent, Product):
        inner = Product(extent.factors[1:])
        return offset(extent.factors[0], start // size_of(inner), new) * size_of(inner, new)
    assert extent not in new, "a width that is cut is a sum"
    return start


def _groups(op: _Op) -> Rewritten:
    return {"groups": groups_of(op)}


def _rewritten(op: _Op, name: str) -> Rewritten:
    known = _REWRITTEN.get(name.removesuffix("_"))
    return known(op) if known else {}


_REWRITTEN: dict[str, Callable[[_Op], Rewritten]] = {
    "view": _shape("size"), "reshape": _shape("shape"), "_unsafe_view": _shape("size"), "expand": _shape("size"),
    "broadcast_to": _shape("size"), "unflatten": _unflattened, "layer_norm": _normalized, "rms_norm": _normalized,
    "split": _cut, "split_with_sizes": _cut, "unsafe_split": _cut, "chunk": _chunks, "slice": _sliced,
    "narrow": _narrowed,
}  # fmt: skip
_REWRITTEN |= dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), _shape("size"))
_REWRITTEN |= dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _shape("size"))
_REWRITTEN |= dict.fromkeys((f"conv{turn}{rank}d" for turn in ("", "_transpose") for rank in "123"), _groups)
