"""`sharded`: a loader that reads only the rows of each global batch that this process' workers need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from partita.training.arguments import check_loading
from partita.training.inputs import BatchLeaves, take_apart

if TYPE_CHECKING:
    from partita.training.step import Step


@dataclass(frozen=True)
class ShardedBatch:
    """Rows ``first_row : first_row + rows of batch`` of a global batch of `num_rows` rows."""

    batch: Any
    first_row: int
    num_rows: int


def sharded(loader: Iterable[Any], step: Step) -> Iterator[Any]:
    """Yields what `step` must be called with: of every global batch only the rows that this process needs.

    A `DataLoader` over a map-style dataset with a batch sampler and without worker processes reads only those rows; any
    other loader's batches are read whole and passed on whole. In a job of one process every batch is passed on whole.
    The order of rows and the state of torch's generators are those of ``for batch in loader`` (a dataset that itself
    draws random numbers per row draws fewer of them here: give it a generator of its own).

    Example:
        >>> for batch in partita.data.sharded(loader, step):
        ...     result = step(batch)

    Raises:
        InputError: the loader cannot be iterated, or the step is none of `parallelize`.
    """
    check_loading(loader, step)
    return _sharded(loader, step)


def _sharded(loader: Iterable[Any], step: Step) -> Iterator[Any]:
    if not isinstance(loader, DataLoader) or not _can_select(loader):
        yield from loader
        return
    # A loader over the same samplers and generator: torch itself then draws from its generators what the plain loop
    # draws, so that the order of rows and all later random numbers (dropout) are those of `for batch in loader`.
    selecting: DataLoader[Any] = DataLoader(
        _NeededRows(loader.dataset, step),
        batch_sampler=loader.batch_sampler,
        collate_fn=_CollatePart(loader.collate_fn),
        generator=loader.generator,
        pin_memory=loader.pin_memory,
    )
    for batch, first, num_rows, is_whole in selecting:
        yield batch if is_whole else ShardedBatch(batch, first, num_rows)


@dataclass(frozen=True)
class _Part:
    items: list[Any]
    first_row: int
    num_rows: int


class _NeededRows(Dataset[Any]):
    """Reads of every global batch the rows that this process needs."""

    def __init__(self, dataset: Any, step: Step) -> None:
        self._dataset, self._step = dataset, step

    def __getitems__(self, indices: Sequence[Any]) -> _Part:
        first, last = self._step.rows_needed(len(indices))
        chosen = list(indices[first:last])
        read_many = getattr(self._dataset, "__getitems__", None)  # as torch's own fetcher does
        items = read_many(chosen) if read_many else [self._dataset[index] for index in chosen]
        return _Part(items, first, len(indices))


@dataclass(frozen=True)
class _CollatePart:
    collate: Callable[[list[Any]], Any]

    def __call__(self, part: Any) -> tuple[Any, int, int, bool]:
        return self.collate(part.items), part.first_row, part.num_rows, len(part.items) == part.num_rows


def _can_select(loader: DataLoader[Any]) -> bool:
    return (
        loader.batch_sampler is not None and loader.num_workers == 0 and not isinstance(loader.dataset, IterableDataset)
    )


def whole_shape(part: ShardedBatch) -> tuple[Any, BatchLeaves]:
    """The global batch's shape (a batch on the `meta` device) and the leaves that are here, keyed by that shape."""
    here = take_apart(part.batch)

    def grow(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == here.rows:
            return torch.empty((part.num_rows, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")
        return leaf

    whole = pytree.tree_map(grow, part.batch)
    return whole, BatchLeaves(take_apart(whole).key, here.tensors, part.num_rows, _offsets(part, here))


def _offsets(part: ShardedBatch, here: BatchLeaves) -> dict[int, int]:
    return {
        index: part.first_row
        for index, tensor in here.tensors.items()
        if tensor.dim() > 0 and tensor.shape[0] == here.rows
    }
