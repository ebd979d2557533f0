"""What stands in for what the user did not give: loss, score, direction, batch size, optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from partita import InputError
from partita.search.around import Around
from partita.search.task import (
    BATCH_SIZES,
    Task,
    bound_of,
    default_loss,
    default_score,
    settled,
    suggested_adamw,
)
from partita.search.trials import SearchTrial


def classes(rows: int = 6) -> tuple[Any, Any]:
    part = torch.eye(3).repeat(rows // 3, 1), torch.arange(3).repeat(rows // 3)
    return part, part


def numbers() -> tuple[Any, Any]:
    part = torch.ones(4, 2), torch.zeros(4, 2)
    return part, part


def build(trial: SearchTrial) -> nn.Module:
    return nn.Identity()


def score(model: nn.Module, judged: Any) -> float:
    return 1.0


def no_connections(trial: SearchTrial) -> None:
    return None


class Branching(nn.Module):
    """Cannot be captured."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def task(**changes: Any) -> Task:
    plain = Task(
        build=build, data=classes, loss_fn=default_loss, score=None, direction=None, optimizer=suggested_adamw,
        batch_size=None, connections=None,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def test_the_default_loss_is_that_of_the_targets() -> None:
    (x, y), _ = classes()
    assert default_loss(nn.Identity(), (x, y)) == nn.functional.cross_entropy(x, y)
    (x, y), _ = numbers()
    assert default_loss(nn.Identity(), (x, y)) == 1.0


def test_outputs_of_another_shape_than_the_targets_are_not_broadcast() -> None:
    with pytest.raises(InputError, match="shape of the targets"):
        default_loss(nn.Identity(), (torch.ones(4, 1), torch.zeros(4)))
    with pytest.raises(InputError, match=r"\(inputs, targets\)"):
        default_loss(nn.Identity(), torch.ones(4, 1))


def test_the_default_score_weighs_rows_not_batches() -> None:
    right, wrong = (torch.eye(3), torch.arange(3)), (torch.eye(3)[:1], torch.tensor([2]))
    assert default_score(nn.Identity(), [right, wrong], default_loss) == pytest.approx(0.75)
    ones, zeros = (torch.ones(3, 1), torch.zeros(3, 1)), (torch.zeros(1, 1), torch.zeros(1, 1))
    assert default_score(nn.Identity(), [ones, zeros], default_loss) == pytest.approx(0.75)
    with pytest.raises(InputError, match="at least one batch"):
        default_score(nn.Identity(), [], default_loss)


@pytest.mark.parametrize(
    ("changes", "direction", "bound"),
    [
        ({}, "maximize", 1.0),
        ({"data": numbers}, "minimize", 0.0),
        ({"data": numbers()}, "minimize", 0.0),
        ({"loss_fn": score}, "minimize", None),
        ({"score": score}, "maximize", None),
        ({"score": score, "direction": "minimize"}, "minimize", None),
    ],
)
def test_directions(changes: dict[str, Any], direction: str, bound: float | None) -> None:
    found = settled(task(**changes))
    assert found.direction == direction and bound_of(found) == bound
    assert not callable(found.data), "tensors are made once and shared"


def test_a_module_becomes_the_space_around_it() -> None:
    """In training mode, however it was left; connections of one's own stay."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    found = settled(task(build=model))
    assert isinstance(found.build, Around) and found.connections == found.build.connections
    assert found.name == "around Sequential" != task().name
    assert found.build.model.training and not model.training
    assert settled(task(build=model, connections=no_connections)).connections is no_connections
    with pytest.raises(InputError, match="capture"):
        settled(task(build=Branching()))


def test_batch_sizes_fit_the_data() -> None:
    asked: list[Any] = []

    def ask(kind: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        asked.append(arguments[0])
        return arguments[0][-1]

    assert task().batch_size_of(SearchTrial(0, {}, ask), 10_000) == BATCH_SIZES[-1]
    assert task().batch_size_of(SearchTrial(0, {}, ask), 300) == 32 and asked[-1] == [16, 32]
    assert task().batch_size_of(SearchTrial(0, {}, ask), 5) == 5
    assert task(batch_size=7).batch_size_of(SearchTrial(0, {}), 100) == 7
    assert task(batch_size=lambda trial: 9).batch_size_of(SearchTrial(0, {}), 100) == 9
    with pytest.raises(InputError, match="batch_size"):
        task(batch_size=lambda trial: 0).batch_size_of(SearchTrial(0, {}), 100)


def test_the_default_optimizer_has_a_suggested_rate() -> None:
    optimizer = suggested_adamw(SearchTrial(0, {"learning_rate": 0.02}), nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["lr"] == 0.02
