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
"""

from __future__ import annotations

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


Placement = Replicate | Shard | Partial


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
