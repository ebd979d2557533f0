"""`sharded` reads the rows, and draws the random numbers, of the plain loop over the same loader."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from partita.training.loading import ShardedBatch, sharded
from partita.training.step import Step


class _Halves:
    """Stands for the step of one of two processes."""

    def __init__(self, process: int) -> None:
        self._process = process

    def rows_needed(self, num_rows: int) -> tuple[int, int]:
        half = num_rows // 2
        return (0, half) if self._process == 0 else (half, num_rows)


class _ManyAtOnce(Dataset[Any]):
    def __len__(self) -> int:
        return 14

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [torch.tensor([index]) for index in indices]


def _loader(*, shuffle: bool, own_generator: bool, many: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if own_generator else None
    data: Dataset[Any] = _ManyAtOnce() if many else TensorDataset(torch.arange(14).view(14, 1))
    return DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator)


def _rows(batch: Any) -> torch.Tensor:
    return batch[0] if isinstance(batch, list) else batch


def _dropped() -> torch.Tensor:
    return torch.nn.functional.dropout(torch.ones(5), 0.5)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("process", [0, 1])
def test_rows_and_random_numbers_are_those_of_the_plain_loop(
    process: int, shuffle: bool, own_generator: bool, many: bool
) -> None:
    torch.manual_seed(11)
    plain = _loader(shuffle=shuffle, own_generator=own_generator, many=many)
    expected = []
    for _ in range(2):
        for batch in plain:
            mask = _dropped()
            expected.append((_rows(batch), mask, torch.get_rng_state()))
    torch.manual_seed(11)
    loader = _loader(shuffle=shuffle, own_generator=own_generator, many=many)
    step = _Halves(process)
    seen = 0
    for _ in range(2):
        for part in sharded(loader, cast(Step, step)):
            rows, mask, state = expected[seen]
            first, last = step.rows_needed(len(rows))
            if isinstance(part, ShardedBatch):
                assert (part.first_row, part.num_rows) == (first, len(rows))
                part = part.batch
            assert torch.equal(_rows(part), rows[first:last])
            assert torch.equal(_dropped(), mask)
            assert torch.equal(torch.get_rng_state(), state)
            seen += 1
    assert seen == len(expected)
