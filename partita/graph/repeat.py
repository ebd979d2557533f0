"""Whether a training step that changed Python state would be the same step again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from partita.graph.randomness import is_random
from partita.graph.recording import Recording
from partita.graph.torch_adapter import FakeTensor


def _is_fixed(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a node has the same value in every step: made of factories and constants alone, without random draws."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or is_random(node):
        return False
    return all(item in fixed for item in node.all_input_nodes)


def _fixed_nodes(recording: Recording) -> set[fx.Node]:
    fixed: set[fx.Node] = set()
    for node in recording.module.graph.nodes:
        if _is_fixed(node, fixed):
            fixed.add(node)
    return fixed


def _varying(recording: Recording) -> Iterator[str]:
    """The ops that depend on the step's inputs; values that never vary count by shape and type alone."""
    fixed = _fixed_nodes(recording)
    names: dict[fx.Node, str] = {}
    for node in recording.module.graph.nodes:
        if node in fixed:
            value = node.meta.get("val", getattr(recording.module, str(node.target), None))
            names[node] = f"fixed{tuple(value.shape)}{value.dtype}" if isinstance(value, torch.Tensor) else "fixed"
            continue
        names[node] = f"%{len(names)}"
    order = {name: str(index) for index, name in enumerate(n for n in names.values() if n.startswith("%"))}
    for node, name in names.items():
        if node not in fixed:
            arguments = fx.map_arg((node.args, node.kwargs), lambda item: order.get(names[item], names[item]))
            yield f"{order[name]} = {node.op} {node.target if callable(node.target) else ''} {arguments}"


def _carried(recording: Recording) -> Iterator[torch.Tensor]:
    """Tensors without storage that the step reads although it did not make them: results of an earlier recording."""
    for node in recording.module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(recording.module, str(node.target), None)
            if isinstance(value, FakeTensor):
                yield value


def depends_on_state(first: Recording, second: Recording) -> bool:
    """Whether the second recording, made with the Python state that the first left behind, is another step.

    A value carried over is harmless if it never varies (a table of positions, made in the first step and kept).
    """
    fixed = _fixed_nodes(first)
    for value in _carried(second):
        made = first.made.get(id(value))
        if made is None or made[1] not in fixed:
            return True
    return list(_varying(first)) != list(_varying(second)) or first.with_gradient != second.with_gradient
