"""Look-ups and losses with the table, vocabulary or classes cut; maxima over a cut dim; attention cut by rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.op_samples import Sample, graph_of
from partita.sharding.experiment import recombines
from partita.sharding.lockstep import run_sharded
from partita.sharding.placement import Shard
from partita.sharding.regenerate import call_of
from partita.sharding.rules import LARGEST, PARTIAL, Blocks, Cut
from partita.sharding.ruleset import rules_of
from partita.sharding.shard import ShardedGraph, shard

aten = torch.ops.aten
SETTINGS = settings(max_examples=25, deadline=None)


def check_all(target: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Every rule of the call on these values, over up to 4 workers; the rules' texts."""
    call = call_of(target, *args, **kwargs)
    tensors: list[Tensor] = []
    torch.fx.node.map_aggregate((args, kwargs), lambda x: tensors.append(x) if isinstance(x, Tensor) else None)
    rules = rules_of(call)
    for rule in rules:
        extent = rule.extent
        ways = [(1, 1), (1, 1, 1, 1)] if extent == 0 else [(extent - 1, 1), (1, extent - 1)]
        ways += [(1, extent - 3, 1, 1)] if extent > 3 else []
        for counts in ways:
            generator = torch.Generator().manual_seed(0)
            assert recombines(call, rule, Blocks(counts), tensors, generator=generator), f"{rule.text()} {counts}"
    return [rule.text() for rule in rules]


@SETTINGS
@given(st.integers(2, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans())
def test_embeddings(rows: int, shape: list[int], padded: bool) -> None:
    table, indices = torch.randn(rows, 3), torch.randint(0, rows, shape)
    assert "S0 R -> P" in check_all(aten.embedding.default, table, indices, rows - 1 if padded else -1)
    grad, padding = torch.randn(*shape, 3), rows - 1 if padded else -1
    for scales in (False, True):
        assert "R R -> S0" in check_all(aten.embedding_dense_backward.default, grad, indices, rows, padding, scales)


@SETTINGS
@given(st.integers(2, 7), st.integers(2, 6), st.integers(0, 1))
def test_reading_and_writing_by_indices(rows: int, num: int, dim: int) -> None:
    table = torch.randn(rows, rows)
    places = torch.randint(0, rows, (num, rows) if dim == 0 else (rows, num))
    line, source = torch.randint(-rows, rows, (num,)), torch.randn(places.shape)
    assert f"S{dim} R -> P" in check_all(aten.gather.default, table, dim, places)
    assert f"S{dim} R -> P" in check_all(aten.index_select.default, table, dim, line % rows)
    assert f"S{dim} R R -> S{dim}" in check_all(aten.scatter_add.default, table, dim, places, source)
    assert f"S{dim} R -> S{dim}" in check_all(aten.scatter.value, table, dim, places, 2.0)
    indices = [None] * dim + [line]
    assert f"S{dim} R -> P" in check_all(aten.index.Tensor, table, indices)
    values = torch.randn((num, rows) if dim == 0 else (rows, num))
    assert f"S{dim} R R -> S{dim}" in check_all(aten.index_put.default, table, indices, values, True)
    check_all(aten.index.Tensor, torch.randn(rows, 3, rows), [line, None, line.view(-1, 1)])


@SETTINGS
@given(st.integers(2, 8), st.integers(1, 5), st.integers(0, 2), st.booleans(), st.booleans())
def test_gradients_of_losses_over_cut_classes(
    classes: int, num: int, reduction: int, weighted: bool, ignores: bool
) -> None:
    source, target = torch.randn(num, classes), torch.randint(0, classes, (num,))
    weight, ignored = torch.rand(classes) if weighted else None, 0 if ignores else -100
    total = aten.nll_loss_forward.default(source, target, weight, reduction, ignored)[1]
    grad = torch.randn(num) if reduction == 0 else torch.randn(())
    texts = check_all(aten.nll_loss_backward.default, grad, source, target, weight, reduction, ignored, total)
    assert any(text.endswith("-> S1") for text in texts)


def sharded_run(function: Any, tensors: list[Tensor], seeds: dict[str, Shard]) -> ShardedGraph:
    """Hold the sharded graph of ``function`` against itself."""
    module = graph_of(Sample("test", tuple(tensors), function))
    size = len(next(iter(seeds.values())).sizes)
    sharded = shard(module, seeds, axis="tensor", size=size)
    inputs = {f"x{index}": tensor for index, tensor in enumerate(tensors)} | module.constants
    for got, whole in zip(run_sharded(sharded, inputs), function(*tensors), strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5, equal_nan=True)
    return sharded


def cross_entropy(weight: Tensor, hidden: Tensor, target: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        own = [item.detach().requires_grad_() for item in (weight, hidden)]
        loss = nn.functional.cross_entropy(own[1] @ own[0].t(), target)
        return [loss.detach(), *torch.autograd.grad(loss, own)]


@pytest.mark.parametrize("sizes", [(2000, 2000), (500, 3500), (1000, 1000, 1500, 500)])
def test_cross_entropy_over_a_cut_vocabulary(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(4000, 8), torch.randn(32, 8), torch.randint(0, 4000, (32,))]
    sharded = sharded_run(cross_entropy, tensors, {"x0": Shard(0, sizes)})
    assert sharded.gathered == ()
    assert max(exchange.num_bytes for exchange in sharded.exchanges) <= 32 * 8 * 4  # never the logits


@pytest.mark.parametrize("sizes", [(3, 4), (1, 2, 1, 3)])
def test_extrema_over_a_cut_dim(sizes: tuple[int, ...]) -> None:
    x = torch.randn(5, 7)
    x[1, 6] = float("nan")

    def extrema(x: Tensor) -> list[Tensor]:
        return [x.amax(1), x.amin(1, keepdim=True), x.nan_to_num().max(), (x > 1).any(1), (x > -2).all(), x.amax(1) * 2]

    sharded_run(extrema, [x], {"x0": Shard(1, sizes)})
    rule = next(rule for rule in rules_of(call_of(aten.amax.default, x, [1])) if rule.inputs == (Cut(1),))
    assert rule.outputs == (LARGEST,)


@SETTINGS
@given(st.integers(2, 7), st.integers(1, 9), st.booleans(), st.booleans())
def test_attention_cut_by_rows(rows: int, keys: int, causal: bool, masked: bool) -> None:
    query = torch.randn(2, 2, rows, 4)
    key, value = torch.randn(2, 2, keys, 4), torch.randn(2, 2, keys, 4)
    mask = torch.randn(rows, keys) if masked and not causal else None
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    output, logsumexp = forward(query, key, value, 0.0, causal, attn_mask=mask)
    texts = check_all(forward, query, key, value, 0.0, causal, attn_mask=mask)
    assert any(text.endswith("-> S2 S2") for text in texts)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    given_ = (torch.randn_like(output), query, key, value, output, logsumexp, 0.0, causal)
    assert any(text.endswith("-> S2 P P") for text in check_all(backward, *given_, attn_mask=mask))


def test_a_causal_transformer_block_over_the_sequence() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, 8, 4) for _ in range(3)]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            own = [item.detach().requires_grad_() for item in (query, key, value)]
            result = nn.functional.scaled_dot_product_attention(*own, is_causal=True)
            return [result.detach(), *torch.autograd.grad(result.square().sum(), own)]

    sharded_run(attention, tensors, {"x0": Shard(2, (3, 5))})


