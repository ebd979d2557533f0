"""`resumable`: a loader's batches from where a training step stands, in an order that a restart does not change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from partita.arguments import check_count, told
from partita.errors import InputError
from partita.training.arguments import check_loading

if TYPE_CHECKING:
    from partita.training.step import Step


def resumable(
    loader: DataLoader[Any], step: Step, *, num_steps: int | None = None, accumulate: int = 1, seed: int = 0
) -> Iterator[Any]:
    """Yields what `step` must be called with, epoch after epoch, from the batch on that its `num_steps` says.

    The order of an epoch follows from the seed and the epoch's number alone, so that training that was interrupted goes
    on with the batches that it had not seen: none is left out and none comes twice. Batches that were seen are not
    read. Where `num_steps` jumps, as when a process joins others, the next batch is that of the step.

    Args:
        loader: over a map-style dataset, shuffled or not; or with a sampler that has `set_epoch`.
        step: what `parallelize` returned.
        num_steps: ends after so many steps; None: never.
        accumulate: batches of a step, all but the last of which are passed with ``update=False``.
        seed: of the order.

    Raises:
        InputError: the loader's order cannot be made again.

    Example:
        >>> for batch in partita.data.resumable(loader, step, num_steps=10_000):
        ...     result = step(batch)
    """
    check_loading(loader, step)
    is_known = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not is_known or loader.batch_sampler is None:
        raise InputError(
            f"loader must be a torch.utils.data.DataLoader of batches over a map-style dataset, but got "
            f"{told(loader)}. Save and load the position of other loaders yourself: Checkpoints(also={{...}})"
        )
    check_count(accumulate, "accumulate")
    order = _Order(loader, seed)
    if not order.length:
        raise InputError("loader must have at least one batch, but has none; is drop_last too strict?")
    return _batches(order, step, num_steps, accumulate)


def _batches(order: _Order, step: Step, num_steps: int | None, accumulate: int) -> Iterator[Any]:
    reader: Iterator[Any] = iter(())
    due = -1  # number of the batch that the reader gives next
    while num_steps is None or step.num_steps < num_steps:
        first = step.num_steps * accumulate
        for number in range(first, first + accumulate):
            if number != due or number % order.length == 0:
                reader = order.reader(*divmod(number, order.length))
            due = number + 1
            yield next(reader)
            if step.num_steps * accumulate not in (first, first + accumulate):
                break  # others have gone on without this process


class _Order:
    """A loader whose epochs can be read from any batch on."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader, self._seed = loader, seed
        self._generator = torch.Generator()
        sampler: Any = loader.sampler
        self._batch_sampler: Any = loader.batch_sampler
        if type(sampler) is RandomSampler and type(self._batch_sampler) is BatchSampler:
            own = RandomSampler(
                sampler.data_source,
                replacement=sampler.replacement,
                num_samples=sampler.num_samples,
                generator=self._generator,
            )
            batches = self._batch_sampler
            self._batch_sampler = BatchSampler(own, batches.batch_size, batches.drop_last)
        self._epochs = next((one for one in (self._batch_sampler, sampler) if hasattr(one, "set_epoch")), None)
        is_known = self._batch_sampler is not loader.batch_sampler or type(sampler) is SequentialSampler
        if self._epochs is None and not is_known:
            raise InputError(
                f"the loader's sampler must be torch's own or have set_epoch, so that its order can be made again, but "
                f"it is {told(sampler)}. Give it a method set_epoch(number) from which its order follows"
            )
        self.length = len(loader)

    def reader(self, epoch: int, position: int) -> Iterator[Any]:
        """The batches of an epoch from one on."""
        self._generator.manual_seed(self._seed * 1_000_003 + epoch)
        if self._epochs is not None:
            self._epochs.set_epoch(epoch)
        loader = self._loader
        rest: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=list(itertools.islice(iter(self._batch_sampler), position, None)),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=self._generator,  # so that torch's own, which dropout draws from, is left alone
        )
        return iter(rest)
