"""Dropout's masks drawn by our own kernel are torch's, bit by bit, and so is the generator afterwards."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from partita.graph import masks
from partita.graph.randomness import with_generator

compiled = pytest.mark.skipif(
    shutil.which("g++") is None or masks._fast() is None, reason="no g++, or torch draws by MKL on this processor"
)


def pair(seed: int, before: int) -> tuple[Generator, Generator]:
    """Two generators in the same state, `before` words after its seed."""
    both = Generator().manual_seed(seed), Generator().manual_seed(seed)
    for generator in both:
        torch.empty(before).uniform_(generator=generator)
    return both


@compiled
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**63 - 1),
    before=st.integers(0, 1300),
    counts=st.lists(st.integers(1, 4000), min_size=1, max_size=3),
    p=st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.9]), st.floats(0, 1)),
)
def test_masks_and_state_are_torchs(seed: int, before: int, counts: list[int], p: float) -> None:
    fast = masks._fast()
    assert fast is not None
    ours, theirs = pair(seed, before)
    for count in counts:
        mine, reference = torch.empty(count), torch.empty(count).bernoulli_(p, generator=theirs)
        fast(mine, p, ours)
        assert torch.equal(mine, reference)
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_op_draws_what_torch_draws(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, theirs = pair(5, 1)
    like = torch.empty(shape, dtype=dtype)
    draw = with_generator(torch.ops.aten.bernoulli.p)
    assert torch.equal(draw(ours, like, 0.8), torch.bernoulli(like, 0.8, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_transposed_tensors_mask_is_torchs() -> None:
    ours, theirs = pair(6, 0)
    like = torch.empty(64, 80).t()
    mine = masks.bernoulli(like, 0.8, ours)
    assert mine.is_contiguous()
    assert torch.equal(mine, torch.bernoulli(like, 0.8, generator=theirs))


def test_a_wrong_probability_is_torchs_to_refuse() -> None:
    with pytest.raises(RuntimeError, match=r"bernoulli_ expects p to be in \[0, 1\]"):
        masks.bernoulli(torch.empty(5000), 1.5, Generator())


def test_other_numbers_than_torchs_are_noticed() -> None:
    def draw(out: torch.Tensor, p: float, generator: Generator) -> None:
        out.bernoulli_(p, generator=generator)
        out[-1] = 1 - out[-1]

    assert not masks._agrees(draw)
    assert masks._agrees(lambda out, p, generator: out.bernoulli_(p, generator=generator))


def test_without_a_compiler_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "compile_source", lambda source: None)
    assert masks._fast.__wrapped__() is None
    monkeypatch.setattr(masks, "_fast", lambda: None)
    ours, theirs = pair(7, 0)
    like = torch.empty(5000)
    assert torch.equal(masks.bernoulli(like, 0.3, ours), torch.bernoulli(like, 0.3, generator=theirs))
