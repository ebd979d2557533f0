"""Described transformers: published parameter counts and flops, and what sharding divides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.cost.kernels import Exchange, Kernel, LayerWork
from partita.errors import InputError
from partita.planner.scale.transformer import Split, Transformer, block_work, chunks_of, head_work

GPT3 = Transformer(layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, seq=2048, fused_attention=False)
LLAMA8 = Transformer(
    layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, seq=8192, gated=True, bias=False,
    rotary=True, tied=False,
)  # fmt: skip


def _flops(work: LayerWork, direction: str) -> float:
    items = getattr(work, direction)
    return sum(item.count * item.flops for item in items if isinstance(item, Kernel))


def test_published_sizes() -> None:
    assert GPT3.num_parameters == pytest.approx(174.6e9, rel=0.005)
    assert LLAMA8.num_parameters == pytest.approx(8.03e9, rel=0.005)


def test_flops_are_the_published_formula() -> None:
    # 24 B s h^2 (1 + s / 6 h) for a forward block, twice that backward, 2 B s h V for the head (Narayanan et al. 2021).
    b, s, h = 3, GPT3.seq, GPT3.hidden
    work = block_work(GPT3, Split(micro_batch=b))
    assert _flops(work, "forward") == pytest.approx(24 * b * s * h**2 * (1 + s / (6 * h)))
    assert _flops(work, "backward") == pytest.approx(2 * _flops(work, "forward"))
    assert _flops(head_work(GPT3, Split(micro_batch=b)), "forward") == pytest.approx(2 * b * s * h * GPT3.vocab)


def test_kept_activations_are_the_published_formula() -> None:
    # s b h (34 + 5 a s / h) with dropout; s b h (10 + 24 / t + 5 a s / h t); all of it / t (Korthikanti et al. 2022).
    model = Transformer(layers=1, hidden=12288, heads=96, ffn=49152, vocab=51200, seq=2048, fused_attention=False,
                        dropout=True)  # fmt: skip
    sbh, scores = model.seq * model.hidden, 5 * model.heads * model.seq / model.hidden
    assert block_work(model, Split()).saved_bytes == pytest.approx(sbh * (34 + scores))
    assert block_work(model, Split(tensor=8)).saved_bytes == pytest.approx(sbh * (10 + 24 / 8 + scores / 8))
    sharded = block_work(model, Split(tensor=8, sequence_parallel=True))
    assert sharded.saved_bytes == pytest.approx(sbh * (34 + scores) / 8)
    assert sharded.selective_bytes == pytest.approx(sbh * 34 / 8)


@pytest.mark.parametrize(
    ("micro_batch", "tensor", "seq", "fused"),
    [(1, 4, 1024, True), (1, 8, 1024, False), (2, 8, 1024, True), (4, 1, 2048, True), (4, 1, 4096, False)],
)
def test_softmax_in_one_kernel_or_five(micro_batch: int, tensor: int, seq: int, fused: bool) -> None:
    # 16 heads: Megatron-LM's kernel takes sequences x local heads in fours and rows of at most 2048.
    model = Transformer(layers=1, hidden=1024, heads=16, ffn=4096, vocab=51200, seq=seq, fused_attention=False)
    work = block_work(model, Split(micro_batch=micro_batch, tensor=tensor))
    scores = micro_batch * 16 / tensor * seq**2
    for items, num_bytes in ((work.forward, 3.0 if fused else 36.0), (work.backward, 4.5 if fused else 40.0)):
        found = [item for item in items if isinstance(item, Kernel) and item.kind == "memory"]
        launches = 1 if fused else 5
        assert [one for one in found if one.num_bytes == num_bytes * scores and one.num_launches == launches]


@given(tensor=st.sampled_from([2, 4, 8]), context=st.sampled_from([1, 2, 4]), batch=st.integers(1, 4))
def test_sharding_divides_the_work(tensor: int, context: int, batch: int) -> None:
    whole = block_work(LLAMA8, Split(micro_batch=batch))
    part = block_work(LLAMA8, Split(micro_batch=batch, tensor=tensor, context=context))
    for direction in ("forward", "backward"):
        assert _flops(part, direction) == pytest.approx(_flops(whole, direction) / tensor / context)
    exchanges = [item for item in part.forward if isinstance(item, Exchange) and item.axis == "tensor"]
    assert sum(item.num_bytes for item in exchanges) == pytest.approx(
        2 * 2 * batch * LLAMA8.seq / context * LLAMA8.hidden
    )
    assert part.parameter_elements == pytest.approx(whole.parameter_elements / tensor)


@given(layers=st.integers(1, 60), chunks=st.integers(1, 16))
def test_chunks_hold_all_layers_once(layers: int, chunks: int) -> None:
    model = Transformer(layers=layers, hidden=64, heads=2, ffn=256, vocab=100, seq=16)
    if chunks > layers and (layers + 2) % chunks:
        with pytest.raises(InputError, match="a block for each chunk"):
            chunks_of(model, Split(), num_chunks=chunks)
        return
    found = chunks_of(model, Split(), num_chunks=chunks)
    assert len(found) == chunks and all(found)
    names = [work.name for chunk in found for work, count in chunk for _ in range(count)]
    assert names == ["embedding", *["block"] * layers, "head"]


def test_cuts() -> None:
    model = Transformer(layers=4, hidden=64, heads=2, ffn=256, vocab=100, seq=16)
    found = chunks_of(model, Split(), num_chunks=3, cuts=(1, 5))
    assert [[(work.name, count) for work, count in chunk] for chunk in found] == [
        [("embedding", 1)], [("block", 4)], [("head", 1)],
    ]  # fmt: skip
    for wrong in ((5, 1), (1,), (0, 3), (3, 6)):
        with pytest.raises(InputError, match="increasing cuts in 1 to 5"):
            chunks_of(model, Split(), num_chunks=3, cuts=wrong)


def test_impossible_sizes() -> None:
    with pytest.raises(InputError, match="heads must divide hidden"):
        Transformer(layers=1, hidden=10, heads=3, ffn=40, vocab=10, seq=4)
