"""Placements: how one tensor lies over the workers along one mesh axis.

A placement here is exact to the row: `Shard` carries the extent of every worker's piece, so uneven shards are nothing
special. With ``n`` workers on the axis:

* `Replicate()`: every worker has the whole tensor.
* `Shard(dim, sizes)`: worker ``i`` has ``sizes[i]`` consecutive entries of dim ``dim``; ``sum(sizes)`` is its
  whole extent.
  With ``outer`` runs, dim ``dim`` is taken as ``outer`` runs of equal length, and worker ``i`` has ``sizes[i] / outer``
  consecutive entries of every run. (``[T, B]`` cut along ``B`` and viewed as ``[T*B]`` lies like
  that, with ``outer = T``.)
  Only inside a sharded graph; inputs, outputs and exchanges have ``outer == 1``.
* `Partial()`: every worker has a tensor of the whole shape; the value is their sum.
* `Extremum(kind)`: as `Partial`, but the value is the largest (``"max"``) or smallest (``"min"``) of the workers'
  entries in every place. Only outputs of ops have it; NaN is larger and smaller than all.
* `Windows(dim, starts, ends)`: worker ``i`` has entries ``starts[i] .. ends[i]`` of dim ``dim``. Windows overlap: what
  a worker has beyond its own rows (its *halo*) are copies of its neighbours' rows. Entries outside of the tensor are
  ``fill`` (padding). Only inputs of ops have it: a stencil reads it.
* `WindowSums(dim, starts, ends, sizes)`: the transpose of it: worker ``i`` has summands of the entries
  ``starts[i] .. ends[i]``, and the value is the sum where windows overlap; what lies outside of the tensor does not
  count. ``sizes`` are the extents of the shards that the workers would own. Only outputs of ops have it.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from partita.errors import InputError


@dataclass(frozen=True)
class Replicate:
    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Shard:
    dim: int
    sizes: tuple[int, ...]
    outer: int = 1

    def offset(self, coordinate: int) -> int:
        """Index of the first entry that worker ``coordinate`` has."""
        return sum(self.sizes[:coordinate]) // self.outer

    @property
    def run(self) -> Shard:
        """The same cut on the tensor in which dim ``dim`` is split into ``(outer, run length)``: an ordinary one."""
        if self.outer == 1:
            return self
        return Shard(self.dim + 1, tuple(extent // self.outer for extent in self.sizes))

    def __str__(self) -> str:
        return f"S({self.dim})" if self.outer == 1 else f"S({self.dim} in {self.outer} runs)"


@dataclass(frozen=True)
class Partial:
    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True)
class Extremum:
    kind: str

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Windows:
    dim: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    fill: float = 0.0

    def is_cut_like(self, shard: Shard) -> bool:
        """Whether every worker's window is just what it has of ``shard``."""
        ends = tuple(itertools.accumulate(shard.sizes))
        return self.dim == shard.dim and self.ends == ends and self.starts == (0, *ends[:-1]) and shard.outer == 1

    def __str__(self) -> str:
        return f"W({self.dim})"


@dataclass(frozen=True)
class WindowSums:
    dim: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def owned(self) -> Shard:
        """What the workers have once each window's halo is added to its owner's rows."""
        return Shard(self.dim, self.sizes)

    def __str__(self) -> str:
        return f"WP({self.dim})"


Placement = Replicate | Shard | Partial | Extremum | Windows | WindowSums


def local_shape(shape: tuple[int, ...], placement: Placement, coordinate: int) -> tuple[int, ...]:
    """Shape of what worker ``coordinate`` has of a value of ``shape``.

    Example:
        >>> local_shape((7, 5), Shard(0, (4, 3)), 1)
        (3, 5)
    """
    if isinstance(placement, Shard):
        extent = placement.sizes[coordinate]
    elif isinstance(placement, (Windows, WindowSums)):
        extent = placement.ends[coordinate] - placement.starts[coordinate]
    else:
        return shape
    return (*shape[: placement.dim], extent, *shape[placement.dim + 1 :])


def dim_of(text: str) -> int | None:
    """The dim of a placement's text: ``"S(1)" -> 1``, ``"R" -> None``.

    Raises:
        InputError: the text is no placement of an input.
    """
    if text == "R":
        return None
    match = re.fullmatch(r"S\((\d+)\)", text)
    if match is None:
        raise InputError(f'the placement of an input must be "R" or "S(dim)" such as "S(0)", but got {text!r}.')
    return int(match.group(1))
