"""The only place of the runtime that touches private parts of torch. `tests/runtime/test_runtime_torch_adapter.py`
names them.

* `torch._inductor.standalone_compile`: compiles one fx graph without Dynamo; its artifact is called with the inputs.
* `torch._inductor.standalone_compile.CompiledArtifact.save` and `.load`: the artifact on disk.
* `torch._inductor.runtime.cache_dir_utils.cache_dir`: where Inductor keeps what it compiled.
* Inductor's configuration names `cpp_wrapper`, `cpp.threads` and `fallback_random`.
* `torch._inductor.lowering.lowerings`, `torch._inductor.mkldnn_ir.LinearUnary`: how a product by oneDNN is compiled.
* `torch._subclasses.FakeTensorMode`: inputs for the compiler that have shapes and strides but no memory.
* `OpOverload._op`, `._schema`, `._overloadname`, `.tags`: an op's inner callable and its signature.
* `torch._foreach_add`, `torch._foreach_add_`: sums of many tensors in one call.
* `torch._C._len_torch_dispatch_stack`, `torch._C._len_torch_function_stack`: whether calls of ops are intercepted.
* `torch.distributed.distributed_c10d._get_default_store`: the key-value store of the running job.
* `torch.distributed.distributed_c10d._world.pg_map`: the process groups that torch has not destroyed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from partita.cost.variants import ONEDNN
from partita.graph.torch_adapter import without_compiler_warnings

Compiled = Callable[..., Sequence[Tensor]]
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


def compile_graph(
    module: fx.GraphModule, layouts: Sequence[Layout], *, device: torch.device, num_threads: int
) -> Compiled:
    """Compile a functional graph for inputs of exactly these shapes and strides, to run with `num_threads` threads.

    `cpp_wrapper` lets the call run without the interpreter's lock from begin to end; the number of threads is baked in.
    Inductor keeps what it compiled on disk, by the content of the graph and its configuration
    (`TORCHINDUCTOR_CACHE_DIR`), so the same segment is not compiled again by the next run.
    """
    import torch._inductor as inductor
    from torch._inductor import config

    mode = FakeTensorMode(shape_env=ShapeEnv())  # of its own; the sizes given are plain numbers, so nothing is dynamic
    with mode:
        examples: list[Any] = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in layouts
        ]
    _register_lowering()
    graph = fx.GraphModule(module, _without_values(module))
    patches = {"cpp_wrapper": True, "cpp.threads": num_threads, "fallback_random": True}
    with config.patch(patches), without_compiler_warnings(), torch.no_grad():
        # The patches are given a second time because the compiler may work in threads that do not see this one's.
        artifact = inductor.standalone_compile(
            graph,
            examples,
            dynamic_shapes="from_example_inputs",
            fake_mode=mode,
            options={"config_patches": dict(patches)},
        )
    return artifact


@torch.library.custom_op("partita::product", mutates_args=())
def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """``left @ right.T + bias`` by oneDNN, with factors of any strides.

    The compiler has a lowering of the kernel's own op, but only for frozen weights, and rewrites what surrounds it; of
    this op it knows what is said here.
    """
    result: Tensor = ONEDNN(left, right, bias, "none", [], "")
    return result


@product.register_fake
def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


@functools.cache
def _register_lowering() -> None:
    """Has the compiler call the kernel directly, without Python and without the interpreter's lock."""
    from torch._inductor import ir, lowering, mkldnn_ir

    def lower(left: Any, right: Any, bias: Any) -> Any:
        tensors = [ir.ExternKernel.realize_input(item) for item in (left, right, bias) if item is not None]
        constants = ([] if bias is not None else [None]) + ["none", [-1], ""]
        shape = [left.get_size()[0], right.get_size()[0]]
        layout = ir.FixedLayout(device=left.get_device(), dtype=left.get_dtype(), size=shape)
        return ir.TensorBox.create(mkldnn_ir._create_output_node(mkldnn_ir.LinearUnary(layout, tensors, constants)))

    lowering.lowerings[torch.ops.partita.product.default] = lower


def save_compiled(compiled: Compiled, path: str) -> None:
    """Write what `compile_graph` gave to a file."""
    compiled.save(path=path, format="binary")  # type: ignore[attr-defined]


def load_compiled(path: str) -> Compiled:
    """What `save_compiled` wrote, of the same torch on the same kind of machine. It is code: whoever can write the file
    can run anything, as in all of Inductor's cache."""
    from torch._inductor.standalone_compile import CompiledArtifact

    with without_compiler_warnings():
        artifact: Compiled = CompiledArtifact.load(path=path, format="binary")
    return artifact


def compiler_cache_dir() -> str:
    """Inductor's cache folder (`TORCHINDUCTOR_CACHE_DIR`)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def _without_values(module: fx.GraphModule) -> fx.Graph:
    """A copy of the graph without `meta`: the compiler derives shapes itself, and values there belong to another
    FakeTensorMode.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        mapping[node] = copy = graph.node_copy(node, lambda old: mapping[old])
        copy.meta = {}
        if copy.target is ONEDNN:
            copy.target, copy.args = torch.ops.partita.product.default, copy.args[:3]
    return graph


def default_store() -> Any:
    """The store through which the processes of the running job found each other."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def is_registered_group(group: Any) -> bool:
    """Whether the process group has not been destroyed."""
    from torch.distributed.distributed_c10d import _world

    return group in _world.pg_map


def sums(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """``[parts[0][i] + parts[1][i] + ... for every i]``, each sum from left to right."""
    if len(parts) == 1 or not parts[0]:
        return [value.clone() for value in parts[0]]
    totals = list(torch._foreach_add(parts[0], parts[1]))
    for part in parts[2:]:
        torch._foreach_add_(totals, part)
    return totals


def op_name(target: Any) -> tuple[str, str]:
    """Name and overload of an ATen op, e.g. ``("rand_like", "default")``; empty for other callables."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::"), target._overloadname
    return "", ""


def direct(target: Any) -> Callable[..., Any]:
    """What an op calls in the end, without the Python frame around it; other callables as they are."""
    result: Callable[..., Any] = target._op if isinstance(target, torch._ops.OpOverload) else target
    return result


def is_ordinary_thread() -> bool:
    """Whether ops do in this thread what they do in a new one: no autocast, no inference mode, nothing that intercepts
    them (`torch.device` as a context, fake tensors, ...)."""
    intercepted = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return not (intercepted or torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"))
