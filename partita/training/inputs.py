"""What a step is called with: the batch's structure and shapes, checked before anything runs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from partita.errors import InputError

Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class BatchKey:
    """Everything of a batch that a captured graph depends on: structure, shapes, dtypes and the values of leaves that
    are no tensors."""

    spec: pytree.TreeSpec
    shapes: tuple[Shape | None, ...]
    static: str

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.shapes, self.static))


@dataclass(frozen=True)
class BatchLeaves:
    """A batch taken apart. `rows` is the extent of dim 0 that most of its tensors share (0: none has dims);
    `offsets` gives the first row of leaves that hold only some rows of the global batch."""

    key: BatchKey
    tensors: Mapping[int, torch.Tensor]
    rows: int
    offsets: Mapping[int, int] = field(default_factory=dict)


class TakenApart:
    """Takes batches apart, one after the other. Most are like the one before: then its key holds for them as well."""

    def __init__(self) -> None:
        self._last: BatchLeaves | None = None
        self._container: type | None = None  # of the last batch, if it holds nothing but tensors
        self._names: list[Any] = []  # if it is a dictionary

    def __call__(self, batch: Any) -> BatchLeaves:
        """As `take_apart`."""
        last = self._last
        if last is not None and type(batch) is self._container:
            names, leaves = _flat(batch)
            if names == self._names and _are_like(leaves, last.key.shapes):
                return BatchLeaves(last.key, dict(enumerate(leaves)), last.rows)
        self._last = found = take_apart(batch)
        names, leaves = _flat(batch) if type(batch) in (tuple, list, dict) else ([], ())
        is_flat = len(leaves) == len(found.tensors) and all(map(operator.is_, leaves, found.tensors.values()))
        self._container, self._names = type(batch) if is_flat else None, names
        return found


def _flat(batch: Any) -> tuple[list[Any], Sequence[Any]]:
    """Names and entries of a container."""
    return (list(batch), list(batch.values())) if isinstance(batch, dict) else ([], batch)


def _are_like(leaves: Sequence[Any], shapes: Sequence[Shape | None]) -> bool:
    return len(leaves) == len(shapes) and all(
        type(leaf) is torch.Tensor and shape is not None and leaf.shape == shape[0] and leaf.dtype is shape[1]
        for leaf, shape in zip(leaves, shapes, strict=True)
    )


def take_apart(batch: Any) -> BatchLeaves:
    """The tensor leaves of a batch by their index among all leaves.

    Raises:
        InputError: no tensor, or a tensor without rows.
    """
    leaves, spec = pytree.tree_flatten(batch)
    tensors = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    if not tensors:
        raise InputError(f"the batch must hold at least one tensor, but got {type(batch).__name__} without any")
    extents = [tensor.shape[0] for tensor in tensors.values() if tensor.dim() > 0]
    if 0 in extents:
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        raise InputError(f"every tensor of the batch must have at least one row, but got {shapes}; skip empty batches")
    shapes_of = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else None for leaf in leaves)
    static = repr([leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)])
    rows = max(extents, key=extents.count) if extents else 0
    return BatchLeaves(BatchKey(spec, shapes_of, static), tensors, rows)


def check_structure(key: BatchKey, first: BatchKey) -> None:
    """Every batch must have the structure, ranks and dtypes of the first one.

    Raises:
        InputError: says what differs.
    """
    if key.spec != first.spec:
        raise InputError(
            f"every batch must have the structure of the first one, {first.spec}, but got {key.spec}; "
            "use another `parallelize` for another kind of batch"
        )
    for index, (now, then) in enumerate(zip(key.shapes, first.shapes, strict=True)):
        kind = None if now is None else (len(now[0]), now[1])
        expected = None if then is None else (len(then[0]), then[1])
        if kind != expected:
            raise InputError(
                f"leaf {index} of every batch must have (dims, dtype) = {expected} as in the first one, but got {kind}"
            )


def cut_rows(batch: Any, num_rows: int, start: int, end: int) -> Any:
    """Rows ``start:end`` of a batch of `num_rows` rows; leaves that have other rows stay whole."""

    def cut(leaf: Any) -> Any:
        has_rows = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == num_rows
        return leaf[start:end] if has_rows else leaf

    return pytree.tree_map(cut, batch)
