"""Values that depend on nothing but the code: what a recording can tell when control flow asks for them.

`torch.nn.Transformer` looks whether the mask that it was given is a causal one, and such masks are made on the spot by
``torch.triu(torch.full(...))``. A recording has no values, but these follow from the ops alone: ops that depend on no
input, no closed-over tensor and no random draw are computed for real, once somebody asks.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from partita.graph import torch_adapter

MAX_ELEMENTS = 2**24  # of one value; a causal mask of 4096 tokens has as many
_LITERALS = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default})


class FixedValues:
    """Real values of the nodes of a graph that is being recorded, as far as they are fixed."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._literal = torch_adapter.literals_of_trace()
        self._known: dict[fx.Node, Any] = {}
        self._seen: set[fx.Node] = set()

    def of(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a node after everything recorded so far, or None if it is not fixed."""
        for new in self._graph.nodes:
            if new not in self._seen:
                self._seen.add(new)
                with torch_adapter.outside_of_recording(), torch.no_grad():
                    self._compute(new)
        value = self._known.get(node)
        return value if isinstance(value, torch.Tensor) else None

    def _compute(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        if node.target in _LITERALS:
            source = node.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":  # ``torch.tensor([1.0, 2.0])`` in the code
                literal = self._literal(str(source.target))
                if literal is not None:
                    self._keep(node, literal.clone())
                return
        if any(source not in self._known for source in node.all_input_nodes):
            self._forget_overwritten(node)
            return
        if _is_fixed_op(node):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._known.__getitem__)
            try:
                self._keep(node, node.target(*args, **kwargs))  # type: ignore[operator]
            except (RuntimeError, NotImplementedError):  # e.g. a device that is not here: then it is not known
                self._forget_overwritten(node)

    def _keep(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or value.numel() <= MAX_ELEMENTS:
            self._known[node] = value

    def _forget_overwritten(self, node: fx.Node) -> None:
        """An op with unknown arguments writes to known ones: they, and all that share their memory, are unknown now."""
        if not torch_adapter.mutates(node.target):
            return
        written = {
            value.untyped_storage().data_ptr()
            for source in node.all_input_nodes
            if isinstance(value := self._known.get(source), torch.Tensor)
        }
        for other, value in list(self._known.items()):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in written:
                del self._known[other]


def _is_fixed_op(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return (
        isinstance(node.target, torch_adapter.OpOverload)
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and node.target.namespace == "aten"
    )
