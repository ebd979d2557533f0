"""The two parts of the data: what they may be, and their batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from partita import InputError
from partita.search.parts import check_parts, endless, first_batch, judged_batches, num_rows


class Standing:
    """Stands in for a step: where it stands, and which rows it needs."""

    num_steps = 0

    def rows_needed(self, num_rows: int) -> tuple[int, int]:
        return 0, num_rows


def rows(count: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count).float()[:, None], torch.arange(count)


def taken(part: Any, size: int, count: int, *, start: int = 0, seed: int = 3) -> list[list[int]]:
    step = Standing()
    step.num_steps = start
    found = []
    for batch in endless(part, size, step, seed):  # type: ignore[arg-type]
        found.append(batch[1].tolist())
        step.num_steps += 1
        if len(found) == count:
            return found
    raise AssertionError("it must be endless")


@pytest.mark.parametrize("part", [rows(), list(rows()), TensorDataset(*rows())], ids=["tuple", "list", "dataset"])
def test_every_epoch_has_each_row_once_in_another_order(part: Any) -> None:
    batches = taken(part, 5, 4)
    first, second = [*batches[0], *batches[1]], [*batches[2], *batches[3]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_restart_goes_on_where_it_stood() -> None:
    whole = taken(rows(), 5, 7)
    assert taken(rows(), 5, 3, start=4) == whole[4:]
    assert taken(rows(), 5, 3, seed=4) != whole[:3]


def test_dictionaries_keep_their_names() -> None:
    part = dict(zip("xy", rows(), strict=True))
    batch = first_batch(part, 4)
    assert set(batch) == {"x", "y"} and batch["x"].shape == (4, 1)
    assert num_rows(part) == 10


def test_loaders_and_iterables_have_batches_of_their_own() -> None:
    loader = DataLoader(TensorDataset(*rows()), batch_size=2)
    assert num_rows(loader) is None
    assert len(first_batch(loader, 64)[1]) == 2
    own = [(torch.zeros(3, 1), torch.zeros(3)), (torch.ones(3, 1), torch.ones(3))]
    assert [batch[0] for batch in taken(own, 64, 5)] == [0, 1, 0, 1, 0]


def test_judged_batches_have_each_row_once() -> None:
    for part in (rows(3000), TensorDataset(*rows(3000)), DataLoader(TensorDataset(*rows(3000)), batch_size=7)):
        assert torch.cat([batch[1] for batch in judged_batches(part)]).tolist() == list(range(3000))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (None, "NoneType|None"),
        ((rows(),), "tuple"),
        (rows(), "single tensor"),
        ((rows(), iter([rows()])), "only once"),
        (((torch.zeros(3), torch.zeros(4)), rows()), "shapes"),
        (((torch.zeros(0, 2), torch.zeros(0)), rows()), "shapes"),
        ((rows(), 5), "judged part is int 5"),
    ],
)
def test_what_is_no_data(wrong: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_parts(wrong)
