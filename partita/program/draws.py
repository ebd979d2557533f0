"""Random draws that depend on no data leave the graph: they are made whole, before the step, in plain PyTorch's order.

What follows from the seed alone can be drawn before the workers start, from torch's own default generator, so that
every plan sees the numbers that plain PyTorch sees. A random op whose *values* depend on data
(``bernoulli(sigmoid(x))``) stays in the graph, and so does every random op after the first of those, because the
generator is read in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from partita.graph.graph import Graph, InputKind
from partita.graph.randomness import is_random
from partita.graph.torch_adapter import module_of
from partita.program.instructions import Draw, TensorSpec

aten = torch.ops.aten

# Ops that read nothing of their first tensor but its shape, strides and dtype.
_SHAPE_ONLY = frozenset(
    {
        "aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::rand_like",
        "aten::randn_like", "aten::randint_like", "aten::new_empty", "aten::new_zeros", "aten::new_ones",
        "aten::new_full", "aten::new_empty_strided", "aten::uniform", "aten::normal_functional",
        "aten::exponential", "aten::geometric", "aten::log_normal", "aten::cauchy", "aten::random",
    }
)  # fmt: skip


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node reads only the shape of its first tensor argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in (aten.bernoulli.p, aten.normal.float_float):
        return True
    return target._schema.name in _SHAPE_ONLY


def hoist_draws(graph: Graph) -> tuple[tuple[Draw, ...], fx.GraphModule]:
    """Returns the draws, in order, and the rest of the graph, in which each draw is a placeholder of the draw's name.

    The placeholder of the seed is replaced by the constant 1. The given graph is left as it is.
    """
    module = _copy(graph)
    draws: list[Draw] = []
    for node in [node for node in module.graph.nodes if is_random(node)]:
        if not isinstance(node.meta.get("val"), torch.Tensor) or _depends_on_data(node):
            break
        draws.append(_draw(node))
        _replace_by_placeholder(module.graph, node)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_random(node))
    module.recompile()
    return tuple(draws), module


def _copy(graph: Graph) -> fx.GraphModule:
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    seeds = {item.node: item for item in graph.inputs if item.kind is InputKind.SEED}
    after_placeholders: list[fx.Node] = []
    for node in graph.module.graph.nodes:
        if node.name in seeds:
            after_placeholders.append(node)
            continue
        if node.op != "placeholder":
            while after_placeholders:
                seed = after_placeholders.pop()
                mapping[seed] = _one(new, seed)
        mapping[node] = new.node_copy(node, lambda old: mapping[old])
        mapping[node].meta = dict(node.meta)
        mapping[node].meta.setdefault("origin", node.name)
    return module_of(new)


def _one(graph: fx.Graph, seed: fx.Node) -> fx.Node:
    value = seed.meta["val"]
    node = graph.call_function(aten.full.default, ([], 1.0), {"dtype": value.dtype, "device": value.device})
    node.meta = {"val": value, "origin": seed.name}
    return node


def _needed(node: fx.Node) -> Sequence[fx.Node]:
    """The inputs whose values the node reads."""
    inputs = list(node.all_input_nodes)
    return inputs[1:] if reads_shape_only(node) else inputs


def _depends_on_data(node: fx.Node) -> bool:
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return True
        for item in _needed(current):
            if item not in seen:
                seen.add(item)
                stack.append(item)
    return False


def _draw(node: fx.Node) -> Draw:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def blank(item: fx.Node) -> fx.Node:
        value = item.meta["val"]
        made = graph.call_function(
            aten.empty_strided.default,
            (list(value.shape), list(value.stride())),
            {"dtype": value.dtype, "device": value.device},
        )
        made.meta["val"] = value
        return made

    def copy(item: fx.Node) -> fx.Node:
        if item not in copies:
            needed = set(_needed(item))
            inputs = {other: copy(other) if other in needed else blank(other) for other in item.all_input_nodes}
            copies[item] = graph.node_copy(item, inputs.__getitem__)
        return copies[item]

    graph.output(copy(node))
    value = node.meta["val"]
    return Draw(node.name, module_of(graph), TensorSpec(tuple(value.shape), value.dtype))


def _replace_by_placeholder(graph: fx.Graph, node: fx.Node) -> None:
    last = [item for item in graph.nodes if item.op == "placeholder"][-1]
    name, meta = node.name, dict(node.meta)
    with graph.inserting_after(last):
        placeholder = graph.placeholder(f"{name}_drawn")
    meta.pop("op", None)
    placeholder.meta = {**meta, "draw": name}
    node.replace_all_uses_with(placeholder)
    graph.erase_node(node)
