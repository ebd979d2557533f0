"""The one door of the graph floor to what torch does not promise to keep: each name here has a test that it is there.

Used, by name: `torch._subclasses.fake_tensor.FakeTensorMode` (tensors without storage),
`torch.fx.experimental.proxy_tensor` (`make_fx`, `get_proxy_mode`: record the ATen ops),
`torch.autograd._get_sequence_nr` and `torch._C._current_autograd_node` (which forward op a backward op belongs to),
`torch.utils.checkpoint._checkpoint_hook` and `CheckpointFunction` (switch recomputation off),
`torch._dynamo.OptimizedModule` and `Module._compiled_call_impl` (recognise compiled modules),
`Tensor._backward_hooks` and `Tensor._post_accumulate_grad_hooks` (hooks on parameters),
`torch.utils._python_dispatch` (tensor subclasses; `_disable_current_modes`: compute for real while recording),
`OpOverload._schema` (which arguments an op mutates or aliases, and whether it takes a generator),
`torch._inductor.codecache.CppCodeCache` (compiles and keeps a few functions of our own).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "compile_source",
    "current_trace",
    "eager_random",
    "forward_sequence_number",
    "gradient_hooks",
    "has_accumulation_hooks",
    "is_compiled",
    "is_view",
    "is_wrapper_subclass",
    "last_sequence_number",
    "literals_of_trace",
    "mutates",
    "new_fake_mode",
    "outside_of_recording",
    "overload_with_generator",
    "takes_generator",
    "trace",
    "viewed_arguments",
    "without_compiler_warnings",
    "without_recomputation",
]


def new_fake_mode() -> FakeTensorMode:
    """A mode under which tensors have shapes but no storage; real tensors that meet it are converted on the way."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace(function: Callable[..., Any], args: list[Any], decompositions: Mapping[Any, Any]) -> fx.GraphModule:
    """The ATen ops that ``function(*args)`` runs, as a graph; ``args`` are fake tensors."""
    module: fx.GraphModule = make_fx(
        function, decomposition_table=decompositions, tracing_mode="fake", _allow_non_fake_inputs=True
    )(*args)
    return module


_WRITING_CODE = threading.Lock()


class _LazyModule(_LazyGraphModule):
    """One that is first run by several threads at once writes its code in one after the other."""

    def _real_recompile(self) -> Any:
        with _WRITING_CODE:
            return super()._real_recompile()


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """A module whose code is written when it is first run or read: most are only read node by node, and writing the
    code takes longer than making the graph."""
    return _LazyModule(nn.Module(), graph)


def current_trace() -> fx.Graph:
    """The graph that `trace` is recording into."""
    mode = get_proxy_mode()
    assert mode is not None, "only inside trace()"
    graph: fx.Graph = mode.tracer.graph
    return graph


def literals_of_trace() -> Callable[[str], torch.Tensor | None]:
    """A function that gives, by name, the real values of tensors which the recorded code writes down
    (``torch.tensor([1.0])``)."""
    mode = get_proxy_mode()
    assert mode is not None, "only inside trace()"
    tracer: Any = mode.tracer

    def literal(name: str) -> torch.Tensor | None:
        value = getattr(tracer.root, name, None)
        value = value.constant if isinstance(value, FakeTensor) else value
        return value if isinstance(value, torch.Tensor) else None

    return literal


def outside_of_recording() -> contextlib.AbstractContextManager[Any]:
    """Ops inside run for real and are not recorded."""
    context: contextlib.AbstractContextManager[Any] = _disable_current_modes()
    return context


def last_sequence_number() -> int:
    """Number of the autograd node made last on this thread; a dispatched op's node is made just before its dispatch."""
    return int(torch.autograd._get_sequence_nr()) - 1  # type: ignore[attr-defined]


