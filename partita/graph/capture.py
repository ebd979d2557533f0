"""`capture`: a model's whole training step as one functional joint graph, without running or allocating the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from partita.errors import CaptureError, PartitaError
from partita.graph.blocks import repeated_blocks
from partita.graph.checks import check_batch, check_loss, check_model
from partita.graph.clean import lift_constants, rename_placeholders, simplify
from partita.graph.flops import op_info, tensors_of
from partita.graph.graph import Graph, Input, InputKind, Output, OutputKind, Phase
from partita.graph.torch_adapter import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from partita.graph.trace import LossModule, Tag, Traced, error_source, trace
from partita.units import fingerprint

LossFn = Callable[[nn.Module, Any], torch.Tensor]


def capture(model: nn.Module, loss_fn: LossFn, batch: Any, *, device: torch.device | str | None = None) -> Graph:
    """Captures loss, gradients and buffer updates of one training step as one graph of ATen ops.

    Args:
        model: any module; its parameters may live on the `meta` device. It is left as it was.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar tensor.
        batch: the global batch, any pytree of tensors; values that are no tensors are baked into the graph.
        device: where the step will run; default: the device of the parameters, the CPU if that is `meta`.

    Returns:
        The graph, with shapes of this batch.

    Raises:
        InputError: empty batch, no trainable parameter, loss that is no scalar or depends on no parameter.
        CaptureError: the step cannot be held as one graph; names the op and the source line.

    Example:
        >>> graph = capture(nn.Linear(4, 1), lambda model, x: model(x).mean(), torch.randn(8, 4))
        >>> [output.kind.value for output in graph.outputs]
        ['loss', 'gradient', 'gradient']

    The method (tracing the joint forward and backward with tensors that have no storage, then functionalizing) is that
    of AOTAutograd in PyTorch 2.
    """
    check_model(model)
    batch_size = check_batch(batch)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    leaves, spec = pytree.tree_flatten(batch)
    indices = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    target = _target_device(parameters, device)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def rebuild(tensors: Sequence[torch.Tensor]) -> Any:
        values = list(leaves)
        for index, tensor in zip(indices, tensors, strict=True):
            values[index] = tensor
        return pytree.tree_unflatten(values, spec)

    fake = _Faker(mode, target)
    try:
        traced = trace(
            LossModule(model, loss_fn),
            mode,
            {name: fake(value) for name, value in parameters.items()},
            {name: fake(value) for name, value in buffers.items()},
            [fake(leaves[index]) for index in indices],
            rebuild,
            check_loss,
        )
    except PartitaError:
        raise
    except Exception as error:
        _raise_capture_error(error)
    names = _Names(tuple(parameters), tuple(buffers), _leaf_paths(batch, indices), tuple(indices))
    trainable = tuple(name for name, value in parameters.items() if value.requires_grad)
    return _finish(traced, names, trainable, _aliases(model), spec, batch_size, _static_text(leaves))


class _Faker:
    """Makes tensors without storage of the same shape, strides and dtype on the target device."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self.mode, self.device = mode, device

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        with self.mode:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        return fake.requires_grad_(value.requires_grad)


