"""Tracing of one training step: loss, gradients and buffer updates as ATen ops, each tagged with where it came from.

Two passes. The first runs `loss_fn(model, batch)` and `torch.autograd.grad` on tensors without storage and records
every op with its phase, module and source line. The second replays the recorded graph under `functionalize`, which
turns in-place ops and views of mutated tensors into values; tags are inherited by what each op becomes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call, functionalize
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from partita.graph.custom_ops import replacement
from partita.graph.graph import Phase
from partita.graph.torch_adapter import (
    FakeTensorMode,
    TorchDispatchMode,
    current_autograd_sequence,
    make_fx,
    next_autograd_sequence,
    traced_graph,
)

_HIDDEN_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Tag:
    """Where an op came from."""

    phase: Phase
    module: str
    source: str


def user_source(frame: FrameType | None) -> str:
    """``file:line`` of the innermost frame outside torch and partita, or ``""``."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HIDDEN_FOLDERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _Recorder(TorchDispatchMode):
    """Tags every node that the ops of the first pass leave in the traced graph.

    A backward op inherits module and source of the forward op whose autograd node runs, found by its sequence number.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = modules  # the stack of module paths being called; its owner pushes and pops
        self.outer_backward = False
        self.last_source = ""
        self._by_sequence: dict[int, Tag] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        graph = traced_graph()
        last = _last_node(graph)
        self.last_source = user_source(sys._getframe(1)) or self.last_source
        result = replacement(func)(*args, **(kwargs or {}))
        if graph is not None:
            tag = self._tag()
            for node in _nodes_after(graph, last):
                node.meta.setdefault("tag", tag)
        return result

    def _tag(self) -> Tag:
        sequence = current_autograd_sequence()
        if sequence is not None:
            forward = self._by_sequence.get(sequence, Tag(Phase.FORWARD, "", ""))
            phase = Phase.BACKWARD if self.outer_backward else Phase.FORWARD
            return Tag(phase, forward.module, forward.source)
        if self.outer_backward:
            return Tag(Phase.BACKWARD, "", "")
        tag = Tag(Phase.FORWARD, self.modules[-1] if self.modules else "", self.last_source)
        self._by_sequence.setdefault(next_autograd_sequence() - 1, tag)
        return tag


def _last_node(graph: fx.Graph | None) -> fx.Node | None:
    return None if graph is None else graph._root.prev


def _nodes_after(graph: fx.Graph, last: fx.Node | None) -> Iterator[fx.Node]:
    node = graph._root.prev
    while node is not last and node is not graph._root:
        yield node
        node = node.prev


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the model's modules that are being called, innermost last."""
    paths = {module: path for path, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        stack.append(paths.get(module, stack[-1] if stack else ""))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()

    handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class LossModule(nn.Module):
    """The loss function as a module, so that parameters and buffers can be replaced around the whole of it."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        loss = self.loss_fn(self.model, batch)
        return loss, dict(self.model.named_buffers(remove_duplicate=False))


class _Functional(fx.Interpreter):
    """Replays a recorded graph; what an op leaves in the newly traced graph inherits the op's tag."""

    def run_node(self, n: fx.Node) -> Any:
        graph = traced_graph()
        last = _last_node(graph)
        result = super().run_node(n)
        if graph is not None and n.op == "call_function":
            for node in _nodes_after(graph, last):
                node.meta.setdefault("tag", n.meta.get("tag"))
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # native_batch_norm writes its running statistics although its schema does not say so; the "legit" form says it.
        if target is torch.ops.aten.native_batch_norm.default:
            value, weight, bias, mean, var, training, momentum, eps = args
            if mean is None:
                return torch.ops.aten._native_batch_norm_legit.no_stats(value, weight, bias, training, momentum, eps)
            return torch.ops.aten._native_batch_norm_legit.default(
                value, weight, bias, mean, var, training, momentum, eps
            )
        return super().call_function(target, args, kwargs)


@dataclass(frozen=True)
class Traced:
    """A functional graph whose output is ``(loss, gradients, buffers)`` as one flat list.

    `reached[i]` says that the loss reaches the i-th trainable parameter; the others have no gradient in the output.
    """

    module: fx.GraphModule
    reached: tuple[bool, ...]


def trace(
    wrapped: LossModule,
    mode: FakeTensorMode,
    parameters: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    tensors: Sequence[torch.Tensor],
    rebuild: Callable[[Sequence[torch.Tensor]], Any],
    check_loss: Callable[[Any, Mapping[str, torch.Tensor]], None],
) -> Traced:
    """Traces one step on tensors of `mode`. `rebuild` makes the batch out of its tensor leaves."""
    trainable = [name for name, value in parameters.items() if value.requires_grad]
    reached: list[bool] = []

    def joint(parts: Sequence[Sequence[torch.Tensor]], seed: torch.Tensor) -> list[torch.Tensor]:
        values = dict(zip(parameters, parts[0], strict=True))
        copies = {name: value.clone() for name, value in zip(buffers, parts[1], strict=True)}
        with _module_stack(wrapped.model) as stack, _Recorder(stack) as recorder, torch.enable_grad():
            state = {f"model.{name}": value for name, value in (values | copies).items()}
            loss, updated = functional_call(wrapped, state, (rebuild(parts[2]),), tie_weights=True)
            check_loss(loss, {name: values[name] for name in trainable})
            recorder.outer_backward = True
            gradients = torch.autograd.grad(
                loss, [values[name] for name in trainable], grad_outputs=seed.to(loss.dtype), allow_unused=True
            )
        reached[:] = [gradient is not None for gradient in gradients]
        return [loss, *(gradient for gradient in gradients if gradient is not None), *(updated[n] for n in buffers)]

    parts = (list(parameters.values()), list(buffers.values()), list(tensors))
    with mode, _quiet_mkldnn_off():
        seed = torch.ones((), device=next(iter(parameters.values())).device)
        recorded = make_fx(joint)(parts, seed)
        _drop_recorded_detach(recorded)
        detached = [[value.detach() for value in part] for part in parts]

        def replay(parts: Any, seed: torch.Tensor) -> Any:
            return _Functional(recorded).run(*(value for part in parts for value in part), seed)

        with torch.no_grad():
            module = make_fx(functionalize(replay))(detached, seed)
    return Traced(module, tuple(reached))


def _drop_recorded_detach(module: fx.GraphModule) -> None:
    """Under no_grad, `detach` of a value is the value; in-place ops on it must still be seen, which views ensure."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.detach.default and not node.users:
            module.graph.erase_node(node)
    module.recompile()


@contextmanager
def _quiet_mkldnn_off() -> Iterator[None]:
    """oneDNN off: its recurrent layers return a workspace that no graph can hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def error_source(error: BaseException) -> str:
    """``file:line`` of the innermost frame of the user's code that an error passed through, or ``"unknown"``."""
    found = "unknown"
    step = error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith(_HIDDEN_FOLDERS) and not name.startswith("<"):
            found = f"{name}:{step.tb_lineno}"
        step = step.tb_next
    return found
