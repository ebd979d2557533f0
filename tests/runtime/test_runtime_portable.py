"""Graphs as data: the same graph again, and one text for equal graphs only."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from partita.runtime.portable import NotPortableError, from_entries, to_entries


def traced(function: Any, *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def everything(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    best, where = x.max(1)
    parts = torch.split(x, [1, 2], dim=0)
    return (
        torch.nn.functional.gelu(x @ w.t()),
        torch.cat([parts[1], parts[0]]),
        torch.full((2,), math.inf),
        where,
        best.to(torch.bfloat16),
        x.to(memory_format=torch.contiguous_format).sum(),
    )


def test_the_graph_again() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    module = traced(everything, x, w)
    sent = pickle.loads(pickle.dumps(to_entries(module.graph)))
    for made, wanted in zip(from_entries(sent)(x, w), everything(x, w), strict=True):
        assert made.dtype == wanted.dtype
        torch.testing.assert_close(made, wanted)
    assert to_entries(from_entries(sent).graph) == to_entries(module.graph)


def test_texts_differ_exactly_where_graphs_do() -> None:
    x = torch.randn(4, 4)
    functions = [
        lambda x: (x + 1,), lambda x: (x + 2,), lambda x: (x + 1.0,), lambda x: (x - 1,), lambda x: (x.sum(0),),
        lambda x: (x.sum(1),), lambda x: (x.t() + x,), lambda x: (x + x.t(),), lambda x: (x @ x.t(),),
        lambda x: (x.t() @ x,), lambda x: (x.to(torch.float64),), lambda x: (x.to(torch.bfloat16),),
        lambda x: (x + 1, x + 1), lambda x: (x * math.inf,), lambda x: (x * -math.inf,), lambda x: (x * -0.0,),
        lambda x: (x * 0.0,),
    ]  # fmt: skip
    texts = [repr(to_entries(traced(function, x).graph)) for function in functions]
    again = [repr(to_entries(traced(function, x).graph)) for function in functions]
    assert texts == again and len(set(texts)) == len(texts)


def test_what_another_process_may_not_have_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(len, (x,)),))
    with pytest.raises(NotPortableError, match="nothing that another process is sure to have"):
        to_entries(graph)
    module = fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(NotPortableError):
        to_entries(module.graph)
    other = fx.Graph()
    y = other.placeholder("y")
    other.output((other.call_function(torch.ops.aten.add.Tensor, (y, object())),))
    with pytest.raises(NotPortableError, match="no canonical text"):
        to_entries(other)
