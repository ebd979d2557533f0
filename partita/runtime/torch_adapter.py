"""The only place of the runtime, but for `partita.runtime.products`, that touches private parts of torch.
`tests/runtime/test_runtime_torch_adapter.py` names them.

* `torch._inductor.standalone_compile`: compiles one fx graph without Dynamo; its artifact is called with the inputs.
* `torch._inductor.standalone_compile.CompiledArtifact.save` and `.load`: the artifact on disk.
* `CompiledArtifact._compiled_fn`, `torch._inductor.output_code.CompiledFxGraph.current_callable`: the code in an
  artifact.
* `torch._inductor.runtime.cache_dir_utils.cache_dir`: where Inductor keeps what it compiled.
* Inductor's configuration names `cpp_wrapper`, `cpp.threads` and `fallback_random`.
* `torch._subclasses.FakeTensorMode`: inputs for the compiler that have shapes and strides but no memory.
* `OpOverload._op`, `._schema`, `._overloadname`, `.tags`: an op's inner callable and its signature.
* `torch._foreach_add`, `torch._foreach_add_`, `torch._foreach_copy_`: sums and copies of many tensors in one call.
* `Tensor._use_count`, `Tensor._base`, `torch._C._storage_Use_Count`, `UntypedStorage._cdata`: who else holds a tensor
  or its memory.
* `torch._C._len_torch_dispatch_stack`, `torch._C._len_torch_function_stack`: whether calls of ops are intercepted.
* `torch.distributed.distributed_c10d._get_default_store`: the key-value store of the running job.
* `torch.distributed.distributed_c10d._world.pg_map`: the process groups that torch has not destroyed.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from partita.graph.torch_adapter import without_compiler_warnings
from partita.runtime import block_products, products

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


class Compiled:
    """A compiled graph, called with its inputs; the result is the sequence of its outputs.

    Around the compiled code the compiler puts layers for what functional graphs on plain tensors need nothing of
    (gradients, aliases, autocast), which take longer than a small kernel. The first call sees whether they hand inputs
    and outputs on as they are; the later ones then go to the code itself.
    """

    def __init__(self, artifact: Any) -> None:
        self._artifact = artifact
        self._code: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
        self._is_seen = False
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if self._code is not None:
            return self._code(list(inputs))  # which empties the list
        return self._outputs(inputs) if self._is_seen else self._first(inputs)

    def save(self, path: str) -> None:
        """Write it to a file."""
        self._artifact.save(path=path, format="binary")

    def _outputs(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        result: Sequence[Tensor] = self._artifact(*inputs)
        return result

    def _first(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with self._lock:  # other workers wait: the code inside is exchanged for the time of the call
            if not self._is_seen:
                try:
                    return self._seen(inputs)
                finally:
                    self._is_seen = True
        return self(*inputs)

    def _seen(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """A call that looks at what the code inside is given and returns."""
        graph = _code_inside(self._artifact)
        if graph is None:
            return self._outputs(inputs)
        code, calls = graph.current_callable, []

        def watched(values: list[Tensor]) -> Sequence[Tensor]:
            given = tuple(values)
            found: Sequence[Tensor] = code(values)
            calls.append((given, tuple(found)))
            return found

        graph.current_callable = watched
        try:
            outputs = self._outputs(inputs)
        finally:
            graph.current_callable = code
        if len(calls) == 1 and _are_identical(calls[0][0], inputs) and _are_identical(calls[0][1], outputs):
            self._code = code
        return outputs


def _are_identical(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _code_inside(artifact: Any) -> Any:
    """The only `CompiledFxGraph` that an artifact's functions and wrappers refer to; None if there is another number of
    them."""
    from torch._inductor.output_code import CompiledFxGraph

    waiting: list[Any] = [artifact._compiled_fn]
    known: set[int] = set()
    found = []
    while waiting:
        value = waiting.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, CompiledFxGraph):
            found.append(value)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # not assigned
                    waiting.append(cell.cell_contents)
        elif hasattr(value, "compiled_fn"):  # of what was compiled just now
            waiting.append(value.compiled_fn)
    return found[0] if len(found) == 1 else None


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
    products.register_lowerings()
    block_products.register_lowerings()
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
    return Compiled(artifact)


def load_compiled(path: str) -> Compiled:
    """What `Compiled.save` wrote, of the same torch on the same kind of machine. It is code: whoever can write the file
    can run anything, as in all of Inductor's cache."""
    from torch._inductor.standalone_compile import CompiledArtifact

    with without_compiler_warnings():
        return Compiled(CompiledArtifact.load(path=path, format="binary"))


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
        products.prepare(copy)
        block_products.prepare(copy)
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


def add_all(totals: list[Tensor], parts: Sequence[list[Tensor]]) -> None:
    """``totals[i] += parts[0][i]; totals[i] += parts[1][i]; ...`` for every i, in one call a part."""
    for part in parts if totals else ():
        torch._foreach_add_(totals, part)


_use_count: Callable[[Tensor], int] = operator.methodcaller("_use_count")


def held_by_none_else(values: Sequence[Tensor], places: Sequence[int]) -> list[int]:
    """Those of the places whose tensor only one dict beside `values` refers to, and whose memory is torch's own and
    shown by no other tensor: of every kind of reference there are as many as to a new tensor in that situation."""
    return [place for place in places if _references(values, place) in _FEWEST]


def _references(values: Sequence[Tensor], place: int) -> tuple[int, ...]:
    """How many there are to the tensor from C++, to its object from Python, and to its memory; whether the memory is
    torch's own (not NumPy's, say); those to the tensor that it is a view of."""
    value = values[place]
    storage, base = value.untyped_storage(), value._base
    num_to_memory: int = torch._C._storage_Use_Count(storage._cdata)
    found = (_use_count(value), sys.getrefcount(value), num_to_memory, storage.resizable())
    return found if base is None else (*found, _use_count(base), sys.getrefcount(base))


def _references_to_new() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """To a new tensor, and to a view of a new one that nothing else refers to."""
    registers = {"new": torch.empty(1), "view": torch.empty(1).view(1)}
    values = [registers[name] for name in registers]
    return _references(values, 0), _references(values, 1)


_FEWEST = _references_to_new()  # how many belong to the calls themselves differs between versions of Python


def copy_all(targets: list[Tensor], values: list[Tensor]) -> None:
    """``targets[i].copy_(values[i])`` for every i, in one call."""
    torch._foreach_copy_(targets, values)


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
