"""Pruned, wider and deeper networks, learning rates and prices of widths, and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.structure import results
from partita import InputError
from partita.search.structure import (
    Network,
    WidthPrices,
    blocks_of,
    deepened,
    gradmax,
    importance,
    mup_groups,
    mup_start_,
    pruned,
    save_network,
    shallower,
    sizes_within,
    widened,
)  # fmt: skip
from tests.search.structure.models import Text, images, text

MODELS = {"images": images, "text": text}


def mlp(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def growing(network: Network) -> list[str]:
    return [name for name in network.widths if network.outgoing(name) and not network.reads_all(name)]


def same(a: nn.Module, b: nn.Module, args: tuple[Tensor, ...]) -> None:
    for x, y in zip(results(a, args, {}), results(b, args, {}), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


# -- fewer units ------------------------------------------------------------------------------------------------------


def test_the_most_important_units_stay() -> None:
    network = Network(mlp(), (torch.randn(4, 6),))
    with torch.no_grad():
        network.tensors["0.weight"][[1, 5]] = 0
        network.tensors["0.bias"][[1, 5]] = 0
        network.tensors["2.weight"][:, [1, 5]] = 0
    smaller = pruned(network, {"0": 10})
    same(network.model, smaller.model, network.args)


def test_importance_by_gradients_is_the_change_of_the_loss() -> None:
    """Of a network that is linear in a unit, removing it changes the loss by as much."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 1, bias=False))
    x = torch.randn(8, 5)
    network = Network(model, (x,))
    model(x).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    scores = importance(network, gradients)["0"]
    for unit in range(4):
        rest = network.with_units({"0": torch.tensor([other for other in range(4) if other != unit])})
        change = (rest.model(x).mean() - model(x).mean()).abs()
        assert scores[unit].item() == pytest.approx(2 * change.item(), rel=1e-4)  # by its rows, and by its column


def test_sizes_within_limits() -> None:
    model, args = text()
    network = Network(model, args)
    limit = network.num_parameters() // 2
    sizes = sizes_within(network, num_parameters=limit, multiple=4)
    smaller = pruned(network, sizes)
    assert smaller.num_parameters() == network.num_parameters(sizes) <= limit
    assert network.num_parameters(sizes) > 0.8 * limit
    assert all(size % 4 == 0 for size in sizes.values())
    assert sizes_within(network) == network.sizes
    with pytest.raises(InputError, match="smallest sizes"):
        sizes_within(network, num_parameters=10)


def test_what_pruning_refuses() -> None:
    network = Network(mlp(), (torch.randn(4, 6),))
    with pytest.raises(InputError, match="pruning makes widths smaller"):
        pruned(network, {"0": 13})
    with pytest.raises(InputError, match="scores must have one number"):
        pruned(network, {"0": 3}, {"0": torch.ones(5)})


# -- more units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["copies", "pairs"])
@pytest.mark.parametrize("name", MODELS)
def test_wider_networks_give_the_same(name: str, how: str) -> None:
    model, args = MODELS[name]()
    network = Network(model, args)
    sizes = {width: network.sizes[width] + 3 for width in growing(network)}
    larger = widened(network, sizes, how=how)  # type: ignore[arg-type]
    assert {width: larger.sizes[width] for width in sizes} == sizes
    same(model, larger.model, args)


@pytest.mark.parametrize("name", MODELS)
def test_gradmax_gives_the_same_and_the_largest_gradients(name: str) -> None:
    model, args = MODELS[name]()
    network = Network(model, args)
    target = torch.randint(10, (4,))

    def loss(module: nn.Module) -> Tensor:
        found = module.eval()(*args)
        return F.cross_entropy(found if found.ndim == 2 else found[:, -1], target)

    width = growing(network)[-1]
    size = network.sizes[width] + 2
    larger = gradmax(network, {width: size}, loss)
    same(model, larger.model, args)

    def new_gradients(module: nn.Module, of: Network) -> float:
        module.zero_grad()
        loss(module).backward()
        found = 0.0
        for tensor, dim in of.uses(width):
            gradient = of.parameters[tensor].grad if tensor in of.parameters else None
            if gradient is not None and gradient.ndim > 1 and (tensor, dim) not in of.outgoing(width):
                new = (of.units(width, tensor, dim) >= size - 2).nonzero().flatten()
                found += gradient.index_select(dim, new).square().sum().item()
        return found

    best = new_gradients(larger.model, larger)
    shuffled = gradmax(network, {width: size}, loss)
    with torch.no_grad():
        for tensor, dim in shuffled.outgoing(width):  # other weights of the same size
            value = shuffled.tensors[tensor]
            new = (shuffled.units(width, tensor, dim) >= size - 2).nonzero().flatten()
            part = value.index_select(dim, new)
            value.index_copy_(dim, new, torch.randn_like(part) * part.norm() / part.numel() ** 0.5)
    assert best > new_gradients(shuffled.model, shuffled)