def forward_sequence_number() -> int | None:
    """Number of the autograd node whose backward runs on this thread; None outside backward."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


@contextlib.contextmanager
def without_recomputation() -> Iterator[None]:
    """Activation checkpointing runs its function plainly: what to recompute is the plan's choice, not the graph's.

    It also keeps random ops right: a recomputed dropout would be a second draw in the graph.
    """
    module = torch.utils.checkpoint

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args)

    saved = module._checkpoint_hook, module.CheckpointFunction
    module._checkpoint_hook = contextlib.nullcontext  # type: ignore[assignment,misc]
    module.CheckpointFunction = Plain  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        module._checkpoint_hook, module.CheckpointFunction = saved  # type: ignore[misc]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps the module, as a copy or in place."""
    from torch._dynamo import OptimizedModule  # slow to import: only when somebody captures

    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


def gradient_hooks(tensor: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor | None]]:
    """Functions that the user registered with ``Tensor.register_hook``."""
    return list((tensor._backward_hooks or {}).values())


def has_accumulation_hooks(tensor: torch.Tensor) -> bool:
    """Whether the user registered functions with ``Tensor.register_post_accumulate_grad_hook``."""
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


def is_wrapper_subclass(tensor: torch.Tensor) -> bool:
    """Whether the tensor is made of other tensors (DTensor, quantised, nested)."""
    return bool(is_traceable_wrapper_subclass(tensor)) or tensor.is_nested


def mutates(target: object) -> bool:
    """Whether the op writes to one of its arguments."""
    return isinstance(target, OpOverload) and bool(target._schema.is_mutable)


def is_view(target: object) -> bool:
    """Whether the op's result shares storage with an argument and nothing is computed."""
    return isinstance(target, OpOverload) and (bool(target.is_view) or target in _UNANNOTATED_VIEWS)


_UNANNOTATED_VIEWS = frozenset(
    {
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.unsafe_chunk.default,
        torch.ops.aten.unsafe_split.Tensor,
        torch.ops.aten.unsafe_split_with_sizes.default,
    }
)


def viewed_arguments(target: object) -> tuple[int, ...]:
    """Positions of the arguments whose storage the op's results show; none for an op that allocates.

    Of ops that are a view only where one is possible (`reshape`, `contiguous`, `to`) this is not known; captured graphs
    do not hold them, since they are recorded as what they turn out to be.
    """
    if not isinstance(target, OpOverload):
        return ()
    if target in _UNANNOTATED_VIEWS:
        return (0,)
    schema = target._schema
    if all(result.alias_info is None for result in schema.returns):
        return ()
    return tuple(place for place, argument in enumerate(schema.arguments) if argument.alias_info is not None)


def _dropout(x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``native_dropout`` as plain dropout on a CPU computes it: an explicit draw and a product."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    mask = torch.ops.aten.bernoulli.p(torch.empty_like(x), 1 - p)
    return x * mask.div(1 - p), mask.to(torch.bool)


def _dropout_backward(gradient: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return gradient * (mask.to(gradient.dtype) * scale)


def eager_random() -> Mapping[Any, Any]:
    """Decompositions that make every random draw an op of its own, in the order and number of eager mode on a CPU."""
    aten = torch.ops.aten
    return {aten.native_dropout.default: _dropout, aten.native_dropout_backward.default: _dropout_backward}


def takes_generator(target: Any) -> bool:
    """Whether the op has an argument called `generator`."""
    return any(argument.name == "generator" for argument in target._schema.arguments)


def overload_with_generator(target: Any) -> Any | None:
    """The overload of the same op that has one argument more, `generator`; None if there is none."""
    own = [argument.name for argument in target._schema.arguments]
    packet = target.overloadpacket
    for overload in packet.overloads():
        names = [argument.name for argument in getattr(packet, overload)._schema.arguments]
        if "generator" in names and [name for name in names if name != "generator"] == own:
            return getattr(packet, overload)
    return None


def compile_source(source: str) -> ctypes.CDLL | None:
    """A library of the `extern "C"` functions of C++ code, optimised for this processor; None if nothing here can
    compile it. The compiler keeps it on disk by its content."""
    from torch._inductor.codecache import CppCodeCache

    try:
        with without_compiler_warnings():
            library: ctypes.CDLL = CppCodeCache.load(source)
    except Exception:  # no compiler, a broken one, a folder that cannot be written: what is optional stays away
        return None
    return library


@contextlib.contextmanager
def without_compiler_warnings() -> Iterator[None]:
    """The compiler's own warnings say nothing that a user could act on; what concerns him is raised."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
