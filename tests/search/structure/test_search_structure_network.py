"""Networks read, written as plain classes, and with fewer units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.structure import called, results
from partita import InputError
from partita.search.structure import Network
from tests.search.structure.models import Images, images, text

FAMILIES = (
    "mlp_batchnorm", "conv1d", "unet", "lstm", "masked_tokens", "vae", "recommender", "gpt2", "llama", "swin",
)  # fmt: skip


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def silenced(network: Network, name: str) -> Tensor:
    """Units to keep; the others are read with weights of zero from now on."""
    keep = torch.randperm(network.sizes[name])[: max(1, network.sizes[name] * 2 // 3)].sort().values
    for tensor, dim in network.outgoing(name):
        units = network.units(name, tensor, dim)
        gone = ((units >= 0) & ~torch.isin(units, keep)).nonzero().flatten()
        with torch.no_grad():
            network.tensors[tensor].index_fill_(dim, gone, 0)
    return keep


def check(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Network:
    """Written it gives the same; without units that nobody reads as well."""
    network = Network(model, args, kwargs)
    same(results(model, args, kwargs), results(network.with_units({}).model, args, kwargs), 1e-6)  # torch may fuse one
    units = {name: silenced(network, name) for name in network.widths
             if network.outgoing(name) and not network.reads_all(name)}  # fmt: skip
    assert units
    smaller = network.with_units(units)
    same(results(model, args, kwargs), results(smaller.model, args, kwargs))
    sizes = {name: len(kept) for name, kept in units.items()}
    assert smaller.num_parameters() == network.num_parameters(sizes) < network.num_parameters()
    assert smaller.num_flops() == network.num_flops(sizes) < network.num_flops()
    return smaller


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_written_and_lose_units(name: str) -> None:
    pytest.importorskip("transformers")
    check(*called(name))


def test_images() -> None:
    model, args = images()
    smaller = check(model, args, {})
    assert smaller.model.depthwise.groups == smaller.model.grouped.out_channels  # type: ignore[union-attr]


def test_text_has_the_widths_of_a_transformer() -> None:
    model, args = text()
    network = Network(model, args)
    assert network.sizes["blocks.0.before"] == 32
    assert network.sizes["blocks.0.qkv/0"] == 4  # heads
    assert network.sizes["blocks.0.qkv/1"] == network.sizes["blocks.0.qkv/2"] == 8  # of queries and keys, and of values
    assert network.sizes["blocks.0.mlp.0"] == 128
    assert network.uses("blocks.0.qkv/0") == [
        ("blocks.0.qkv.weight", 0), ("blocks.0.qkv.bias", 0), ("blocks.0.project.weight", 1),
    ]  # fmt: skip
    assert network.reads_all("blocks.0.before") and network.reads_all("blocks.0.qkv/1")
    assert "embed.weight[0], since embedding reads it by index" in network.explain()
    check(model, args, {})


def test_blocks_of_one_class_share_it() -> None:
    model, args = text()
    network = Network(model, args)
    smaller = network.with_units({"blocks.1.mlp.0": torch.arange(40)})
    source = smaller.source.text
    assert source.count("class Block(nn.Module)") == 1
    assert "for block in self.blocks:" in source
    assert "40" in source and "128" in source
    assert smaller.sizes["blocks.1.mlp.0"] == 40


def test_other_batches_and_lengths_run() -> None:
    model, args = text()
    written = Network(model, args).with_units({}).model
    other = (torch.randint(50, (2, 5)),)
    same(results(model, other, {}), results(written, other, {}), 0)


def test_training_goes_on_alike() -> None:
    model, args = images()
    written = Network(model, args).with_units({}).model
    for each in (model, written):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(*args).square().mean().backward()
            optimizer.step()
    same(results(model, args, {}), results(written, args, {}))


def test_tied_parameters_stay_tied_and_frozen_ones_frozen() -> None:
    model, args = text()
    model.norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    written = Network(model, args).with_units({}).model
    assert written.head.weight is written.embed.weight  # type: ignore[union-attr]
    assert not written.norm.weight.requires_grad  # type: ignore[union-attr]
    assert "requires_grad_(False)" in Network(model, args).source.text


class Structured(nn.Module):
    """Inputs and results in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 2)})
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, batch: dict[str, Tensor], *, extra: Tensor) -> dict[str, Any]:
        x = batch["x"] * self.scale + self.shift + extra
        return {"a": self.heads["a"](x), "rest": [self.heads["b"](x)]}


def test_containers() -> None:
    model, batch, extra = Structured(), {"x": torch.randn(5, 4)}, torch.randn(5, 4)
    network = Network(model, (batch,), {"extra": extra})
    written = network.with_units({}).model
    assert written(batch, extra=extra).keys() == {"a", "rest"}
    same(results(model, (batch,), {"extra": extra}), results(written, (batch,), {"extra": extra}), 0)


def test_units_must_fit() -> None:
    model, args = images()
    network = Network(model, args)
    with pytest.raises(InputError, match="indices from 0 to 3"):
        network.with_units({"first": torch.tensor([4])})  # as many of each of two groups
    with pytest.raises(InputError, match="a width must be one of"):
        network.with_units({"third": torch.tensor([0])})


def test_models_that_can_not_be_captured() -> None:
    class Branching(Images):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match="torch.export captures"):
        Network(Branching(), (torch.randn(4, 3, 8, 8),))
    with pytest.raises(InputError, match="args must be a tuple"):
        Network(Images(), torch.randn(4, 3, 8, 8))  # type: ignore[arg-type]
