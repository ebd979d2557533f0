"""Segments as callables: plain Python that calls one op after the other, or one compiled function.

Plain code is generated from the fx graph: ops are called without wrappers, every intermediate value is let go after
its last use, and random ops draw from the generator of the calling worker.
"""

from __future__ import annotations

import math
import operator
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, fx

from partita.cost.attention import with_attention
from partita.cost.inline import with_inline
from partita.cost.layouts import with_channels_last
from partita.cost.variants import with_variants
from partita.graph.randomness import is_random, with_generator
from partita.graph.storages import last_uses
from partita.program.instructions import Segment
from partita.runtime.compiling import Background, Request, compile_or_load
from partita.runtime.portable import NotPortableError
from partita.runtime.torch_adapter import Compiled, Layout, direct

Call = Callable[..., Sequence[Tensor]]


class CompileWarning(UserWarning):
    """A segment could not be compiled and runs op by op instead."""


@dataclass(frozen=True)
class Code:
    """How a segment runs. `plain` takes a generator and the inputs; `compiled` takes the inputs only, in exactly
    `strides`.

    `reason` says why a segment that was to be compiled is not.
    """

    plain: Callable[..., Sequence[Tensor]]
    strides: tuple[tuple[int, ...] | None, ...]
    compiled: Call | None = None
    reason: str = ""

    def bind(self, generator: Generator) -> Call:
        """The callable for one worker."""
        if self.compiled is not None:
            return self.compiled
        plain = self.plain
        return lambda *inputs: plain(generator, *inputs)


def build(segment: Segment, *, compiled: bool, device: torch.device, num_threads: int) -> Code:
    """Code for a segment, compiled if asked and possible; a failing compiler is a `CompileWarning` with the reason.

    Matrices are multiplied, and images lie, as is faster for them here (`partita.cost.variants`, `inline`,
    `layouts`)."""
    strides = tuple(_stride(node) for node in segment.module.graph.nodes if node.op == "placeholder")
    module = _module(segment, device, num_threads, compiled=False)
    plain = python_code(module.graph, module)
    if not compiled:
        return Code(plain, strides)
    if segment.random:
        return Code(plain, strides, reason="its random ops draw from the worker's own generator")
    layouts = _layouts(segment)
    made = _compiled(segment, layouts, device, num_threads)
    if isinstance(made, str):
        return Code(plain, strides, reason=made)
    return Code(plain, tuple(layout[1] for layout in layouts), made)


def compile_ahead(
    segment: Segment, background: Background, *, device: torch.device, num_threads: int
) -> Future[Call] | None:
    """Has `background` compile a segment, so that `build` finds it when the returned future is done, whether compiled
    or failed; None if there is nothing to wait for."""
    layouts = _layouts(segment)
    key = (segment.key, *layouts, device, num_threads)
    if segment.random or key in _MADE:
        return None
    try:
        module = _module(segment, device, num_threads, compiled=True)
        request = Request.of(module, layouts, device=device, num_threads=num_threads)
    except NotPortableError:  # only this process has its ops: `build` compiles it
        return None
    kept: Future[Call] = Future()

    def arrived(done: Future[Compiled]) -> None:
        if not done.cancelled():
            error = done.exception()
            if error is not None:
                _UNTOLD.add(key)
            _MADE.setdefault(key, done.result() if error is None else _first_line(error))
        kept.set_result(_MADE.get(key))  # type: ignore[arg-type]

    background.submit(request).add_done_callback(arrived)
    return kept


def _module(segment: Segment, device: torch.device, num_threads: int, *, compiled: bool) -> fx.GraphModule:
    if device.type != "cpu":
        return segment.module
    module = segment.module
    if compiled:
        module = with_inline(with_attention(with_channels_last(module, num_threads), num_threads), num_threads)
    return with_variants(module, num_threads)


def _layouts(segment: Segment) -> list[Layout]:
    """The exact layouts in which compiled code takes its inputs."""
    nodes = [node for node in segment.module.graph.nodes if node.op == "placeholder"]
    strides = [_stride(node) for node in nodes]
    return [
        (spec.shape, _contiguous(spec.shape) if stride is None else stride, spec.dtype)
        for spec, stride in zip(segment.input_specs, strides, strict=True)
    ]


_MADE: dict[tuple[object, ...], Call | str] = {}  # what the compiler gave, or why it failed
_UNTOLD: set[tuple[object, ...]] = set()  # failed in the background: whoever builds the segment is warned
_MAKING = threading.Lock()