def _target_device(parameters: Mapping[str, torch.Tensor], device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = next(iter(parameters.values())).device
    return torch.device("cpu") if found.type == "meta" else found


def _raise_capture_error(error: Exception) -> NoReturn:
    source = error_source(error)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        op = str(error.func)
        raise CaptureError(
            f"the step must not depend on values of tensors, but {op} at {source} makes Python or a shape depend on "
            "one; use tensor operations (torch.where, masks) instead of .item(), nonzero or `if`, or move it out of "
            "loss_fn",
            op=op,
            source=source,
        ) from error
    reason = str(error).partition("\n")[0]
    raise CaptureError(
        f"the step could not be traced: {type(error).__name__} at {source}: {reason}",
        op=type(error).__name__,
        source=source,
    ) from error


class _Names:
    """Names of the placeholders, in the order in which tracing made them."""

    def __init__(
        self, parameters: tuple[str, ...], buffers: tuple[str, ...], paths: tuple[str, ...], leaves: tuple[int, ...]
    ) -> None:
        self.inputs = [(InputKind.PARAMETER, name, -1) for name in parameters]
        self.inputs += [(InputKind.BUFFER, name, -1) for name in buffers]
        self.inputs += [(InputKind.BATCH, path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        self.inputs.append((InputKind.SEED, "seed", -1))
        self.buffers = buffers


def _leaf_paths(batch: Any, indices: Sequence[int]) -> tuple[str, ...]:
    paths = [pytree.keystr(path) or "batch" for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    return tuple(paths[index] for index in indices)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, value in named:
            aliases[name] = first.setdefault(id(value), name)
    return aliases


def _static_text(leaves: Sequence[Any]) -> str:
    return repr([leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)])


def _finish(
    traced: Traced,
    names: _Names,
    trainable: tuple[str, ...],
    aliases: Mapping[str, str],
    spec: pytree.TreeSpec,
    batch_size: int,
    static: str,
) -> Graph:
    module = traced.module
    constants = lift_constants(module)
    entries = names.inputs + [(InputKind.CONSTANT, name, -1) for name in constants]
    reached = [name for name, is_reached in zip(trainable, traced.reached, strict=True) if is_reached]
    targets = [(OutputKind.LOSS, "")] + [(OutputKind.GRADIENT, name) for name in reached]
    targets += [(OutputKind.BUFFER, name) for name in names.buffers]
    _flatten_output(module)
    simplify(module)
    targets = _drop_unchanged_buffers(module, targets, names)
    simplify(module)
    rename_placeholders(module, [f"{kind.value}_{name}" for kind, name, _ in entries])
    _describe_ops(module)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = tuple(
        Input(kind, name, node.name, tuple(node.meta["val"].shape), node.meta["val"].dtype, leaf)
        for (kind, name, leaf), node in zip(entries, placeholders, strict=True)
    )
    outputs = tuple(
        Output(kind, target, node.name) for (kind, target), node in zip(targets, _outputs(module), strict=True)
    )
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return Graph(
        module=module,
        inputs=inputs,
        outputs=outputs,
        constants=constants,
        aliases=aliases,
        without_gradient=tuple(name for name in trainable if name not in reached),
        batch_spec=spec,
        batch_size=batch_size,
        fingerprint=_fingerprint(module, inputs, outputs, static),
        blocks=repeated_blocks(nodes),
    )


def _outputs(module: fx.GraphModule) -> Sequence[fx.Node]:
    return module.graph.output_node().args[0]  # type: ignore[return-value]


def _flatten_output(module: fx.GraphModule) -> None:
    """Every output must be a node: a tuple of nodes, nothing else."""
    output = module.graph.output_node()
    output.args = (tuple(output.args[0]),)  # type: ignore[arg-type]
    module.graph.set_codegen(fx.graph.CodeGen())


def _drop_unchanged_buffers(
    module: fx.GraphModule, targets: list[tuple[OutputKind, str]], names: _Names
) -> list[tuple[OutputKind, str]]:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    own = {
        name: node
        for (kind, name, _), node in zip(names.inputs, placeholders, strict=False)
        if kind is InputKind.BUFFER
    }
    kept = [
        (target, node)
        for target, node in zip(targets, _outputs(module), strict=True)
        if target[0] is not OutputKind.BUFFER or node is not own[target[1]]
    ]
    module.graph.output_node().args = (tuple(node for _, node in kept),)
    return [target for target, _ in kept]


def _describe_ops(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        tag = node.meta.pop("tag", None) or Tag(Phase.FORWARD, "", "")
        if node.op == "call_function" and tensors_of(node.meta.get("val")) and "getitem" not in str(node.target):
            node.meta["op"] = op_info(node, tag.phase, tag.module, tag.source)


def _fingerprint(module: fx.GraphModule, inputs: Sequence[Input], outputs: Sequence[Output], static: str) -> str:
    def text(node: fx.Node) -> str:
        shapes = [(tuple(t.shape), str(t.dtype)) for t in tensors_of(node.meta.get("val"))]
        return f"{node.name}={node.target}{node.args}{dict(node.kwargs)}{shapes}"

    return fingerprint([*(text(node) for node in module.graph.nodes), *inputs, *outputs, static])
