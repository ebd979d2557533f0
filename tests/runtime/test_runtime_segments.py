"""Segments: plain code equals the graph, compiled code equals plain code, odd layouts are mended."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).parent))
from runtime_cases import engine, program, program_set, run, segment

from partita.graph.randomness import with_generator
from partita.program.instructions import Feed, Recv, Send, TensorSpec
from partita.runtime import segments
from partita.runtime.segments import CompileWarning, build, python_code, with_strides

CPU = torch.device("cpu")
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
GENERATOR = torch.Generator()


def everything(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    best, where = x.max(1)
    parts = torch.split(x, [1, 2], dim=0)
    return (
        torch.nn.functional.gelu(x @ w.t()),
        torch.cat([parts[1], parts[0]]),
        torch.full((2,), math.inf),
        where,
        best.to(torch.bfloat16),
        x.view(-1),
        torch.nn.functional.pad(x, (1, 0), value=-math.inf),
        torch.arange(3, dtype=torch.float64),
    )


def test_plain_code_equals_the_graph() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    module = make_fx(everything)(x, w)
    for ours, theirs in zip(python_code(module.graph, module)(GENERATOR, x, w), everything(x, w), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_plain_code_reads_attributes_of_the_module() -> None:
    module = make_fx(lambda x: (x + torch.tensor([1.0, 2.0]),))(torch.zeros(2))
    assert any(node.op == "get_attr" for node in module.graph.nodes)
    assert torch.equal(python_code(module.graph, module)(GENERATOR, torch.zeros(2))[0], torch.tensor([1.0, 2.0]))


def test_attention_without_dropout_borrows_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its op is tagged as random; to lend it torch's generator would have workers wait for each other's attention."""
    asked: list[Any] = []
    monkeypatch.setattr(segments, "with_generator", lambda target: asked.append(target) or with_generator(target))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def attend(x: Tensor) -> tuple[Tensor, Tensor]:
        return flash(x, x, x, 0.0)[0], torch.ops.aten.bernoulli.p(x, 0.5)

    x = torch.randn(2, 2, 4, 8)
    module = make_fx(attend)(x)
    assert torch.equal(python_code(module.graph, module)(torch.Generator(), x)[0], flash(x, x, x)[0])
    assert asked == [torch.ops.aten.bernoulli.p]


def test_intermediates_are_let_go_after_their_last_use() -> None:
    alive: list[weakref.ref[Tensor]] = []
    seen: list[int] = []

    def make(x: Tensor) -> Tensor:
        alive.append(weakref.ref(result := x + 1))
        return result

    def look(x: Tensor) -> Tensor:
        seen.append(sum(ref() is not None for ref in alive))
        return x * 2

    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(make, (x,))
    graph.call_function(make, (x,))  # nobody reads it
    second = graph.call_function(look, (first,))
    third = graph.call_function(look, (second,))
    graph.output((third,))
    python_code(graph, torch.nn.Module())(GENERATOR, torch.zeros(2))
    assert seen == [1, 0]


