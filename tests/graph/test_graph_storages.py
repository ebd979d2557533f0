"""What storages values show and how many bytes live, against torch running the same graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).parent))
from live_storages import LiveStorages, storages_of

from partita.graph.storages import Storages, graph_memory, last_uses, tensor_bytes
from partita.runtime.segments import python_code

aten = torch.ops.aten
X, Y = torch.randn(4, 6), torch.randn(6, 4)

# Each makes a value from a two-dimensional one; views, copies, views of parts, ops with several results.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + 1,
    "transpose": lambda x: x.t(),
    "left half": lambda x: x[:, : (x.shape[1] + 1) // 2],
    "first row": lambda x: x[:1],
    "flat": lambda x: x.reshape(1, -1),
    "unbind": lambda x: x.unbind(0)[-1].unsqueeze(0),
    "split": lambda x: aten.unsafe_split.Tensor(x, 1, 0)[0],
    "both of a split": lambda x: torch.cat(torch.split(x, (x.shape[0] + 1) // 2)),
    "values of a maximum": lambda x: x.max(0, keepdim=True)[0],
    "places of a maximum": lambda x: x.max(1, keepdim=True)[1].float(),
    "product": lambda x: x @ x.t(),
    "expanded": lambda x: x[:1].expand(3, -1),
    "softmax": lambda x: aten._softmax.default(x.contiguous(), 1, False),
    "strided copy": lambda x: aten.empty_strided.default([2, 2], [7, 3]).fill_(0) + x[0, 0],
}


def traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def run_watched(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[LiveStorages, Sequence[Tensor]]:
    live, code = LiveStorages(), python_code(module.graph, module)
    with live.watch():
        results = code(torch.Generator(), *inputs)
    return live, results


def assert_as_torch_does(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    module = traced(function, *inputs)
    memory = graph_memory(module.graph)
    live, results = run_watched(module, inputs)
    assert memory.peak_bytes == live.peak_bytes
    assert sum(memory.storages) == live.now_bytes
    for result, shown, is_dense in zip(results, memory.shown, memory.is_dense, strict=True):
        address = result.untyped_storage()._cdata
        if shown >= 0:
            assert memory.storages[shown] == result.untyped_storage().nbytes()
        else:
            assert address == inputs[-1 - shown].untyped_storage()._cdata
        others = [other for other, place in zip(results, memory.shown, strict=True) if place == shown]
        assert {other.untyped_storage()._cdata for other in others} == {address}
        assert is_dense == result.is_contiguous()
    assert memory.takes_dense == tuple(value.is_contiguous() for value in inputs)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12))
    sources = [data.draw(st.integers(0, index + 1)) for index in range(len(names))]
    kept = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=4, unique=True))

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = [x, y]
        for name, source in zip(names, sources, strict=True):
            values.append(STEPS[name](values[source]))
        return tuple(values[2 + index] for index in kept)

    assert_as_torch_does(function, (X, Y.t()))


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_alone(name: str) -> None:
    assert_as_torch_does(lambda x: (STEPS[name](x),), (X,))


def test_a_small_view_keeps_its_large_storage() -> None:
    memory = graph_memory(traced(lambda x: ((x + 1)[0, :1],), X).graph)
    assert (memory.storages, memory.shown) == ((96,), (0,))


def test_values_that_nobody_reads_live_for_their_op_only() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, device="meta")
    nodes = []
    for _ in range(3):
        node = graph.call_function(aten.neg.default, (x,))
        node.meta["val"] = torch.empty(4, device="meta")
        nodes.append(node)
    graph.output((nodes[2],))
    assert last_uses(graph)[nodes[0]] == [nodes[0]]
    assert graph_memory(graph).peak_bytes == 16


def test_attributes_of_the_module_are_not_counted() -> None:
    module = make_fx(lambda x: (x + torch.tensor([1.0] * 6),))(X)
    for node in module.graph.nodes:
        node.meta["val"] = X
    storages = Storages(module.graph)
    attributes = [node for node in module.graph.nodes if node.op == "get_attr"]
    assert attributes and all(storages.num_bytes[number] == 0 for node in attributes for number in storages.of(node))


def test_bytes_of_a_tensor_are_those_of_its_storage() -> None:
    for value in (X, X.t(), torch.empty(0, 3), torch.empty_strided((2, 2), (7, 3)), torch.zeros(1).expand(5)):
        assert tensor_bytes(value) == value.untyped_storage().nbytes()
    assert len(storages_of((X, X.t(), Y))) == 2
