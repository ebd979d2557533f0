"""What a call of a module did, as the lines of its `forward`."""

from __future__ import annotations

import keyword
import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import sympy
import torch
from torch import fx

from partita.search.structure.modules import Modules
from partita.search.structure.scopes import Scope
from partita.search.structure.tracing import in_place, op_name, symbol_of
from partita.search.structure.wording import Wording, text_of

_SHORTER = {"scaled_dot_product_attention": "attention", "embedding": "embedded", "contiguous": "x"}
LONGEST_INNER = 60  # characters of an expression that stands inside another


class Unwritten(Exception):
    """A call can't be a function of its own; ``path`` is its module."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass
class Body:
    """A function's parts.

    Attributes:
        sizes: what the last parameters are: sizes of the network's inputs that none of its own has.
    """

    parameters: list[str]
    lines: list[str]
    results: list[str]
    sizes: list[sympy.Expr]


def written(scope: Scope, modules: Modules, inputs: Sequence[str] | None = None) -> Body:
    """The lines of one call.

    Args:
        inputs: texts of its inputs; by default they are parameters ``x``, ``x_2``, ...

    Raises:
        Unwritten: it reads sizes that none of its inputs has, and can't be given them.
    """
    return _Writer(scope, modules, inputs).body()


class _Writer:
    def __init__(self, scope: Scope, modules: Modules, inputs: Sequence[str] | None) -> None:
        self._scope, self._modules = scope, modules
        self._names: dict[fx.Node, str] = {}
        self._inner: dict[fx.Node, str] = {}  # expressions that stand where they are used
        self._taken: Counter[str] = Counter()
        self._lines: list[str] = []
        self._uses = _uses(scope)
        for place, node in enumerate(scope.inputs):
            self._names[node] = inputs[place] if inputs else self._name("x")
        self._sizes: dict[sympy.Expr, str] = {}
        tensors = [node for node in scope.inputs if isinstance(node.meta.get("val"), torch.Tensor)]
        device = f"{self._names[tensors[0]]}.device" if tensors else "None"
        self._wording = Wording(
            modules.trace, modules.new, self._value, self._expression, device, modules.network.model.training
        )

    def body(self) -> Body:
        parameters = list(self._names.values())
        items = [item for item in self._scope.body
                 if isinstance(item, Scope) or item.target is not operator.getitem]  # fmt: skip
        place = 0
        while place < len(items):
            run = self._loop(items[place:])
            if run:
                self._write_loop(run)
            else:
                self._write(items[place], items[place + 1] if place + 1 < len(items) else None)
            place += max(1, len(run))
        results = [_bare(self._value(node)) for node in self._scope.outputs]
        if self._sizes and not self._modules.takes_sizes(self._scope.path):
            raise Unwritten(self._scope.path)
        return Body([*parameters, *self._sizes.values()], self._lines, results, list(self._sizes))

    # -- names ------------------------------------------------------------------------------------------------------

    def _name(self, base: str) -> str:
        base = re.sub(r"\W", "_", base).strip("_") or "x"
        base = _SHORTER.get(base, base)
        known = keyword.iskeyword(base) or base in ("self", "torch", "nn", "F")
        base = base if base.isidentifier() and not known else f"x_{base}"
        self._taken[base] += 1
        return base if self._taken[base] == 1 else self._name(f"{base}_{self._taken[base]}")

    def _value(self, node: fx.Node) -> str:
        if node in self._names:
            return self._names[node]
        if node in self._inner:
            return self._inner.pop(node)
        if node.target is operator.getitem:
            return f"{self._value(node.args[0])}[{node.args[1]}]"  # type: ignore[arg-type]
        aliases = self._modules.network.aliases[self._modules.trace.names[node]]
        return self._modules.attribute(next(filter(self._scope.owns, aliases)), self._scope.path)

    def _expression(self, expr: sympy.Expr) -> str:
        """From the sizes of what comes in, else given."""
        found = self._size_of_input(expr)
        names = {symbol: self._size_of_input(symbol) for symbol in expr.free_symbols}
        if found is not None:
            return found
        if expr not in self._sizes and all(names.values()):
            return text_of(expr, {symbol: name for symbol, name in names.items() if name})
        if expr not in self._sizes:
            self._sizes[expr] = self._name("size")
        return self._sizes[expr]

    def _size_of_input(self, expr: sympy.Expr) -> str | None:
        for node in self._scope.inputs:
            value = node.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if symbol_of(size) == expr:
                    return f"{self._value(node)}.size({dim})"
        return None

    # -- lines ------------------------------------------------------------------------------------------------------

    def _write(self, item: fx.Node | Scope, following: fx.Node | Scope | None) -> None:
        text = self._text(item)
        results = _results(item)
        base = item.path.rpartition(".")[2] if isinstance(item, Scope) else op_name(item).strip("_")
        if isinstance(item, Scope) and base.isdigit():
            base = item.path.split(".")[-2] if "." in item.path else "x"
        if isinstance(item, fx.Node) and in_place(item):
            self._lines.append(text)
            self._names[item] = self._value(item.args[0])  # type: ignore[arg-type]
        elif results == _own_results(item) and len(results) == 1 and self._stands_inside(results[0], following, text):
            self._inner[results[0]] = text
        elif results:
            for node in results:
                self._names[node] = self._name(base)
            known = _unpacked(item) if isinstance(item, fx.Node) else results
            left = [self._names[node] if node is not None else "_" for node in known]
            self._lines.append(f"{', '.join(left)} = {_bare(text)}")
        else:
            self._lines.append(_bare(text))

    def _text(self, item: fx.Node | Scope) -> str:
        if isinstance(item, fx.Node):
            return self._wording.op(item)
        arguments = [_bare(self._value(node)) for node in item.inputs] + self._given_sizes(item)
        return f"{self._modules.attribute(item.path, self._scope.path)}({', '.join(arguments)})"

    def _given_sizes(self, scope: Scope) -> list[str]:
        return [self._expression(expr) for expr in self._modules.sizes.get(scope, ())]

    def _stands_inside(self, node: fx.Node, following: fx.Node | Scope | None, text: str) -> bool:
        if self._uses[node] != 1 or isinstance(node.meta.get("val"), tuple | list):
            return False
        if following is None and self._scope.outputs == [node]:
            return True  # it is returned
        if len(text) > LONGEST_INNER or following is None or node in self._scope.outputs:
            return False
        if isinstance(following, Scope):
            return node in following.inputs
        return node in following.all_input_nodes and not in_place(following)

    # -- loops ------------------------------------------------------------------------------------------------------

    def _loop(self, items: Sequence[fx.Node | Scope]) -> list[Scope]:
        """Calls at the start of ``items`` that go through a whole list of modules, each with the last one's result."""
        head = items[0]
        if not isinstance(head, Scope) or not head.path.endswith(".0"):
            return []
        holder = head.path.removesuffix(".0")
        length = self._modules.length_of_list(holder)
        run = [item for item in items[:length] if isinstance(item, Scope)]
        if len(run) != length or length < 2 or [item.path for item in run] != [f"{holder}.{i}" for i in range(length)]:
            return []
        if any(len(item.outputs) != 1 or len(item.inputs) != len(head.inputs) for item in run):
            return []
        if any(self._modules.sizes.get(item) != self._modules.sizes.get(head) for item in run):
            return []
        for before, after in pairwise(run):
            moved = [a for a, b in zip(after.inputs, head.inputs, strict=True) if a is not b]
            if moved != before.outputs or self._uses[moved[0]] != 1 or moved[0] in self._scope.outputs:
                return []
        places = {item.inputs.index(before.outputs[0]) for before, item in pairwise(run)}
        return run if len(places) == 1 else []

    def _write_loop(self, run: list[Scope]) -> None:
        place = run[1].inputs.index(run[0].outputs[0])
        start = run[0].inputs[place]
        holder = run[0].path.removesuffix(".0")
        each = self._name(holder.rpartition(".")[2].removesuffix("s") or "module")
        if start in self._names and self._uses[start] == 1:
            carried = self._names[start]
        else:
            text = self._value(start)
            carried = self._name("x")
            self._lines.append(f"{carried} = {_bare(text)}")
        arguments = [carried if at == place else self._value(node) for at, node in enumerate(run[0].inputs)]
        arguments += self._given_sizes(run[0])
        self._lines.append(f"for {each} in {self._modules.attribute(holder, self._scope.path)}:")
        self._lines.append(f"    {carried} = {each}({', '.join(arguments)})")
        self._names[run[-1].outputs[0]] = carried


