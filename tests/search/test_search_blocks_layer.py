"""Block-sparse layers: from dense ones and back, errors, training under plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import partita
from partita import Constraints, InputError
from partita.search.blocks import BlockLinear

SIDES = st.integers(1, 4)
CORNERS = {
    "one": Constraints(num_workers=1),
    "data2": Constraints(data=2, pipeline=1),
    "pipeline2": Constraints(data=1, pipeline=2),
    "tensor2": Constraints(data=1, tensor=2),
}


def mask_of(num_outputs: int, num_all: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(num_outputs, num_all, generator=generator).argsort(1)[:, :num_inputs]
    return torch.zeros(num_outputs, num_all, dtype=torch.bool).scatter_(1, index, True)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.booleans(), st.booleans(), st.data())
def test_from_a_linear_layer_and_back(
    num_outputs: int, num_all: int, height: int, width: int, has_bias: bool, by_entries: bool, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    blocks = mask_of(num_outputs, num_all, data.draw(st.integers(1, num_all)))
    entries = blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)
    linear = nn.Linear(num_all * width, num_outputs * height, bias=has_bias)
    layer = BlockLinear.from_linear(linear, entries if by_entries else blocks, (height, width))
    with torch.no_grad():
        linear.weight.mul_(entries)
    x = torch.randn(2, 3, linear.in_features)
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer(x[0, 0]), linear(x[0, 0]))
    assert torch.equal(layer.mask, blocks) and layer.density == blocks.float().mean()
    assert torch.equal(layer.to_linear().weight, linear.weight)
    if has_bias:
        assert torch.equal(layer.to_linear().bias, linear.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": (3, 2)}, "must be whole blocks of 3 outputs"),
        ({"num_inputs": 5}, "between 1 and all 4 input blocks"),
        ({"num_inputs": 0}, "between 1 and all 4 input blocks"),
        ({"index": torch.zeros(3, 1, dtype=torch.int64)}, "must have the shape"),
        ({"index": torch.full((4, 1), 4)}, "numbers of input blocks, 0 to 3"),
        ({"index": torch.zeros(4, 1)}, "numbers of input blocks, 0 to 3"),
    ],
)
def test_layers_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"block": (2, 2), "num_inputs": 1} | change
    with pytest.raises(InputError, match=message):
        BlockLinear(8, 8, **options)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(8, 8).triu(), "blocks of 2 outputs and 2 inputs are there in part"),
        (torch.ones(4, 4).triu(), "same number of input blocks, at least one"),
        (torch.zeros(4, 4), "same number of input blocks, at least one"),
        (torch.ones(3, 4), "an entry for each of the weight's"),
    ],
)
def test_masks_that_are_no_blocks_are_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockLinear.from_linear(nn.Linear(8, 8), mask, (2, 2))


def test_inputs_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="last dim of the input must be 8"):
        BlockLinear(8, 8, (2, 2), num_inputs=1)(torch.ones(3, 10))


def test_autocast_takes_its_type() -> None:
    layer = BlockLinear(8, 8, (2, 2), num_inputs=2)
    dense, x = layer.to_linear(), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (x, x.bfloat16()):
            got = layer(value)
            assert got.dtype is torch.bfloat16
            torch.testing.assert_close(got, dense(value), rtol=0.03, atol=0.03)
        got.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.float32


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), BlockLinear(32, 16, (4, 8), num_inputs=2), nn.Tanh(),
        BlockLinear(16, 12, (4, 4), num_inputs=2, bias=False), nn.Linear(12, 3),
    )  # fmt: skip


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch_of(number: int) -> Any:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def rewire(model: nn.Module) -> None:
    """Other blocks, in place."""
    for layer in model.modules():
        if isinstance(layer, BlockLinear):
            mask = mask_of(*layer.mask.shape, layer.index.shape[1], seed=3)
            assert not torch.equal(mask, layer.mask)
            layer.index.copy_(mask.nonzero()[:, 1].view_as(layer.index))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("corner", CORNERS)
def test_plans_train_like_plain_pytorch_and_follow_the_index(corner: str, compiled: bool) -> None:
    plain, model = model_of(), model_of()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    expected = []
    for number in range(5):
        if number == 3:
            rewire(plain)
        optimizer.zero_grad()
        loss = loss_fn(plain, batch_of(number))
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    got = []
    with partita.parallelize(model, own, loss_fn, batch_of(0), plan=CORNERS[corner], compile=compiled) as step:
        for number in range(5):
            if number == 3:
                rewire(model)
            got.append(step(batch_of(number)).loss)
        step.sync_to(model)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