def _compiled(segment: Segment, layouts: Sequence[Layout], device: torch.device, num_threads: int) -> Call | str:
    """The compiled segment, or the reason why there is none; each once a process: plans of one model share segments,
    and a plan is measured before it is run."""
    key = (segment.key, *layouts, device, num_threads)
    with _MAKING:
        if key not in _MADE:
            _MADE[key] = _compile(segment, layouts, device, num_threads)
        made = _MADE[key]
        if isinstance(made, str) and key in _UNTOLD:
            _UNTOLD.discard(key)
            _warn(segment.key, made)
        return made


def _compile(segment: Segment, layouts: Sequence[Layout], device: torch.device, num_threads: int) -> Call | str:
    module = _module(segment, device, num_threads, compiled=True)
    try:
        return compile_or_load(module, layouts, device=device, num_threads=num_threads)
    except Exception as error:  # whatever goes wrong inside a compiler, the plain code is right
        reason = _first_line(error)
        _warn(segment.key, reason, _where(error))
        return reason


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else repr(error)}"


def _warn(name: str, reason: str, where: str = "") -> None:
    warnings.warn(
        f"segment {name} could not be compiled and runs op by op, which is slower but gives the "
        f"same result: {reason}. Pass compile=False to silence this. {where}",
        CompileWarning,
        stacklevel=5,
    )


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join(f"(raised in {frame.filename}:{frame.lineno})" for frame in last)


def _stride(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(int(step) for step in value.stride()) if isinstance(value, Tensor) else None


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def fits(value: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the value's strides are these, where a stride means anything."""
    own = value.stride()
    if own == strides:
        return True
    return all(a == b or extent < 2 for a, b, extent in zip(own, strides, value.shape, strict=True))


def with_strides(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of `value` that lies in memory with these strides; along a stride of 0 its first entry stands for all."""
    once = value
    for dim, stride in enumerate(strides):
        if stride == 0 and value.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    copy = torch.empty_strided(once.shape, strides, dtype=value.dtype, device=value.device).copy_(once)
    return copy.expand(value.shape)


# Plain code ----------------------------------------------------------------------------------------------------------


def python_code(graph: fx.Graph, owner: torch.nn.Module) -> Callable[..., Sequence[Tensor]]:
    """A Python function ``(generator, *inputs) -> outputs`` that runs the graph's ops in order.

    Example: for ``y = x @ w; return (y + 1,)`` it is ``def segment(generator, x, w): y = mm(x, w); z = add(y, 1); del
    y; return (z,)``.
    """
    writer = _Writer(owner)
    last_use = last_uses(graph)
    lines: list[str] = []
    parameters: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            parameters.append(writer.variable(node))
            continue
        lines.append(writer.statement(node))
        unused = [writer.variable(value) for value in last_use.get(node, ())]
        if unused and node.op != "output":
            lines.append(f"del {', '.join(unused)}")
    body = "\n    ".join(lines)
    source = f"def segment({', '.join(['generator', *parameters])}):\n    {body}\n"
    scope = writer.constants
    exec(compile(source, "<segment>", "exec"), scope)
    return scope["segment"]  # type: ignore[no-any-return]


class _Writer:
    """Turns nodes into statements; what cannot be written down goes to `constants`, the function's global names."""

    def __init__(self, owner: torch.nn.Module) -> None:
        self.owner = owner
        self.constants: dict[str, Any] = {}
        self._variables: dict[fx.Node, str] = {}
        self._functions: dict[tuple[Any, bool], str] = {}

    def variable(self, node: fx.Node) -> str:
        return self._variables.setdefault(node, f"v{len(self._variables)}")

    def statement(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self.value(node.args[0])}"
        if node.op == "get_attr":
            assert isinstance(node.target, str)
            return f"{self.variable(node)} = {self.constant(operator.attrgetter(node.target)(self.owner))}"
        assert node.op == "call_function", f"a segment holds only ops, but {node.name} is a {node.op}"
        if node.target is operator.getitem:
            source, index = node.args
            return f"{self.variable(node)} = {self.value(source)}[{self.value(index)}]"
        arguments = [self.value(value) for value in node.args]
        arguments += [f"{name}={self.value(value)}" for name, value in node.kwargs.items()]
        draws = is_random(node)
        if draws:
            arguments.insert(0, "generator")
        return f"{self.variable(node)} = {self.function(node.target, draws)}({', '.join(arguments)})"

    def function(self, target: Any, draws: bool) -> str:
        if (target, draws) not in self._functions:
            self._functions[target, draws] = self.constant(with_generator(target) if draws else direct(target))
        return self._functions[target, draws]

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.variable(value)
        if isinstance(value, tuple):
            return f"({''.join(f'{self.value(item)}, ' for item in value)})"
        if isinstance(value, list):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self.constant(value)
