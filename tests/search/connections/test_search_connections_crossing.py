"""Inputs that connections make cross devices: counted one by one, and fewer where that is priced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partita.connections import SET, RigL
from partita.errors import InputError
from partita.search.connections.crossing import num_crossing, prices_OI
from partita.training.connecting import Cut

CUT = Cut((16, 16), (20, 20))


def devices(extents: tuple[int, ...]) -> list[int]:
    return [device for device, extent in enumerate(extents) for _ in range(extent)]


def pairs_of(mask: Tensor, cut: Cut) -> set[tuple[int, int]]:
    """(input, foreign device), by looking at every connection."""
    of_output, of_input = devices(cut.outputs), devices(cut.inputs)
    there = mask.flatten(2).any(2) if mask.dim() > 2 else mask
    return {(i, of_output[o]) for o, i in there.nonzero().tolist() if of_output[o] != of_input[i]}


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=3),
    st.lists(st.integers(0, 3), min_size=2, max_size=3),
    st.sampled_from([(), (2,), (2, 1)]),
    st.integers(0, 99),
)
def test_a_price_is_what_a_connection_adds(
    outputs: list[int], inputs: list[int], kernel: tuple[int, ...], seed: int
) -> None:
    num = min(len(outputs), len(inputs))
    cut = Cut(tuple(outputs[:num]), tuple(inputs[:num]))
    shape = (sum(cut.outputs), sum(cut.inputs), *kernel)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    before = pairs_of(mask, cut)
    assert num_crossing(mask, cut) == len(before)
    prices = prices_OI(mask, cut)
    assert prices.shape == mask.shape
    for place in (~mask).nonzero().tolist():
        more = mask.clone()
        more[tuple(place)] = True
        assert prices[tuple(place)] == len(pairs_of(more, cut)) - len(before)


def trained(method: RigL | SET, seed: int) -> Tensor:
    """The mask after changes by random weights and gradients."""
    random = torch.Generator().manual_seed(seed)
    weights = {"weight": torch.randn(32, 40, generator=random)}
    masks = method.start(weights, random)
    for step in range(10, 200, 10):
        weights = {"weight": torch.randn(32, 40, generator=random) * masks["weight"]}
        gradients = {"weight": torch.randn(32, 40, generator=random)}
        masks = method.changed(step, weights, gradients, masks, random, {"weight": CUT})
    return masks["weight"]


@pytest.mark.parametrize(("block", "density"), [(None, 0.05), ((4, 2), 0.2)])
@pytest.mark.parametrize("kind", [SET, RigL])
def test_fewer_inputs_cross_at_equal_density(kind: Any, block: tuple[int, int] | None, density: float) -> None:
    counts = []
    for crossing in (0.0, 0.3, 20.0):
        method = kind(density=density, until=200, every=10, fraction=1.0, block=block, crossing=crossing)
        masks = [trained(method, seed) for seed in range(4)]
        counts.append(sum(num_crossing(mask, CUT) for mask in masks))
        assert [int(mask.sum()) for mask in masks] == [
            int(trained(kind(density=density, until=1, block=block), 0).sum())
        ] * 4
    assert counts[0] > counts[1] >= counts[2]


def test_layers_that_are_not_cut_are_as_without_a_price() -> None:
    found = []
    for crossing in (0.0, 10.0):
        method = RigL(density=0.2, until=200, every=10, crossing=crossing)
        random = torch.Generator().manual_seed(0)
        weights = {"weight": torch.randn(32, 40, generator=random)}
        masks = method.start(weights, random)
        found.append(method.changed(10, weights, weights, masks, random, {"another": CUT})["weight"])
        assert method.prices_crossing == (crossing > 0)
    assert torch.equal(*found)


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(InputError, match="crossing must be"):
        RigL(density=0.2, until=200, crossing=-1.0)
