"""Convolutions and poolings cut in space: every rule, and whole graphs with their gradients in lockstep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from partita.sharding.calls import OpCall
from partita.sharding.experiment import Draw, recombines, rule_holds
from partita.sharding.halo_plain import with_plain_exchanges
from partita.sharding.lockstep import run_sharded
from partita.sharding.placement import Shard, Windows, WindowSums
from partita.sharding.regenerate import call_of
from partita.sharding.rules import Blocks, Bounds, Reach
from partita.sharding.ruleset import rules_of
from partita.sharding.shard import shard

sys.path.insert(0, str(Path(__file__).parent))
from captured import joint_graph

aten = torch.ops.aten
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def counts(draw: st.DrawFn, extent: int) -> tuple[int, ...]:
    size = draw(st.sampled_from([size for size in (2, 3, 4) if size <= extent]))
    cuts = sorted(draw(st.sets(st.integers(1, extent - 1), min_size=size - 1, max_size=size - 1)))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, extent], strict=True))


def spatial_rules(call: OpCall) -> list[Any]:
    return [r for r in rules_of(call) if any(isinstance(s, (Bounds, Reach)) for s in (*r.inputs, *r.outputs))]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[Any]]:
    num_dims = draw(st.integers(1, 3))
    numbers = st.lists(st.integers(1, 3), min_size=num_dims, max_size=num_dims)
    kernel, stride, dilation = draw(numbers), draw(numbers), draw(numbers)
    padding = draw(st.lists(st.integers(0, 2), min_size=num_dims, max_size=num_dims))
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 2]))
    extra = [draw(st.integers(0, step - 1)) if transposed else 0 for step in stride]
    largest = {1: 16, 2: 9, 3: 6}[num_dims]
    extents = draw(st.lists(st.integers(2, largest), min_size=num_dims, max_size=num_dims))
    weight = (2 * groups, 2, *kernel)
    spread = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    for extent, step, pad, wide, more in zip(extents, stride, padding, spread, extra, strict=True):
        grown, shrunk = (extent - 1) * step - 2 * pad + wide + more + 1, (extent + 2 * pad - wide - 1) // step + 1
        assume((grown if transposed else shrunk) >= 1)
    bias = torch.randn(2 * groups) if draw(st.booleans()) else None
    args = [stride, padding, dilation, transposed, extra, groups]
    return torch.randn(2, 2 * groups, *extents), torch.randn(weight), bias, args


@SETTINGS
@given(convolutions(), st.data())
def test_convolutions_and_their_gradients(given_: Any, data: st.DataObject) -> None:
    source, weight, bias, args = given_
    forward = call_of(aten.convolution.default, source, weight, bias, *args)
    check(forward, data)
    assert forward.outputs[0] is not None
    grad = torch.randn(forward.outputs[0].shape)
    sizes = [weight.shape[1] * args[-1]] if args[3] else [weight.shape[0]]
    mask = data.draw(st.sampled_from([[True, True, True], [True, False, False], [False, True, True]]))
    check(call_of(aten.convolution_backward.default, grad, source, weight, sizes, *args, mask), data)


def check(call: OpCall, data: st.DataObject) -> None:
    for rule in spatial_rules(call):
        blocks = Blocks(data.draw(counts(rule.extent)))
        assert rule_holds(call, rule, blocks), f"{call.name} {call.inputs} {call.args} {rule.text()} {blocks}"


@st.composite
def poolings(draw: st.DrawFn) -> tuple[int, torch.Tensor, list[Any], bool, bool, list[int]]:
    num_dims = draw(st.integers(2, 3))
    kernel = draw(st.lists(st.integers(1, 4), min_size=num_dims, max_size=num_dims))
    stride = draw(st.one_of(st.just([]), st.lists(st.integers(1, 3), min_size=num_dims, max_size=num_dims)))
    padding = [draw(st.integers(0, extent // 2)) for extent in kernel]
    ceil, counted = draw(st.booleans()), draw(st.booleans())
    dilation = [draw(st.integers(1, 2)) if not pad else 1 for pad in padding]
    lead = draw(st.sampled_from([(2, 3), (3,)]))
    extents = [draw(st.integers(2, 9)) for _ in range(num_dims)]
    assume(all(extent > d * (wide - 1) for extent, wide, d in zip(extents, kernel, dilation, strict=True)))
    return num_dims, torch.randn(*lead, *extents), [kernel, stride, padding], ceil, counted, dilation


def image_with_ties(image: torch.Tensor) -> torch.Tensor:
    """Equal entries, and a corner of -infinity, of which the op names the first."""
    spoiled = image.round()
    spoiled[..., :3, :3] = float("-inf")
    return spoiled


@SETTINGS
@given(poolings(), st.data())
def test_poolings_and_their_gradients(given_: Any, data: st.DataObject) -> None:
    num_dims, image, args, ceil, counted, dilation = given_
    generator = torch.Generator().manual_seed(0)
    average = getattr(aten, f"avg_pool{num_dims}d").default
    check(call_of(average, image, *args, ceil, counted), data)
    grad = torch.randn_like(average(image, *args, ceil, counted))
    backward = getattr(aten, f"avg_pool{num_dims}d_backward").default
    check(call_of(backward, grad, image, *args, ceil, counted, None), data)

    largest = getattr(aten, f"max_pool{num_dims}d_with_indices").default
    call = call_of(largest, image, *args, dilation, ceil)
    values, indices = largest(image, *args, dilation, ceil)
    backward = getattr(aten, f"max_pool{num_dims}d_with_indices_backward").default
    back = call_of(backward, values, image, *args, dilation, ceil, indices)
    for one, tensors in ((call, [image_with_ties(image)]), (back, [torch.randn_like(values), image, indices])):
        for rule in spatial_rules(one):
            blocks = Blocks(data.draw(counts(rule.extent)))
            assert recombines(one, rule, blocks, tensors, generator=generator, draw=Draw()), rule.text()


def test_patches_need_no_halo() -> None:
    call = call_of(aten.convolution.default, torch.randn(1, 2, 8, 8), torch.randn(3, 2, 4, 4), None,
                   [4, 4], [0, 0], [1, 1], False, [0, 0], 1)  # fmt: skip
    rule = next(rule for rule in spatial_rules(call) if rule.outputs[0].dim == 2)
    assert rule.input_placements(Blocks((1, 1)))[0] == Shard(2, (4, 4))
    assert Windows(2, (0, 4), (4, 8)).is_cut_like(Shard(2, (4, 4)))


def test_gradients_add_to_the_neighbours_rows() -> None:
    call = call_of(aten.convolution_backward.default, torch.randn(1, 3, 8), torch.randn(1, 2, 8), torch.randn(3, 2, 3),
                   [3], [1], [1], [1], False, [0], 1, [True, True, True])  # fmt: skip
    rule = spatial_rules(call)[0]
    assert rule.output_placements(Blocks((4, 4)))[0] == WindowSums(2, (-1, 3), (5, 9), (4, 4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8)
        self.same, self.down = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.Conv2d(8, 8, 3, 2, 1, groups=2)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y = nn.functional.max_pool2d(torch.relu(self.norm(self.stem(images))), 3, 2, 1)
        y = torch.relu(self.down(y + self.same(y)))
        y = self.up(nn.functional.avg_pool2d(y, 2))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dim, sizes", [(2, (64, 64)), (2, (33, 25, 37, 33)), (3, (50, 78)), (3, (20, 30, 36, 42))])
def test_a_network_cut_in_space(dim: int, sizes: tuple[int, ...], plain: bool, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    batch = (torch.randn(4, 3, 128, 128), torch.randint(0, 5, (4,)))
    module, values, names = joint_graph(Net(), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batch)
    sharded = shard(module, {names[0]: Shard(dim, sizes)}, axis="space", size=len(sizes))
    assert {"halo_exchange", "halo_sum"} <= {exchange.kind for exchange in sharded.exchanges}
    if plain:
        local = sharded.local
        monkeypatch.setattr(sharded, "local", lambda place: with_plain_exchanges(local(place), place))
    inputs = dict(zip([n.name for n in module.graph.nodes if n.op == "placeholder"], values, strict=True))
    for got, whole in zip(run_sharded(sharded, inputs), module(*values), strict=True):
        if isinstance(whole, torch.Tensor):
            torch.testing.assert_close(got, whole, rtol=1e-3, atol=1e-4)
