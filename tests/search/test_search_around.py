"""Automatic spaces: what is suggested around a module, and that what is built follows from it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from partita.connections import RigL
from partita.errors import InputError
from partita.search.around import RANGE, Around, call_of
from partita.search.task import default_loss
from partita.search.trials import SearchTrial


class Block(nn.Module):
    """Adds what a hidden layer finds."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.relu(self.wide(self.norm(x))))


class Mixed(nn.Module):
    """Two runs of equal blocks in one list, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Block(12, 20), Block(12, 20), Block(12, 8), Block(12, 8), Block(12, 8)]
        self.body = nn.Sequential(nn.Linear(5, 12), *blocks, nn.Linear(12, 7), nn.ReLU())
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def asked(answers: dict[str, Any]) -> tuple[SearchTrial, dict[str, Any]]:
    """A trial that suggests these values, else the lower ends, and what it was asked."""
    questions: dict[str, Any] = {}

    def answer(kind: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        questions[name] = arguments
        return answers.get(name, arguments[0][0] if kind == "categorical" else arguments[0])

    return SearchTrial(0, {}, answer), questions


WIDTHS = {
    "body.0": 12, "body.1*.wide": 20, "body.3*.wide": 8, "body.6": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def space() -> Around:
    torch.manual_seed(0)
    return Around(Mixed(), (torch.randn(4, 5),))


def test_runs_of_equal_blocks_are_one(space) -> None:
    assert space.runs == [["body.1", "body.2"], ["body.3", "body.4", "body.5"]]
    trial, questions = asked({})
    space(trial)
    assert {name: ends for name, ends in questions.items() if name.startswith("depth")} == {
        "depth of body.1*": (1, 4),
        "depth of body.3*": (1, 6),
    }
    widths = {name.removeprefix("width of "): ends for name, ends in questions.items() if name.startswith("width")}
    assert widths == {name: (max(1, size // RANGE), RANGE * size) for name, size in WIDTHS.items()}


@pytest.mark.parametrize("depths", [(1, 1), (2, 3), (4, 2), (1, 6)])
def test_what_is_built_has_what_was_suggested(space, depths) -> None:
    """Names of suggestions do not depend on depths, or the study would compare what is not the same."""
    wide = {f"width of {name}": size + 1 for name, size in WIDTHS.items()}
    trial, questions = asked(wide | {"depth of body.1*": depths[0], "depth of body.3*": depths[1]})
    model = space(trial)
    assert {name for name in questions if name.startswith("width")} == set(wide)
    hidden = [tensor.shape[0] for name, tensor in model.named_parameters() if name.endswith("wide.weight")]
    assert hidden == [21] * depths[0] + [9] * depths[1]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert shapes["body.0.weight"] == (13, 5) and shapes[f"body.{1 + sum(depths)}.weight"] == (8, 13)
    assert shapes["head.weight"] == (3, 8)
    assert model(torch.randn(6, 5)).shape == (6, 3)


def test_building_again_from_the_same_values_fits_the_same_weights(space) -> None:
    trial, _ = asked({"depth of body.1*": 3, "width of body.6": 11})
    first = space(trial)
    again = pickle.loads(pickle.dumps(space))(SearchTrial(0, trial.params))
    again.load_state_dict(first.state_dict())
    x = torch.randn(6, 5)
    torch.testing.assert_close(again(x), first(x), rtol=0, atol=0)


def test_connections_may_be_learnt(space) -> None:
    assert space.connections(asked({"connections": "all"})[0]) is None
    found = space.connections(asked({"connections": "rigl", "density": 0.2})[0])
    assert isinstance(found, RigL) and found.density == 0.2


def test_with_what_the_loss_calls_the_model_is_found() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = torch.randn(8, 3), torch.randint(4, (8,))
    (x,), named = call_of(model, default_loss, batch)
    assert x is batch[0] and named == {}
    torch.testing.assert_close(model.state_dict(), before)
    with pytest.raises(InputError, match="must call the model"):
        call_of(model, lambda model, batch: torch.zeros(()), batch)
