"""The training part and the judged part of the data: what they may be, and batches of them.

A part is a tuple, list or dictionary of tensors with as many rows each, a map-style `Dataset`, a `DataLoader`, or
anything else that gives batches anew whenever it is iterated over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from partita.arguments import told
from partita.errors import InputError
from partita.training.positions import resumable

if TYPE_CHECKING:
    from partita.training.step import Step

CAPTURED_ROWS = 4  # of the batch by which a network is captured
JUDGED_ROWS = 1024  # of a batch that is judged, where the part itself has no batches
_FORM = (
    "data must be (training part, judged part), or a function that returns them; a part is a tuple, list or dictionary "
    "of tensors with equally many rows, a Dataset, a DataLoader, or another iterable of batches"
)


class Rows(Dataset[Any]):
    """Tensors as a dataset whose batches are taken out at once, not row by row."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(_leaves(self._tensors)[0])

    def __getitem__(self, index: int) -> Any:
        return self._taken(index)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._taken(torch.as_tensor(indices))

    def _taken(self, where: Any) -> Any:
        if isinstance(self._tensors, dict):
            return {name: tensor[where] for name, tensor in self._tensors.items()}
        return type(self._tensors)(tensor[where] for tensor in self._tensors)


def check_parts(data: Any) -> None:
    """Raises InputError unless these are two parts."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise InputError(f"{_FORM}, but got {told(data)}")
    for name, part in zip(("training", "judged"), data, strict=True):
        _check_part(part, name)


def _check_part(part: Any, name: str) -> None:
    if isinstance(part, torch.Tensor):
        raise InputError(f"{_FORM}, but the {name} part is a single tensor: pass (inputs, targets), or (tensor,)")
    if is_tensors(part):
        rows = {len(tensor) if tensor.dim() else 0 for tensor in _leaves(part)}
        if len(rows) > 1 or 0 in rows:
            shapes = [tuple(tensor.shape) for tensor in _leaves(part)]
            raise InputError(f"{_FORM}, but the tensors of the {name} part have shapes {shapes}")
        return
    if isinstance(part, Iterator):
        raise InputError(f"{_FORM}, but the {name} part can be iterated over only once: pass what makes it anew")
    if not _is_dataset(part) and not isinstance(part, Iterable):
        raise InputError(f"{_FORM}, but the {name} part is {told(part)}")


def num_rows(part: Any) -> int | None:
    """How many rows the training part has; None: it has batches of its own."""
    if is_tensors(part):
        return len(_leaves(part)[0])
    return len(part) if _is_dataset(part) else None


def first_batch(part: Any, batch_size: int) -> Any:
    """A batch of the usual shape, which is not trained on."""
    return next(iter(_loader(part, batch_size)))


def endless(part: Any, batch_size: int, step: Step, seed: int) -> Iterator[Any]:
    """Batches from where the step stands, epoch after epoch, each in an order of its own that a restart does not
    change; an iterable other than a `DataLoader` begins anew."""
    loader = _loader(part, batch_size)
    if isinstance(loader, DataLoader):
        return resumable(loader, step, seed=seed)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def judged_batches(part: Any) -> Iterable[Any]:
    """The judged part in batches, in its own order."""
    if is_tensors(part):
        return DataLoader(Rows(part), batch_size=JUDGED_ROWS, collate_fn=_as_it_is)
    return DataLoader(part, batch_size=JUDGED_ROWS) if _is_dataset(part) else part


def _loader(part: Any, batch_size: int) -> Iterable[Any]:
    if is_tensors(part):
        return DataLoader(Rows(part), batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=_as_it_is)
    if _is_dataset(part):
        return DataLoader(part, batch_size=batch_size, shuffle=True, drop_last=True)
    return part  # type: ignore[no-any-return]


def _as_it_is(batch: Any) -> Any:
    return batch


def is_tensors(part: Any) -> bool:
    """Whether a part is tensors."""
    leaves = list(part.values()) if isinstance(part, dict) else part
    return type(leaves) in (tuple, list) and bool(leaves) and all(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _leaves(part: Any) -> list[torch.Tensor]:
    return list(part.values()) if isinstance(part, dict) else list(part)


def _is_dataset(part: Any) -> bool:
    return isinstance(part, Dataset) and hasattr(part, "__len__") and hasattr(part, "__getitem__")
