"""Builds the `Graph` from a simplified recording: named placeholders, only the outputs that say something, op facts,
hash."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.utils._pytree as pytree
from torch import fx

from partita.errors import CaptureError
from partita.graph import torch_adapter
from partita.graph.blocks import find_blocks
from partita.graph.flops import op_info
from partita.graph.graph import Graph, Input, InputKind, Output, OutputKind
from partita.graph.labels import UNKNOWN
from partita.graph.recording import Recording, StepInputs
from partita.graph.simplify import is_tuple_item, remove_unused
from partita.units import fingerprint

_PREFIX = {
    InputKind.PARAMETER: "p_",
    InputKind.BUFFER: "b_",
    InputKind.BATCH: "x_",
    InputKind.CONSTANT: "c_",
    InputKind.SEED: "",
}


def assemble(recording: Recording, inputs: StepInputs, constant_names: Mapping[str, str]) -> Graph:
    """The `Graph` of a functional, simplified recording.

    Args:
        recording: of `recording.functionalize`, simplified.
        inputs: what it was recorded from.
        constant_names: placeholder name of the recording -> name for people.
    """
    placeholders = [node for node in recording.module.graph.nodes if node.op == "placeholder"]
    described = _describe_inputs(recording, inputs, constant_names)
    wanted = _wanted_outputs(recording, placeholders, described)
    updated = {target for kind, target, _ in wanted if kind is OutputKind.BUFFER}
    described = [
        (InputKind.BUFFER if kind is InputKind.PARAMETER and name in updated else kind, name, leaf)
        for kind, name, leaf in described
    ]
    module, moved = _rebuild(recording, placeholders, described, [node for *_, node in wanted])
    _check_functional(module.graph)
    items = tuple(
        Input(
            kind=kind,
            name=name,
            node=moved[node].name,
            shape=tuple(node.meta["val"].shape),
            dtype=node.meta["val"].dtype,
            leaf=leaf,
        )
        for node, (kind, name, leaf) in zip(placeholders, described, strict=True)
    )
    outputs = tuple(Output(kind=kind, target=target, node=moved[node].name) for kind, target, node in wanted)
    parameters = frozenset(
        moved[node] for node, (kind, *_) in zip(placeholders, described, strict=True) if kind is InputKind.PARAMETER
    )
    reached = set(recording.with_gradient)
    trainable = [name for name, tensor in inputs.tensors.parameters.items() if tensor.requires_grad]
    ops = [node for node in module.graph.nodes if node.op == "call_function"]
    return Graph(
        module=module,
        inputs=items,
        outputs=outputs,
        constants={constant_names[name]: value for name, value in recording.constants.items()},
        aliases=dict(inputs.tensors.aliases),
        without_gradient=tuple(name for name in trainable if name not in reached),
        batch_spec=inputs.spec,
        batch_size=inputs.batch_size,
        fingerprint=fingerprint(_identity(module, items, outputs, inputs.spec)),
        blocks=find_blocks(ops, parameters),
        unchecked=recording.unchecked,
    )


_Described = tuple[InputKind, str, int]


def _describe_inputs(recording: Recording, inputs: StepInputs, constant_names: Mapping[str, str]) -> list[_Described]:
    """Kind, name and leaf index of every placeholder, in order."""
    described: list[_Described] = [(InputKind.PARAMETER, name, -1) for name in inputs.tensors.parameters]
    described += [(InputKind.BUFFER, name, -1) for name in inputs.tensors.buffers]
    for index, (path, leaf) in enumerate(zip(inputs.paths, inputs.leaves, strict=True)):
        if isinstance(leaf, torch.Tensor):
            described.append((InputKind.BATCH, f"batch{pytree.keystr(path)}", index))
    described.append((InputKind.SEED, "seed", -1))
    return described + [(InputKind.CONSTANT, constant_names[name], -1) for name in recording.constants]


def _wanted_outputs(
    recording: Recording, placeholders: Sequence[fx.Node], described: Sequence[_Described]
) -> list[tuple[OutputKind, str, fx.Node]]:
    """The loss, the gradients, and the states that are no longer what they were."""
    results = pytree.tree_leaves(next(iter(reversed(recording.module.graph.nodes))).args)
    before = {name: node for node, (_, name, _) in zip(placeholders, described, strict=True)}
    num_gradients = len(recording.with_gradient)
    wanted = [(OutputKind.LOSS, "", results[0])]
    for name, node in zip(recording.with_gradient, results[1 : 1 + num_gradients], strict=True):
        wanted.append((OutputKind.GRADIENT, name, node))
    for name, node in zip(recording.states, results[1 + num_gradients :], strict=True):
        if node is before[name]:
            continue
        old, new = before[name].meta["val"], node.meta["val"]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise CaptureError(
                f"A buffer must keep its shape and type, but the step turns '{name}' from {tuple(old.shape)} "
                f"{old.dtype} into "
                f"{tuple(new.shape)} {new.dtype}. Give it its final shape before training.",
                op="buffer",
                source=recording.labels.get(node, UNKNOWN).source or "unknown",
            )
        wanted.append((OutputKind.BUFFER, name, node))
    return wanted


def _rebuild(
    recording: Recording,
    placeholders: Sequence[fx.Node],
    described: Sequence[_Described],
    results: Sequence[fx.Node],
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A new graph with telling placeholder names, a flat output tuple, and on every node its ``val`` and ``op``."""
    graph = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for node, (kind, name, _) in zip(placeholders, described, strict=True):
        moved[node] = graph.placeholder(_PREFIX[kind] + re.sub(r"\W+", "_", name).strip("_"))
        moved[node].meta["val"] = node.meta["val"]
    for node in recording.module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        new = graph.node_copy(node, lambda item: moved[item])
        new.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        moved[node] = new
        if not is_tuple_item(node):
            label = recording.labels.get(node, UNKNOWN)
            new.meta["op"] = op_info(new, phase=label.phase, module=label.module, source=label.source)
    output = graph.output(tuple(moved[node] for node in results))
    output.meta["val"] = tuple(node.meta["val"] for node in results)
    remove_unused(graph)
    graph.lint()
    return fx.GraphModule({}, graph), moved


def _check_functional(graph: fx.Graph) -> None:
    """Refuses a graph in which an op still writes to something: an input that the step must not change."""
    for node in graph.nodes:
        if node.op == "call_function" and torch_adapter.mutates(node.target):
            changed = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else node
            source = node.meta["op"].source or "unknown"
            raise CaptureError(
                f"The step must change nothing but buffers, but at {source} {node.target} writes to '{changed.name}'. "
                "Register a tensor that the step updates with register_buffer; change trainable parameters in "
                "the optimizer "
                "or after the step.",
                op=str(node.target),
                source=source,
            )


def _identity(
    module: fx.GraphModule, items: Sequence[Input], outputs: Sequence[Output], spec: pytree.TreeSpec
) -> Iterator[object]:
    """The texts that make two graphs the same: ops, arguments, shapes, types, strides, names; no source lines or
    values."""
    for node in module.graph.nodes:
        yield f"{node.name} {node.op} {node.target if node.op == 'call_function' else ''} {node.args} {node.kwargs}"
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            yield (
                f"{tuple(tensor.shape)} {tensor.dtype} {tensor.stride()}"
                if isinstance(tensor, torch.Tensor)
                else str(tensor)
            )
    yield from (f"{item.kind.value} {item.name} {item.node}" for item in items)
    yield from (f"{item.kind.value} {item.target} {item.node}" for item in outputs)
    yield str(spec)