def long(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x.t()
    for _ in range(20):
        y = torch.tanh(y @ w)
    return y.sum(), x * 2


X, W = torch.randn(300, 200), torch.randn(300, 300) / 17
LONG = segment("long", long, X, W)  # one segment for both tests: compiling takes long, and is cached


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.slow
def test_compiled_equals_plain_for_any_layout_it_is_given() -> None:
    """One worker feeds a batch, sends a product to another, which runs the same compiled segment on it."""
    what = TensorSpec((300, 200), torch.float32)
    feeds = [Feed("x:0@0", leaf=0)]
    programs = program_set(
        [
            program(0, [run(LONG, ["x:0@0", "p:w"], ["n:loss", "n:y"]), Send("n:y", 1, "y", what)], feeds=feeds),
            program(1, [Recv("n:y", 0, "y", what), run(LONG, ["n:y", "p:w"], ["n:loss", "n:z"])], loss=""),
        ],
        [LONG],
    )
    with engine(programs, parameters={"w": W}, compiled=True, timeout_s=60) as machine:
        assert not machine.not_compiled
        for batch in (X, X.t().contiguous().t(), X):
            torch.testing.assert_close(machine.step([batch]).loss, long(X, W)[0], rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.slow
def test_compiled_code_lets_go_of_the_interpreter() -> None:
    """While one thread is inside a compiled segment, another one runs Python."""
    code = build(LONG, compiled=True, device=CPU, num_threads=1)
    assert code.compiled is not None
    entered, done = threading.Event(), threading.Event()
    ticks = [0]

    def tick() -> None:
        entered.wait(10)
        while not done.is_set():
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    with torch.no_grad():
        call = code.bind(GENERATOR)
        call(X, W)
        entered.set()
        before = ticks[0]
        call(X, W)
        during = ticks[0] - before
        done.set()
    thread.join(10)
    assert during > 1000  # holding the lock for the whole call would leave a handful at its two ends


def test_a_failing_compiler_is_a_warning_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(segments, "_MADE", {})
    monkeypatch.setattr(segments, "compile_or_load", broken)
    part = segment("square", lambda x: ((x * x).sum(),), torch.ones(2))
    with pytest.warns(CompileWarning, match="square could not be compiled.*no compiler here"):
        code = build(part, compiled=True, device=CPU, num_threads=1)
    assert code.compiled is None and "no compiler here" in code.reason
    assert code.bind(GENERATOR)(torch.ones(2))[0] == 2


def test_a_segment_is_compiled_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def compiler(module: Any, layouts: Any, *, device: torch.device, num_threads: int) -> Any:
        asked.append(num_threads)
        return lambda x: (x,)

    monkeypatch.setattr(segments, "_MADE", {})
    monkeypatch.setattr(segments, "compile_or_load", compiler)
    one, two = (segment(key, lambda x: ((x * x).sum(),), torch.ones(2)) for key in ("one", "two"))
    codes = [
        build(part, compiled=True, device=CPU, num_threads=n) for part, n in ((one, 1), (one, 1), (one, 2), (two, 1))
    ]
    assert asked == [1, 2, 1]
    assert codes[0].compiled is codes[1].compiled is not codes[2].compiled


def test_random_segments_are_not_compiled_and_say_so() -> None:
    part = segment("noise", lambda x: (torch.bernoulli(x),), torch.rand(2), random=True)
    code = build(part, compiled=True, device=CPU, num_threads=1)
    assert code.compiled is None and "generator" in code.reason


def test_a_value_that_lost_its_layout_in_an_exchange_gets_it_back() -> None:
    """`view` works on the transposed layout only; what comes through an exchange is contiguous."""
    x = torch.randn(4, 3).t()
    part = segment("flat", lambda x: (x.t().view(12).sum(),), x)
    feeds = [Feed("x:0@0", leaf=0)]
    what = TensorSpec((3, 4), torch.float32)
    programs = program_set(
        [
            program(0, [Send("x:0@0", 1, "x", what)], feeds=feeds, loss="x:0@0"),
            program(1, [Recv("n:x", 0, "x", what), run(part, ["n:x"], ["n:loss"])], loss=""),
        ],
        [part],
    )
    with engine(programs) as machine:
        machine.step([x.contiguous()])  # `view` on these strides would raise


def test_with_strides_copies_values() -> None:
    x = torch.arange(6.0).view(2, 3)
    y = with_strides(x, (1, 2))
    assert torch.equal(x, y) and y.stride() == (1, 2)


def test_with_strides_of_a_value_that_was_expanded() -> None:
    """Through an exchange an expanded value comes whole; its strides of 0 mean that all entries are one."""
    x = torch.arange(3.0).view(1, 3, 1).expand(2, 3, 4)
    y = with_strides(x.contiguous(), x.stride())
    assert torch.equal(x, y) and y.stride() == x.stride()
