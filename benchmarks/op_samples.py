"""Ops as small graphs: torch's own samples of every op (`op_db`), captured on fake tensors.

`op_db` is a private list of torch with sample inputs for each of its ops. It needs the package `expecttest`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

MIN_EXTENT = 2  # a dim that can be cut at all
MAX_ELEMENTS = 1 << 16


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of an op: ``run(*tensors)`` gives its output tensors as a list."""

    op: str
    tensors: tuple[Tensor, ...]
    run: Callable[..., list[Tensor]]

    @property
    def shape_text(self) -> str:
        return " ".join(str(list(tensor.shape)) for tensor in self.tensors)


def op_names() -> list[str]:
    """All ops of `op_db` that take float32 on the CPU, as "name" or "name.variant"."""
    return list(_ops())


def _ops() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    found: dict[str, Any] = {}
    for op in op_db:
        if torch.float32 in op.supported_dtypes("cpu"):
            found[f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name] = op
    return found


def samples(name: str, limit: int) -> Iterator[Sample]:
    """Up to ``limit`` samples of an op that differ in shapes or arguments, those with most to cut first."""
    op = _ops()[name]
    torch.manual_seed(0)
    found: dict[str, Sample] = {}
    for given in op.sample_inputs("cpu", torch.float32, requires_grad=False):
        sample = _sample(name, op, given)
        if sample is not None:
            arguments = pytree.tree_map_only(Tensor, lambda _: "tensor", (given.args, given.kwargs))
            found.setdefault(f"{sample.shape_text} {arguments}", sample)
    yield from sorted(found.values(), key=_num_cuts, reverse=True)[:limit]


def _num_cuts(sample: Sample) -> int:
    return sum(extent >= 4 for tensor in sample.tensors for extent in tensor.shape)


def _sample(name: str, op: Any, given: Any) -> Sample | None:
    leaves, spec = pytree.tree_flatten((given.input, given.args, given.kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = tuple(leaves[index].detach() for index in places)
    plain = all(type(tensor) is Tensor and tensor.layout is torch.strided for tensor in tensors)
    if not plain or not any(extent >= MIN_EXTENT for tensor in tensors for extent in tensor.shape):
        return None
    if sum(tensor.numel() for tensor in tensors) > MAX_ELEMENTS:
        return None

    def run(*values: Tensor) -> list[Tensor]:
        own = list(leaves)
        for index, value in zip(places, values, strict=True):
            own[index] = value
        first, args, kwargs = pytree.tree_unflatten(own, spec)
        result = op.op(first, *args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    return Sample(name, tensors, run)


def graph_of(sample: Sample) -> fx.GraphModule:
    """The sample as a functional graph of ATen ops; placeholders are ``x0``, ``x1``, ...

    Raises:
        Exception: of any kind, if the op cannot run on tensors without values.
    """
    from partita.graph import torch_adapter
    from partita.graph.recording import Recording, lift_constants
    from partita.graph.simplify import simplify

    with torch.no_grad(), quiet():
        module = torch_adapter.trace(sample.run, list(sample.tensors), {})
        recording = Recording(module=module, labels={})
        if any(node.op == "get_attr" for node in module.graph.nodes):
            lift_constants(recording)
        constants = list(recording.constants.values())
        # In a second pass, as the capture of a training step does it: ops may write to their inputs on the inside.
        functional = torch.func.functionalize(fx.Interpreter(recording.module).run, remove="mutations")
        module = torch_adapter.trace(functional, [*sample.tensors, *constants], {})
    sizes = [size for node in module.graph.nodes for size in _sizes(node.meta.get("val"))]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError("the number of results depends on the data")
    simplify(module.graph)
    return _named(module, len(sample.tensors), constants)


def _sizes(value: Any) -> list[Any]:
    return [size for item in pytree.tree_leaves(value) if isinstance(item, Tensor) for size in item.shape]


def _named(module: fx.GraphModule, num_tensors: int, constants: Sequence[Tensor]) -> fx.GraphModule:
    """The graph with placeholders ``x0``, ..., and ``c0``, ... for constants; their values are in
    ``module.constants``."""
    graph = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(node for node in module.graph.nodes if node.op == "placeholder"):
        moved[node] = graph.placeholder(f"x{index}" if index < num_tensors else f"c{index - num_tensors}")
        moved[node].meta["val"] = node.meta["val"]
    for node in module.graph.nodes:
        if node.op == "call_function":
            moved[node] = graph.node_copy(node, lambda item: moved[item])
            moved[node].meta = {"val": node.meta["val"]}
        elif node.op == "output":
            results = pytree.tree_leaves(node.args)
            graph.output(tuple(moved[item] if isinstance(item, fx.Node) else item for item in results))
    result = fx.GraphModule({}, graph)
    result.constants = {f"c{index}": value for index, value in enumerate(constants)}  # type: ignore[assignment]
    return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cuts(extent: int, size: int) -> Sequence[tuple[int, ...]]:
    """An even (or nearly even) and an uneven way of dealing ``extent`` entries to ``size`` workers."""
    if extent < size:
        return ()
    base, rest = divmod(extent, size)
    even = tuple(base + (worker < rest) for worker in range(size))
    uneven = (*[1] * (size - 1), extent - size + 1)
    return (even,) if even == uneven else (even, uneven)
