"""Where each recorded op comes from: its phase, the module that called it and the line of the user's code."""

from __future__ import annotations

import bisect
import contextlib
import operator
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from partita.graph import checks, torch_adapter
from partita.graph.custom_ops import replacement
from partita.graph.fixed_values import FixedValues
from partita.graph.graph import Phase
from partita.graph.validation import Answers

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PARTITA = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PYTHON = os.path.dirname(contextlib.__file__) + os.sep
_DISPATCH = tuple(
    _TORCH + name
    for name in ("_ops.py", "_tensor.py", "_compile.py", f"utils{os.sep}_", f"_dynamo{os.sep}", f"fx{os.sep}")
)
_AUTOGRAD = torch.autograd.__file__


@dataclass(frozen=True)
class Label:
    """Origin of an op: phase, module path ("" for the loss function) and "file:line" ("" if unknown)."""

    phase: Phase
    module: str
    source: str


_READS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})

UNKNOWN = Label(phase=Phase.FORWARD, module="", source="")


def is_users(filename: str) -> bool:
    """Whether a file is the user's code: not torch, not partita, not Python's own library."""
    if filename.startswith("<") or filename.startswith((_TORCH, _PARTITA)):
        return False
    return not filename.startswith(_PYTHON) or "-packages" in filename


def source_of_error(traceback: TracebackType | None) -> str:
    """``file:line`` of the innermost frame in the user's code, or "unknown"."""
    source = "unknown"
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if is_users(filename):
            source = f"{filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return source


def _current_source() -> tuple[str, bool]:
    """``file:line`` of the innermost frame in the user's code, and whether it lies inside a running backward pass."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename):
            return f"{code.co_filename}:{frame.f_lineno}", True
        if code.co_filename == _AUTOGRAD and code.co_name in ("grad", "backward"):
            return "", False
        frame = frame.f_back
    return "", False


def _asking_line() -> str:
    """``file:line`` of the Python code, torch's own included, that reads a value."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_PARTITA, *_DISPATCH)):
        frame = frame.f_back
    return "unknown" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def new_nodes(graph: fx.Graph, last: fx.Node | None) -> Iterator[fx.Node]:
    """Nodes of ``graph`` that were appended after ``last``, newest first."""
    node = last_node(graph)
    while node is not None and node is not last and node.op != "root":
        yield node
        node = node.prev


def last_node(graph: fx.Graph) -> fx.Node | None:
    return next(iter(reversed(graph.nodes)), None)


