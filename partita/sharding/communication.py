"""Communication ops: markers that stand for an exchange along one mesh axis in a worker's local graph.

`sharding` inserts them as `call_function` nodes with these functions as targets and keyword arguments only; `program`
turns each into an instruction. They are never called. All take and give local values; ``node.meta["val"]`` is the local
FakeTensor of the result.

* ``all_reduce(value, *, axis)``: Partial -> Replicate (sum).
* ``reduce_scatter(value, *, axis, dim, sizes)``: Partial -> Shard(dim, sizes).
* ``all_gather(value, *, axis, dim, sizes)``: Shard(dim, sizes) -> Replicate.
* ``all_to_all(value, *, axis, dim, sizes, new_dim, new_sizes)``: Shard(dim, sizes) -> Shard(new_dim, new_sizes).
* ``halo_exchange(value, *, axis, dim, sizes, starts, ends)``: Shard(dim, sizes) -> entries ``starts[i] .. ends[i]`` of
  ``dim`` on worker ``i``, all inside of the tensor. Neighbours send each other slices.
* ``halo_sum(value, *, axis, dim, starts, ends, sizes)``: the transpose: summands of the entries ``starts[i] ..
  ends[i]`` -> Shard(dim, sizes). Each worker sends what it has of others' rows to their owners, who add it up.

Conversions that need no exchange are ordinary local ops: Replicate -> Shard is `aten.slice`, Replicate -> Partial keeps
the value on coordinate 0 and zeros elsewhere.
"""

from __future__ import annotations

from typing import NoReturn

import torch


def _marker(name: str) -> NoReturn:
    raise AssertionError(f"{name} marks an exchange in a graph; it is lowered to an instruction and never called")


def all_reduce(value: torch.Tensor, *, axis: str) -> torch.Tensor:
    _marker("all_reduce")


def reduce_scatter(value: torch.Tensor, *, axis: str, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    _marker("reduce_scatter")


def all_gather(value: torch.Tensor, *, axis: str, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    _marker("all_gather")


def all_to_all(
    value: torch.Tensor, *, axis: str, dim: int, sizes: tuple[int, ...], new_dim: int, new_sizes: tuple[int, ...]
) -> torch.Tensor:
    _marker("all_to_all")


def halo_exchange(
    value: torch.Tensor,
    *,
    axis: str,
    dim: int,
    sizes: tuple[int, ...],
    starts: tuple[int, ...],
    ends: tuple[int, ...],
) -> torch.Tensor:
    _marker("halo_exchange")


def halo_sum(
    value: torch.Tensor,
    *,
    axis: str,
    dim: int,
    starts: tuple[int, ...],
    ends: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    _marker("halo_sum")


COMMUNICATION_OPS = frozenset({all_reduce, reduce_scatter, all_gather, all_to_all, halo_exchange, halo_sum})