class Recurrent(nn.Module):
    """Its states are read by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])  # type: ignore[no-any-return]


def test_recurrent_networks_grow() -> None:
    torch.manual_seed(0)
    model, args = Recurrent(), (torch.randn(4, 6, 5),)
    network = Network(model, args)
    assert list(network.sizes.values()) == [8]
    (name,) = network.sizes
    for larger in (
        widened(network, {name: 11}),
        widened(network, {name: 11}, how="pairs"),
        gradmax(network, {name: 11}, lambda module: module(*args).square().mean()),
    ):
        assert larger.sizes[name] == 11
        same(model, larger.model, args)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(5, 8, bias=False), nn.Linear(5, 8, bias=False)
        self.down = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def test_gated_units_grow_by_gradmax_and_silent_relus_without_bias_do_not() -> None:
    torch.manual_seed(0)
    model, args = Gated(), (torch.randn(4, 5),)
    larger = gradmax(Network(model, args), {"gate": 11}, lambda module: module(*args).square().mean())
    same(model, larger.model, args)
    plain = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(InputError, match="but they get none"):
        gradmax(Network(plain, args), {"0": 11}, lambda module: module(*args).square().mean())


def test_what_can_not_grow() -> None:
    model, args = text()
    network = Network(model, args)
    with pytest.raises(InputError, match="layer_norm runs over it"):
        widened(network, {"blocks.0.before": 40})
    with pytest.raises(InputError, match="use pruned"):
        widened(network, {"blocks.0.mlp.0": 4})


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_a_residual_block_more_changes_nothing_and_learns() -> None:
    model, args = text()
    network = Network(model, args)
    assert [name for name in blocks_of(network) if name.count(".") == 1] == ["blocks.0", "blocks.1", "blocks.2"]
    deeper = deepened(network, "blocks.1")
    same(model, deeper.model, args)
    assert deeper.num_parameters() > network.num_parameters()
    deeper.model(*args).square().mean().backward()
    new = deeper.model.get_submodule("blocks.2")
    assert all(parameter.grad is not None for parameter in new.parameters())
    assert new.mlp[2].weight.grad.abs().max() > 0  # type: ignore[union-attr, index]
    again = shallower(deeper, "blocks.2")
    same(model, again.model, args)


def test_a_plain_block_more_is_an_identity() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), inner, nn.Linear(8, 3))
    args = (torch.randn(4, 6),)
    same(model, deepened(Network(model, args), "2").model, args)


def test_blocks_that_can_not_be_neutral() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3))
    network = Network(model, (torch.randn(4, 6),))
    with pytest.raises(InputError, match="neither adds to what it takes"):
        deepened(network, "1")
    with pytest.raises(InputError, match=r"must be a module in an nn\.ModuleList"):
        deepened(network, "7")
    with pytest.raises(InputError, match="must run, but does not"):
        shallower(network, "0")


# -- learning rates and prices ----------------------------------------------------------------------------------------


def test_learning_rates_of_every_width() -> None:
    """Table 3 of Tensor Programs V, for four times the width."""
    wide, base = mlp(48), mlp(12)
    network = Network(wide, (torch.randn(4, 6),))
    names = {id(parameter): name for name, parameter in wide.named_parameters()}

    def rates(rule: str) -> dict[str, float]:
        groups = mup_groups(network, base, lr=1.0, rule=rule)  # type: ignore[arg-type]
        return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}

    assert rates("adam") == {"0.weight": 1, "0.bias": 1, "2.weight": 1 / 4, "2.bias": 1, "4.weight": 1 / 4, "4.bias": 1}
    assert rates("sgd") == {"0.weight": 4, "0.bias": 4, "2.weight": 1, "2.bias": 4, "4.weight": 1 / 4, "4.bias": 1}
    last = wide[4].weight.clone()
    mup_start_(network, base)
    torch.testing.assert_close(wide[4].weight, last / 2)
    torch.optim.AdamW(mup_groups(network, base, lr=1e-3, weight_decay=0.1))


def test_tied_weights_have_no_one_rate() -> None:
    model, args = text()
    with pytest.raises(InputError, match="untie them"):
        mup_groups(Network(Text(width=64), args), model, lr=1.0)


def test_units_that_are_not_worth_their_price_shrink() -> None:
    """Two of twelve units are of use; the price drives out most of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    x = torch.randn(256, 6)
    y = torch.tanh(2 * x[:, :1]) + torch.tanh(x[:, 1:2] - x[:, 2:3])
    network = Network(model, (x,))
    prices = WidthPrices(network, strength=0.5, resource="flops")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        (F.mse_loss(model(x), y) + prices.penalty(model)).backward()
        optimizer.step()
    sizes = prices.worth(model)
    assert 2 <= sizes["0"] <= 6
    filled = prices.filled(sizes, network.num_flops())
    assert filled["0"] == 12
    with pytest.raises(InputError, match="the budget must be at least"):
        prices.filled(sizes, 1)


# -- files ------------------------------------------------------------------------------------------------------------

READ = """
import sys
import torch
from model import load

args, expected = torch.load("example.pt")
model = load().eval()
assert "partita" not in sys.modules
torch.testing.assert_close(model(*args), expected, rtol=0, atol=0)
print("equal")
"""


@pytest.mark.parametrize("name", MODELS)
def test_files_load_without_partita(name: str, tmp_path: Path) -> None:
    model, args = MODELS[name]()
    network = Network(model, args)
    smaller = pruned(network, sizes_within(network, num_parameters=network.num_parameters() * 2 // 3))
    save_network(smaller, tmp_path)
    torch.save((args, results(smaller.model, args, {})[0]), tmp_path / "example.pt")
    (tmp_path / "read.py").write_text(READ)
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
                           + READ], cwd=tmp_path, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr


def test_masks_are_saved_and_their_weights_are_zero(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    network = Network(mlp(), (torch.randn(4, 6),))
    mask = torch.rand(12, 6) < 0.3
    save_network(network, tmp_path, masks={"0.weight": mask})
    assert torch.equal(load_file(tmp_path / "masks.safetensors")["0.weight"], mask)
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["0.weight"] != 0, mask)
    with pytest.raises(InputError, match="shaped like"):
        save_network(network, tmp_path, masks={"0.weight": mask[:3]})
