"""Placements: how one tensor lies over the workers along one mesh axis.

A placement here is exact to the row: `Shard` carries the extent of every worker's piece, so uneven shards are nothing
special. With ``n`` workers on the axis:

* `Replicate()`: every worker has the whole tensor.
* `Shard(dim, sizes)`: worker ``i`` has ``sizes[i]`` consecutive entries of dim ``dim``; ``sum(sizes)`` is the whole extent.
* `Partial()`: every worker has a tensor of the whole shape; the value is their sum.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replicate:
    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Shard:
    dim: int
    sizes: tuple[int, ...]

    def offset(self, coordinate: int) -> int:
        """Index of the first entry that worker ``coordinate`` has."""
        return sum(self.sizes[:coordinate])

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True)
class Partial:
    def __str__(self) -> str:
        return "P"


Placement = Replicate | Shard | Partial
