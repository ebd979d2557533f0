"""New weights in other sizes: drawn as the given ones were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partita.errors import InputError
from partita.search.structure import Network, resized


class Recurrent(nn.Module):
    """An embedding with a row of zeros, and a gate whose biases are not like the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.out = nn.Linear(24, 5)
        with torch.no_grad():
            self.lstm.bias_ih_l0[24:48] = 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.words(x))[0][:, -1])


def test_what_stands_for_something_else_is_not_mixed() -> None:
    torch.manual_seed(0)
    network = Network(Recurrent(), (torch.randint(20, (4, 9)),))
    found = resized(network, {name: 3 * size for name, size in network.sizes.items()})
    assert (found.words.weight[0] == 0).all() and (found.words.weight[1:] != 0).all()
    gates = found.lstm.bias_ih_l0.detach().view(4, 72)
    assert (gates[1] == 7).all() and (gates[[0, 2, 3]].abs() < 1).all()


@pytest.mark.parametrize("factor", [0.5, 1, 4])
def test_the_spread_is_that_of_the_given_weights_for_as_many_inputs(factor: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.Flatten(), nn.Linear(48 * 4, 7)
    )
    nn.init.normal_(model[3].weight, std=0.3)
    network = Network(model, (torch.randn(4, 3, 6, 6),))
    assert set(network.sizes) == {"0", "3"}
    found = resized(network, {name: int(factor * size) for name, size in network.sizes.items()})
    fewer = factor**-0.5
    for name, scale in {"0.weight": 1.0, "3.weight": fewer, "5.weight": fewer}.items():
        old, new = (one.get_parameter(name).detach() for one in (model, found))
        assert float(new.std()) == pytest.approx(float(old.std()) * scale, rel=0.1)
    assert (found[1].weight == 1).all() and (found[1].running_var == 1).all() and not found[1].running_mean.any()
    assert found(torch.randn(2, 3, 6, 6)).shape == (2, 7)
    assert float(model[3].weight.detach().std()) == pytest.approx(0.3, rel=0.05), "the given module is as it was"


def test_sizes_must_be_of_widths_that_there_are() -> None:
    network = Network(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(3, 4),))
    with pytest.raises(InputError, match="a width must be one of"):
        resized(network, {"2": 5})
    with pytest.raises(InputError, match="size of 0"):
        resized(network, {"0": 0})