class Labels(TorchDispatchMode):
    """Labels every node that is recorded while it is active.

    Backward ops take the label of the forward op whose autograd node runs, found by autograd's sequence number, unless
    they run in the user's own code (a custom ``autograd.Function``).

    Args:
        model: whose modules' paths label the ops.
        answers: to questions about values.

    Attributes:
        phase: of the nodes recorded from now on.
        labels: node -> label.
        made: id of a result -> the result and its node (kept alive, so that ids stay unique).
        failed: name of the op that raised, if one did.
    """

    def __init__(self, model: nn.Module, answers: Answers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answers = answers
        self.phase = Phase.FORWARD
        self.labels: dict[fx.Node, Label] = {}
        self.made: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        self.failed = ""
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = []
        self._sequence: list[int] = []  # numbers of autograd nodes, rising, and the label of the op that made each
        self._sequence_labels: list[Label] = []
        self._graph = torch_adapter.current_trace()
        self._fixed_values = FixedValues(self._graph)

    @contextlib.contextmanager
    def modules(self) -> Iterator[None]:
        """Follows calls of modules, so that nodes know their module's path."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self._paths.get(id(module), self._stack[-1] if self._stack else ""))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _remember(self, label: Label) -> None:
        number = torch_adapter.last_sequence_number()
        if not self._sequence or number > self._sequence[-1]:
            self._sequence.append(number)
            self._sequence_labels.append(label)

    def _origin(self, number: int) -> Label:
        """Label of the op that made an autograd node; one that no op was seen to make is its predecessor's."""
        position = bisect.bisect_right(self._sequence, number) - 1
        return self._sequence_labels[position] if position >= 0 else UNKNOWN

    def _label(self) -> Label:
        source, in_users_code = _current_source()
        module = self._stack[-1] if self._stack else ""
        running = torch_adapter.forward_sequence_number()
        if running is None:
            return Label(phase=self.phase, module=module, source=source)
        origin = self._origin(running)
        if not in_users_code:
            return Label(phase=self.phase, module=origin.module, source=origin.source)
        return Label(phase=self.phase, module=module or origin.module, source=source)

    def _fixed(self, *tensors: Any) -> list[torch.Tensor] | None:
        """The real values of tensors that depend on nothing but the code; None if one depends on more."""
        found = []
        for tensor in tensors:
            node = self.made.get(id(tensor), (None, None))[1]
            value = None if node is None else self._fixed_values.of(node)
            if value is None:
                return None
            found.append(value)
        return found

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _READS and (values := self._fixed(*args)) is not None:
            with torch_adapter.outside_of_recording():
                return func(*values)
        if func is torch.ops.aten.equal.default or (
            func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool
        ):
            last = last_node(self._graph)
            try:
                return func(*args, **kwargs)
            except Exception as error:
                for node in list(new_nodes(self._graph, last)):
                    self._graph.erase_node(node)  # the record of a read that failed
                return self._answers.to(_asking_line(), _current_source()[0], error)
        if func is torch.ops.aten.bernoulli_.float and not args[0].is_contiguous():
            # In place, draws fill memory in its order; the functional op draws in the order of the dims. Dropout of a
            # transposed tensor gets plain PyTorch's mask if the dims are put into the order of memory first.
            order = sorted(range(args[0].dim()), key=lambda dim: -args[0].stride(dim))
            func(args[0].permute(order), *args[1:], **kwargs)
            return args[0]
        return replacement(func)(*args, **kwargs)

    @staticmethod
    def _check_layouts(func: Any, values: Iterable[Any], label: Label) -> None:
        for value in values:
            checks.check_layout(value, str(func), label.module, label.source)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        label = self._label()
        self._remember(label)
        last = last_node(self._graph)
        try:
            self._check_layouts(func, args, label)
            result = self._run(func, args, kwargs or {})
            self._check_layouts(func, result if isinstance(result, (tuple, list)) else (result,), label)
        except BaseException:
            self.failed = self.failed or str(func)
            raise
        for node in new_nodes(self._graph, last):
            self.labels[node] = label
            if node.target is operator.getitem and isinstance(result, (tuple, list)):
                item = result[node.args[1]]  # type: ignore[index]
                self.made[id(item)] = item, node
        newest = last_node(self._graph)
        if newest is not None and newest is not last and isinstance(result, torch.Tensor):
            self.made[id(result)] = result, newest
        return result


class Relabel(fx.Interpreter):
    """Runs a recorded graph again under another recording and hands each node's label on to the nodes it becomes."""

    def __init__(self, module: fx.GraphModule, labels: dict[fx.Node, Label]) -> None:
        super().__init__(module)
        self._old = labels
        self.labels: dict[fx.Node, Label] = {}

    def run_node(self, n: fx.Node) -> Any:
        graph = torch_adapter.current_trace()
        last = last_node(graph)
        result = super().run_node(n)
        for node in new_nodes(graph, last):
            if n in self._old:
                self.labels[node] = self._old[n]
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # native_batch_norm writes its running statistics although its schema does not say so; the "legit" form says it.
        if target is not torch.ops.aten.native_batch_norm.default:
            return super().call_function(target, args, kwargs)
        value, weight, bias, mean, var, training, momentum, epsilon = args
        if mean is None:
            function = torch.ops.aten._native_batch_norm_legit.no_stats
            return function(value, weight, bias, training, momentum, epsilon)
        if not training:
            function = torch.ops.aten._native_batch_norm_legit_no_training.default
            return function(value, weight, bias, mean, var, momentum, epsilon)
        function = torch.ops.aten._native_batch_norm_legit.default
        return function(value, weight, bias, mean, var, training, momentum, epsilon)
