"""Batches from where a step stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import partita
from partita import Checkpoints, Constraints
from partita.errors import InputError

PLAN = Constraints(num_workers=1, compiled=False)


class Numbers(Dataset[torch.Tensor]):
    """Knows what was read."""

    def __init__(self, num: int = 10) -> None:
        self._num, self.read = num, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.tensor([float(index)])


class Standing:
    """A step that is where it is told."""

    num_steps = 0

    def rows_needed(self, num_rows: int) -> tuple[int, int]:
        return 0, num_rows


def taken(loader: Any, start: int, num: int, **options: Any) -> list[list[float]]:
    step = Standing()
    step.num_steps = start
    found = []
    for batch in partita.data.resumable(loader, step, num_steps=start + num, **options):  # type: ignore[arg-type]
        found.append(batch.flatten().tolist())
        step.num_steps += 1
    return found


class EveryOther(Sampler[int]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        return iter([(index * 3 + self.epoch) % 10 for index in range(10)])


LOADERS: dict[str, Any] = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "the last one dropped": {"shuffle": True, "drop_last": True},
    "with a generator": {"shuffle": True, "generator": torch.Generator().manual_seed(9)},
    "a sampler with epochs": {"sampler": EveryOther()},
}


@pytest.mark.parametrize("name", LOADERS)
def test_from_any_batch_on_it_is_the_same(name: str) -> None:
    whole = taken(DataLoader(Numbers(), batch_size=3, **LOADERS[name]), 0, 12)
    for start in range(12):
        data = Numbers()
        assert taken(DataLoader(data, batch_size=3, **LOADERS[name]), start, 12 - start) == whole[start:]
        assert len(data.read) == sum(len(batch) for batch in whole[start:])  # what was seen is not read
    per_epoch = 3 if "dropped" in name else 4
    epochs = [whole[first : first + per_epoch] for first in range(0, 12, per_epoch)]
    for epoch in epochs:
        values = [value for batch in epoch for value in batch]
        assert len(values) == len(set(values)) == (9 if "dropped" in name else 10)
    assert (epochs[0] == epochs[1]) == (name == "in order")
    assert (taken(DataLoader(Numbers(), batch_size=3, **LOADERS[name]), 0, 12, seed=1) == whole) == (
        name in ("in order", "a sampler with epochs")
    )


def test_a_step_that_jumps_is_followed() -> None:
    loader = DataLoader(Numbers(), batch_size=3, shuffle=True)
    whole = taken(loader, 0, 12)
    step, found = Standing(), []
    for batch in partita.data.resumable(loader, step, num_steps=12):  # type: ignore[arg-type]
        found.append((step.num_steps, batch.flatten().tolist()))
        step.num_steps += 3 if step.num_steps in (1, 6) else 1
    assert found == [(number, whole[number]) for number in (0, 1, 4, 5, 6, 9, 10, 11)]


def test_several_batches_a_step() -> None:
    loader = DataLoader(Numbers(), batch_size=3, shuffle=True)
    whole = taken(loader, 0, 12)
    step = Standing()
    step.num_steps = 1
    found = []
    batches = partita.data.resumable(loader, step, num_steps=4, accumulate=3)  # type: ignore[arg-type]
    for number, batch in enumerate(batches):
        found.append(batch.flatten().tolist())
        step.num_steps += number % 3 == 2
    assert found == whole[3:12]


def test_torchs_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    wanted = float(torch.rand(()))
    torch.manual_seed(5)
    taken(DataLoader(Numbers(), batch_size=3, shuffle=True), 2, 5)
    assert float(torch.rand(())) == wanted


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Shuffled(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(10).tolist())


@pytest.mark.parametrize(
    ("loader", "options", "words"),
    [
        ([1, 2], {}, "must be a torch.utils.data.DataLoader"),
        (DataLoader(Stream()), {}, "map-style"),
        (DataLoader(Numbers(), sampler=Shuffled()), {}, "set_epoch"),
        (DataLoader(Numbers(2), batch_size=3, drop_last=True), {}, "at least one batch"),
        (DataLoader(Numbers()), {"accumulate": 0}, "accumulate"),
    ],
)
def test_what_cannot_be_made_again_is_refused(loader: Any, options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        partita.data.resumable(loader, Standing(), **options)  # type: ignore[arg-type]


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 2 * batch).square().mean()  # type: ignore[no-any-return]


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_an_interrupted_training_goes_on_with_what_it_has_not_seen(tmp_path: Path) -> None:
    def run(folder: Path, num_steps: int) -> tuple[list[float], list[Any]]:
        model, optimizer = build()
        loader = DataLoader(Numbers(12), batch_size=4, shuffle=True)
        settings = Checkpoints(folder, every_steps=1)
        losses = []
        with partita.parallelize(
            model, optimizer, loss_fn, next(iter(loader)), plan=PLAN, checkpoints=settings
        ) as step:
            for batch in partita.data.resumable(loader, step, num_steps=num_steps):
                losses.append(step(batch).loss)
        return losses, [value.tolist() for value in model.parameters()]

    torch.manual_seed(1)
    whole, weights = run(tmp_path / "whole", 9)
    torch.manual_seed(1)
    first, _ = run(tmp_path / "parts", 4)
    torch.manual_seed(8)
    second, found = run(tmp_path / "parts", 9)
    assert first + second == whole and found == weights
