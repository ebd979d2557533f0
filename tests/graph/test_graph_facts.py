"""FLOPs, bytes, repeated blocks, what simplification removes, and plain execution."""

from __future__ import annotations

import operator
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from partita.errors import InputError
from partita.graph import Graph, Phase, capture, is_random, op_info, run_graph
from partita.graph.counters import Reads, watched

aten = torch.ops.aten


def _square(model: Any, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


def _ops(graph: Graph, target: Any) -> list[fx.Node]:
    return [node for node, _ in graph.ops() if node.target is target]


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 5), wide=st.integers(1, 7), out=st.integers(1, 6))
def test_flops_of_products_are_those_of_torchs_counter(rows: int, wide: int, out: int) -> None:
    model, x = nn.Sequential(nn.Linear(wide, out), nn.Linear(out, 3)), torch.randn(rows, wide)
    graph = capture(model, _square, x)
    with FlopCounterMode(display=False) as counter:
        _square(model, x).backward()
    products = (aten.mm.default, aten.addmm.default)
    assert sum(info.flops for node, info in graph.ops() if node.target in products) == counter.get_total_flops()


def test_flops_of_convolution_and_attention() -> None:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        out = model(batch).flatten(2).unflatten(1, (2, 2)).transpose(2, 3)
        return F.scaled_dot_product_attention(out, out, out).square().mean()

    model, x = nn.Conv2d(3, 4, 3, stride=2, groups=1), torch.randn(2, 3, 9, 9)
    graph = capture(model, loss_fn, x)
    convolution = _ops(graph, aten.convolution.default)[0].meta["op"]
    assert convolution.flops == 2 * (2 * 4 * 4 * 4) * 3 * 9
    assert graph.flops > 3 * convolution.flops - 2 * convolution.flops


def test_views_and_allocations_are_free_and_lookups_read_rows() -> None:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return (F.dropout(model(batch)).transpose(0, 1) * torch.ones(1).expand(5, 3, 4)).sum()

    graph = capture(nn.Embedding(1000, 4), loss_fn, torch.randint(0, 1000, (3, 5)))
    for target in (aten.transpose.int, aten.empty_like.default):
        assert all((n.meta["op"].flops, n.meta["op"].num_bytes) == (0, 0) for n in _ops(graph, target))
    (lookup,) = _ops(graph, aten.embedding.default)
    assert lookup.meta["op"].num_bytes == 2 * 15 * 4 * 4 + 15 * 8
    assert "op" not in next((n for n in graph.nodes if n.target is operator.getitem), lookup.graph.output_node()).meta


def test_op_info_follows_local_shapes() -> None:
    graph = capture(nn.Linear(8, 4), _square, torch.randn(6, 8))
    (product,) = _ops(graph, aten.addmm.default)
    assert product.meta["op"].flops == 2 * 6 * 8 * 4
    with product.meta["val"].fake_mode:
        product.args[1].meta["val"] = torch.empty(3, 8)
        product.meta["val"] = torch.empty(3, 4)
    local = op_info(product, Phase.FORWARD, "here", "file:1")
    assert (local.flops, local.module, local.source) == (2 * 3 * 8 * 4, "here", "file:1")
    assert local.num_bytes == 4 * (4 + 3 * 8 + 8 * 4 + 3 * 4)


def _layers(num: int, width: int = 8) -> nn.Sequential:
    return nn.Sequential(*(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(num)))


def test_repeated_layers_are_blocks() -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 8), _layers(3), nn.Linear(8, 2)), _square, torch.randn(2, 5, 8))
    assert ("1.0", "1.1", "1.2") in graph.blocks


def test_six_layers_rather_than_two_stages_of_three() -> None:
    graph = capture(nn.Sequential(_layers(3), _layers(3)), _square, torch.randn(2, 5, 8))
    assert graph.blocks == (("0.0", "0.1", "0.2", "1.0", "1.1", "1.2"),)


def test_other_shapes_or_arguments_are_other_blocks() -> None:
    def block(*, out: int = 8, p: float = 0.1) -> nn.Module:
        return nn.Sequential(nn.Linear(8, out), nn.ReLU(), nn.Linear(out, 8), nn.Dropout(p))

    def grouped(other: nn.Module) -> bool:
        graph = capture(nn.Sequential(block(), other), _square, torch.randn(4, 8))
        return ("0", "1") in graph.blocks

    assert grouped(block())
    assert not grouped(block(out=9)) and not grouped(block(p=0.2))


def test_blocks_are_disjoint() -> None:
    graph = capture(nn.Sequential(_layers(2), _layers(2, 8)), _square, torch.randn(2, 5, 8))
    paths = [path for group in graph.blocks for path in group]
    assert len(paths) == len(set(paths))
    assert not any(a != b and a.startswith(b + ".") for a in paths for b in paths)


def test_nothing_useless_is_left() -> None:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        x = batch.detach().clone().to(torch.float32).view(6, 8).contiguous()
        model(x).sin()  # thrown away
        return model(x)[:].square().mean()

    graph = capture(nn.Linear(8, 4), loss_fn, torch.randn(6, 8))
    useless = (aten.detach.default, aten.clone.default, aten._to_copy.default, aten.sin.default, aten.slice.Tensor)
    assert not any(node.target in useless for node in graph.nodes)


def test_copies_that_change_the_layout_stay() -> None:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        return model(batch.transpose(0, 1).contiguous().view(-1)).square().mean()

    model, batch = nn.Linear(48, 4), torch.randn(6, 8)
    graph = capture(model, loss_fn, batch)
    loss, _, _ = run_graph(graph, dict(model.named_parameters()), {}, batch)
    torch.testing.assert_close(loss, loss_fn(model, batch).detach())


def test_attention_without_dropout_is_not_random() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert not is_random(graph.call_function(attention, (x, x, x)))
    assert not is_random(graph.call_function(attention, (x, x, x, 0.0, True)))
    assert is_random(graph.call_function(attention, (x, x, x, 0.5)))
    assert is_random(graph.call_function(aten.rand_like.default, (x,)))
    assert not is_random(graph.call_function(aten.sin.default, (x,)))


def test_run_graph_refuses_what_was_not_captured() -> None:
    model, batch = nn.Linear(8, 4), torch.randn(6, 8)
    graph = capture(model, _square, batch)
    with pytest.raises(InputError, match=r"\(6, 8\).*\(5, 8\)"):
        run_graph(graph, dict(model.named_parameters()), {}, batch[:5])
    with pytest.raises(InputError, match="'bias'"):
        run_graph(graph, {"weight": model.weight}, {}, batch)


@given(start=st.integers(-3, 3), steps=st.lists(st.integers(-5, 5), max_size=5))
def test_mere_counting_notes_nothing(start: int, steps: list[int]) -> None:
    reads = Reads()
    number = watched(start, "n", reads)
    for step in steps:
        number += step
    assert not reads.names
    assert number == start + sum(steps) and reads.names == {"n"}


def test_fingerprint_is_equal_in_every_process() -> None:
    program = (
        "import torch; from torch import nn; from partita.graph import capture\n"
        "m = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 2))\n"
        "print(capture(m, lambda m, b: m(b).square().mean(), torch.randn(4, 8)).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(prints) == 1 and len(prints.pop().strip()) == 16
