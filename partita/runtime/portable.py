"""Functional graphs as plain data: to send them to another process, and to know them again on disk.

A graph becomes a list of entries, one a node, with ops by name. Its text is canonical: equal for two graphs exactly if
every op, argument and order is equal, in every process and run.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_PLAIN = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
GETITEM = "operator.getitem"
NAMESPACES = ("aten", "prims", "mkldnn", "partita")  # of ops that torch or partita brings along


class NotPortableError(ValueError):
    """The graph holds something that another process cannot be given by value."""


@dataclass(frozen=True)
class Ref:
    """The node of that number."""

    number: int

    def __repr__(self) -> str:
        return f"%{self.number}"


@dataclass(frozen=True)
class Entry:
    """One node: `op` as in fx, `target` the name of the op (of a placeholder: nothing)."""

    op: str
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


def to_entries(graph: fx.Graph) -> tuple[Entry, ...]:
    """The graph as data.

    Raises:
        NotPortableError: an op of it is neither of torch nor of partita, or an argument is no plain value.
    """
    number = {node: index for index, node in enumerate(graph.nodes)}
    entries = []
    for node in graph.nodes:
        args = tuple(_value(argument, number) for argument in node.args)
        kwargs = tuple(sorted((name, _value(argument, number)) for name, argument in node.kwargs.items()))
        entries.append(Entry(node.op, _target(node), args, kwargs))
    return tuple(entries)


def from_entries(entries: tuple[Entry, ...]) -> fx.GraphModule:
    """The graph again, without `meta`."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for index, entry in enumerate(entries):
        args = tuple(_argument(value, nodes) for value in entry.args)
        kwargs = {name: _argument(value, nodes) for name, value in entry.kwargs}
        if entry.op == "placeholder":
            nodes.append(graph.placeholder(f"input_{index}"))
        elif entry.op == "output":
            nodes.append(graph.output(*args))
        else:
            nodes.append(graph.call_function(_callee(entry.target), args, kwargs))
    return fx.GraphModule(torch.nn.Module(), graph)


def _target(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "call_function" and node.target is operator.getitem:
        return GETITEM
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)  # namespace.op.overload
        if name.split(".")[0] in NAMESPACES and _callee(name) is node.target:
            return name
    raise NotPortableError(f"{node.op} of {node.target} is nothing that another process is sure to have")


def _callee(name: str) -> Any:
    if name == GETITEM:
        return operator.getitem
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _value(value: Any, number: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return Ref(number[value])
    if type(value) in (tuple, list):
        return type(value)(_value(item, number) for item in value)
    if isinstance(value, fx.immutable_collections.immutable_list):
        return [_value(item, number) for item in value]
    if type(value) in _PLAIN:
        return value
    raise NotPortableError(f"an argument of type {type(value).__name__} has no canonical text")


def _argument(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, Ref):
        return nodes[value.number]
    if isinstance(value, (tuple, list)):
        return type(value)(_argument(item, nodes) for item in value)
    return value