def test_casts_that_round_take_no_summands() -> None:
    def texts(source: torch.dtype, target: torch.dtype) -> list[str]:
        call = call_of(aten._to_copy.default, torch.zeros(4, dtype=source), dtype=target)
        return [rule.text() for rule in rules_of(call) if PARTIAL in rule.inputs]

    assert texts(torch.float32, torch.bfloat16) == [] and texts(torch.int64, torch.float32) == []
    assert texts(torch.bfloat16, torch.float32) == ["P -> P"] and texts(torch.float32, torch.float64) == ["P -> P"]


def test_what_is_empty_is_not_cut() -> None:
    call = call_of(aten.native_group_norm.default, torch.zeros(0, 2), torch.ones(2), torch.ones(2), 0, 2, 1, 1, 1e-5)
    assert all(rule.extent == 0 and Cut(0) not in rule.inputs for rule in rules_of(call))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_embedding_bags(mode: int) -> None:
    table, indices, offsets = torch.randn(5, 4), torch.randint(0, 5, (9,)), torch.tensor([0, 2, 3, 7])
    output, places, sizes, largest = aten._embedding_bag.default(table, indices, offsets, False, mode)
    assert check_all(aten._embedding_bag.default, table, indices, offsets, False, mode)
    given_ = (torch.randn_like(output), indices, offsets, places, sizes, largest, 5, False, mode, False, None)
    assert "S1" in check_all(aten._embedding_bag_backward.default, *given_)[0]
