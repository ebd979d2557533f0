"""The private parts of torch that the runtime relies on, by name: this fails first when torch changes them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from partita.runtime import torch_adapter


def test_names_exist() -> None:
    import importlib

    import torch._inductor as inductor
    from torch._inductor import config, lowering, mkldnn_ir, output_code
    from torch.distributed import distributed_c10d

    standalone_compile = importlib.import_module("torch._inductor.standalone_compile")
    parameters = inspect.signature(inductor.standalone_compile).parameters
    assert {"dynamic_shapes", "options", "fake_mode"} <= set(parameters)
    assert isinstance(config.cpp_wrapper, bool)
    assert isinstance(config.fallback_random, bool)
    assert isinstance(config.cpp.threads, int)
    assert isinstance(lowering.lowerings, dict) and callable(mkldnn_ir._create_output_node)
    assert list(inspect.signature(mkldnn_ir.LinearUnary.__init__).parameters)[1:] == [
        "layout",
        "inputs",
        "constant_args",
    ]
    assert "_compiled_fn" in inspect.getsource(standalone_compile.CompiledArtifact.__init__)
    assert "current_callable" in output_code.CompiledFxGraph.__annotations__
    assert callable(distributed_c10d._get_default_store)
    with FakeTensorMode(shape_env=ShapeEnv()):
        assert torch.empty_strided((2, 3), (1, 2)).stride() == (1, 2)


def held(values: dict[str, torch.Tensor]) -> list[str]:
    names = list(values)
    return [
        names[place] for place in torch_adapter.held_by_none_else([values[name] for name in names], range(len(names)))
    ]


def test_who_else_holds_a_tensor_is_known() -> None:
    """By name, by a view, by a list, as an alias without a name, by its storage's owner elsewhere."""
    named, seen, listed = torch.ones(4), torch.ones(4), torch.ones(4)
    view, listing, array = seen[1:], [listed], np.ones(4)
    registers = {
        "own": torch.ones(4),
        "own part of a larger one": torch.ones(8)[2:6],
        "result": torch.ones(4) + 1,
        "named": named,
        "seen": seen,
        "listed": listed,
        "of numpy": torch.from_numpy(array),
        "twice": named,
    }
    shown = {"as numpy": torch.ones(4)}
    shows = shown["as numpy"].numpy()
    saving = torch.ones(4, requires_grad=True)
    shown["saved for backward"] = torch.ones(4)
    graph = (saving * shown["saved for backward"]).sum()
    assert held(registers) == ["own", "own part of a larger one", "result"]
    assert held(shown) == []
    assert view.numel() + listing[0].numel() + shows.size + graph.numel() == 12  # all are alive until here


def test_ops_tell_their_names() -> None:
    aten = torch.ops.aten
    assert torch_adapter.op_name(aten.rand_like.default) == ("rand_like", "default")
    assert torch_adapter.op_name(len) == ("", "")
    assert torch.equal(torch_adapter.direct(aten.add.Tensor)(torch.ones(2), 1), torch.full((2,), 2.0))
    assert torch_adapter.direct(len) is len


CPU = torch.device("cpu")
LAYOUT = ((4, 6), (6, 1), torch.float32)


def compiled(function: Callable[..., Any]) -> torch_adapter.Compiled:
    module = make_fx(function, tracing_mode="fake")(torch.randn(4, 6))
    return torch_adapter.compile_graph(module, [LAYOUT], device=CPU, num_threads=1)


def test_compiled_code_is_called_without_layers_that_change_nothing() -> None:
    call = compiled(lambda x: (torch.sin(x) * 2, x.sum(1)))
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, 6)
            wave, total = call(x)
            torch.testing.assert_close(wave, torch.sin(x) * 2)
            torch.testing.assert_close(total, x.sum(1))
    assert call._code is not None


def test_layers_that_do_something_stay() -> None:
    call = compiled(lambda x: (x.t(), torch.sin(x)))  # a view of an input: made around the compiled code
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, 6)
            turned, wave = call(x)
            assert turned.data_ptr() == x.data_ptr() and torch.equal(turned, x.t())
            torch.testing.assert_close(wave, torch.sin(x))
    assert call._code is None


def test_many_workers_may_make_the_first_call() -> None:
    """Whoever calls while the first call looks inside waits: two at a time would be seen, and the layers stay."""
    first = compiled(lambda x: (torch.cos(x) + 1,))
    values = [torch.randn(4, 6) for _ in range(16)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            call = torch_adapter.Compiled(first._artifact)
            with ThreadPoolExecutor(8) as pool, torch.no_grad():
                found = list(pool.map(call, values))
            for value, (result,) in zip(values, found, strict=True):
                torch.testing.assert_close(result, torch.cos(value) + 1)
            assert call._code is not None
    finally:
        sys.setswitchinterval(before)