def _uses(scope: Scope) -> Counter[fx.Node]:
    found: Counter[fx.Node] = Counter(scope.outputs)
    for item in scope.body:
        if isinstance(item, Scope):
            found.update(item.inputs)
        else:
            fx.node.map_arg((item.args, item.kwargs), lambda node: found.update([node]))
    return found


def _results(item: fx.Node | Scope) -> list[fx.Node]:
    """Values that it makes and that are used."""
    if isinstance(item, Scope):
        return item.outputs
    return [node for node in _unpacked(item) if node is not None] if item.users else []


def _own_results(item: fx.Node | Scope) -> list[fx.Node]:
    """Results that are what the expression gives, and no parts of it."""
    return item.outputs if isinstance(item, Scope) else [item]


def _unpacked(node: fx.Node) -> list[fx.Node | None]:
    """The node itself, or of several results those that are read, by their places."""
    value = node.meta.get("val")
    if not isinstance(value, tuple | list):
        return [node]
    found: list[fx.Node | None] = [None] * len(value)
    for user in node.users:
        if user.target is not operator.getitem:
            return [node]
        found[user.args[1]] = user  # type: ignore[index]
    return found


def _bare(text: str) -> str:
    """Without the parentheses around it."""
    if not text.startswith("(") or not text.endswith(")"):
        return text
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and place < len(text) - 1:
            return text
    return text[1:-1]
