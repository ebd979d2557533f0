"""Which ops a module's call ran: the graph as a tree of calls."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.export import ExportedProgram

Names = Mapping[fx.Node, Sequence[str]]


@dataclass(eq=False)
class Scope:
    """One call of a module.

    Attributes:
        path: the module's name, "" for the network itself.
        body: ops and calls, in order.
        inputs: values from outside, in the order of their first use; parameters of other modules are among them.
        outputs: values that are used outside.
    """

    path: str
    body: list[fx.Node | Scope] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)

    def nodes(self) -> Iterator[fx.Node]:
        for item in self.body:
            if isinstance(item, Scope):
                yield from item.nodes()
            else:
                yield item

    def scopes(self) -> Iterator[Scope]:
        """Inner ones first, this one last."""
        for item in self.body:
            if isinstance(item, Scope):
                yield from item.scopes()
        yield self

    def owns(self, name: str) -> bool:
        """Whether a parameter of this name is its module's or one of its inner modules'."""
        return not self.path or name.startswith(f"{self.path}.")


def calls_of(root: Scope) -> dict[str, list[Scope]]:
    """The calls of each module, by its name; those inside others first."""
    found: dict[str, list[Scope]] = {}
    for scope in root.scopes():
        found.setdefault(scope.path, []).append(scope)
    return found


def is_value(node: fx.Node) -> bool:
    """Whether it is a tensor or several (and no size)."""
    return not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def scope_of(
    program: ExportedProgram, names: Mapping[fx.Node, Sequence[str]], inlined: frozenset[str] = frozenset()
) -> Scope:
    """The network's call. Calls of modules in ``inlined`` are dissolved into those around them, and so are calls whose
    ops are interleaved with others' and those of modules that the caller does not own. ``names`` has all names of a
    parameter."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and is_value(node)]
    stacks = _stacks(nodes)
    while True:
        stacks = {node: _kept(stack, inlined) for node, stack in stacks.items()}
        torn = _torn(nodes, stacks)
        if not torn:
            break
        stacks = {node: [call for call in stack if call[0] not in torn] for node, stack in stacks.items()}
    root = Scope("", _grouped(nodes, stacks, 0))
    for scope in root.scopes():
        _find_ends(scope, names)
    return root


Stack = list[tuple[str, str]]  # (call, module) from outside to inside


def _stacks(nodes: list[fx.Node]) -> dict[fx.Node, Stack]:
    found: dict[fx.Node, Stack] = {}
    last: Stack = []
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        calls = [(key, str(path)) for key, (path, _) in stack.items()]
        if calls and not calls[0][1]:
            last = [(key, path.partition("@")[0]) for key, path in calls[1:]]
        if node.target is operator.getitem:
            last = found[node.args[0]]  # type: ignore[index]
        found[node] = last
    return found


def _kept(stack: Stack, inlined: frozenset[str]) -> Stack:
    kept: Stack = []
    for call, path in stack:
        owner = kept[-1][1] if kept else ""
        if path not in inlined and (not owner or path.startswith(f"{owner}.")):
            kept.append((call, path))
    return kept


def _torn(nodes: list[fx.Node], stacks: dict[fx.Node, Stack]) -> set[str]:
    """Calls that other ops interrupt."""
    done: set[str] = set()
    open_calls: list[str] = []
    torn: set[str] = set()
    for node in nodes:
        calls = [call for call, _ in stacks[node]]
        same = next((at for at, (a, b) in enumerate(zip(open_calls, calls, strict=False)) if a != b),
                    min(len(open_calls), len(calls)))  # fmt: skip
        done |= set(open_calls[same:])
        torn |= done & set(calls)
        open_calls = calls
    return torn


def _grouped(nodes: list[fx.Node], stacks: dict[fx.Node, Stack], depth: int) -> list[fx.Node | Scope]:
    body: list[fx.Node | Scope] = []
    run: list[fx.Node] = []
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        here = stacks[node][depth] if len(stacks[node]) > depth else None
        if here is None:
            body.append(node)
            continue
        run.append(node)
        if following is None or stacks[following][depth : depth + 1] != [here]:
            body.append(Scope(here[1], _grouped(run, stacks, depth + 1)))
            run = []
    return body


def _find_ends(scope: Scope, names: Names) -> None:
    inner = list(scope.nodes())
    inside = set(inner)
    inputs: dict[fx.Node, None] = {}
    for node in inner:
        for source in node.all_input_nodes:
            own = any(map(scope.owns, names.get(source, ())))
            if source not in inside and is_value(source) and not own:
                inputs[source] = None
    scope.inputs = list(inputs)
    scope.outputs = [node for node in inner if any(user not in inside and (is_value(user) or user.op == "output")
                                                   for user in node.users)]  # fmt: skip
