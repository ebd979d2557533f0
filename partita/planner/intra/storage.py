"""How an input of a graph can be stored on a mesh: the choices that come out as replication, data loading and ZeRO.

A trained parameter w with gradient g is stored in some placement W, and updated in some placement U at least as cut:

    U = W                       whole along some axes (plain data parallelism), cut along others (tensor parallelism;
                                ZeRO-3 and fully sharded data parallelism where the ops gather w)
    U = W, R -> S(d) on axes    ZeRO-1 and 2: every worker updates its piece, then w is gathered

g is wanted in U (ZeRO-2: a reduce-scatter right away), held until the update. With several microbatches g may also be
summed up as each worker has it (Partial along the axes where W is whole) and reduced once (U = W: plain data
parallelism with accumulation; U cut: ZeRO-1).

    fixed bytes    = w in W + optimizer state in U
    returned bytes = g as it is held
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from partita.planner.intra.exchanges import Exchanges
from partita.planner.intra.ways import MeshPlacement, Ways, plain_placements, share_of
from partita.sharding.calls import TensorSpec
from partita.sharding.placement import Replicate, Shard
from partita.sharding.rules import PARTIAL


@dataclass(frozen=True)
class Storage:
    """One way of storing an input; figures as in `partita.planner.intra.problem.InputChoice`."""

    stored: MeshPlacement
    returned: MeshPlacement | None
    updated: MeshPlacement
    fixed_bytes: int
    returned_bytes: int
    update_s: float
    gather_s: float
    reduce_s: float


def storages(
    spec: TensorSpec,
    ways: Ways,
    exchanges: Exchanges,
    *,
    trained: bool,
    state_bytes_per_element: float,
    update_time_s: Callable[[int], float],
    num_microbatches: int,
) -> list[Storage]:
    """All ways of storing a parameter (or, without ``trained``, any tensor that only is read)."""
    found = []
    for stored in plain_placements(spec, ways.sizes, ways):
        size = round(spec.num_bytes * share_of(stored))
        if not trained:
            found.append(Storage(stored, None, stored, size, 0, 0.0, 0.0, 0.0))
            continue
        for updated in _updated(stored, spec, ways):
            pieces = round(spec.num_elements * share_of(updated))
            fixed = size + round(pieces * state_bytes_per_element)
            gather_s = exchanges.price(spec.num_bytes, updated, stored).time_s
            for returned in _returned(stored, updated, num_microbatches):
                held = round(spec.num_bytes * share_of(returned))
                reduce_s = exchanges.price(spec.num_bytes, returned, updated).time_s
                found.append(Storage(stored, returned, updated, fixed, held, update_time_s(pieces), gather_s, reduce_s))
    return found


def _updated(stored: MeshPlacement, spec: TensorSpec, ways: Ways) -> list[MeshPlacement]:
    """``stored``, and ``stored`` cut along all axes where it is whole, or along one of them."""
    free = [axis for axis, item in enumerate(stored) if isinstance(item, Replicate)]
    found = {stored: None}
    for axes in [*([axis] for axis in free), free]:
        cut = _cut_further(stored, spec, ways, axes)
        if cut is not None:
            found[cut] = None
    return list(found)


def _cut_further(stored: MeshPlacement, spec: TensorSpec, ways: Ways, axes: Sequence[int]) -> MeshPlacement | None:
    """``stored`` with the first dim that is long enough cut along ``axes``; None if there is none.

    An axis cuts inside the cuts of the axes before it, so a dim that a later axis cuts is left alone.
    """
    result = list(stored)
    for axis in axes:
        taken = {item.dim for item in result[axis + 1 :] if isinstance(item, Shard)}
        shape = list(spec.shape)
        for item in result[:axis]:
            if isinstance(item, Shard):
                shape[item.dim] = max(item.sizes)
        size = ways.sizes[axis]
        dims = [dim for dim, extent in enumerate(shape) if extent >= size and extent % size == 0 and dim not in taken]
        if not dims:
            return None
        result[axis] = Shard(dims[0], ways.split(shape[dims[0]], size))
    return tuple(result)


def _returned(stored: MeshPlacement, updated: MeshPlacement, num_microbatches: int) -> list[MeshPlacement]:
    summed = tuple(PARTIAL if isinstance(item, Replicate) else item for item in stored)
    return [updated] if num_microbatches == 1 or summed == stored else [updated, summed]
