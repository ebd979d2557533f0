"""Families of ways to train, and what their pieces cost: all that the bounds and estimates of a search are made of.

A *family* fixes tensor degree t, context degree c, samples b of a micro-batch, and whether blocks end
sequence-parallel. Each piece is priced once: the parts of its passes (device, exchange, host, hidden seconds) are sums
over its items, and recomputation adds one pass to another.

A pass of the layers 1..k takes the layers in order: ``x_i = both(x_{i-1} + D_i, H_1 + .. + H_i)``
(`partita.planner.scale.step`). This is no norm: a chain cut in two may take less time than the chain as a whole, so the
price of the chain says nothing about its cuts. What lies under every order and every cut is the norm of the sums,

    x_k >= both(sum D_i, sum H_i)        since both() is monotone and x_{k-1} >= D_1 + .. + D_{k-1}
    sum over chunks of both(D_c, H_c) >= both(sum D_c, sum H_c)        (triangle inequality)

and `Least` holds these sums. Only where the chain is not cut at all its price in order is a bound as well.

On mixed clusters a chain is bounded by an ideal device: each part the least over all pairs of one kind's processor and
another's links. Estimates are those of the kind with the highest peak.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from partita.cost.calibration import Calibration
from partita.cost.kernels import LayerWork
from partita.cost.networks import Fabric, NodeGroup
from partita.planner.scale.rates import ideal_groups
from partita.planner.scale.step import Degrees, Remat, _Pass, _Place, _places, _price

REMATS: tuple[Remat, ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Least:
    """Seconds that one pass takes at the least.

    Attributes:
        cut_s: busy device and host, of all chunks together, wherever the chain is cut.
        whole_s: the same of the chain in one chunk.
        block_s: of a block that is in each part the least of all blocks: k blocks of a chunk take at least k times as
            long, whichever they are.
        hidden_s, block_hidden_s: exchanges beside the chain, and beside a block.
    """

    cut_s: float
    whole_s: float
    block_s: float
    hidden_s: float
    block_hidden_s: float


@dataclass(frozen=True, kw_only=True)
class RematTimes:
    """Seconds of one micro-batch with one kind of recomputation.

    Attributes:
        pieces_s: forward and backward pass of each piece of the chain's alphabet, alone, on the fastest kind.
        total_s: of the chain priced as a whole on the fastest kind.
        forward, backward: what passes take at least on the ideal device.
    """

    pieces_s: tuple[float, ...]
    total_s: float
    forward: Least
    backward: Least


@dataclass(frozen=True, kw_only=True)
class Family:
    """Prices of one family.

    Attributes:
        works: of each piece; ``counts`` says how often it occurs in the chain, ``is_gap`` whether it is no block.
        times: by kind of recomputation.
        send_bytes, least_send_bytes: most and least that pass between two neighbours in the chain.
    """

    tensor: int
    context: int
    micro_batch: int
    sequence_parallel: bool
    works: tuple[LayerWork, ...]
    counts: tuple[int, ...]
    is_gap: tuple[bool, ...]
    times: dict[Remat, RematTimes]
    send_bytes: float
    least_send_bytes: float

    @property
    def num_blocks(self) -> int:
        return sum(count for count, gap in zip(self.counts, self.is_gap, strict=True) if not gap)

    @property
    def num_gaps(self) -> int:
        return sum(count for count, gap in zip(self.counts, self.is_gap, strict=True) if gap)


def price_family(
    *,
    degrees: Degrees,
    micro_batch: int,
    sequence_parallel: bool,
    works: tuple[LayerWork, ...],
    chain: Sequence[int],
    is_gap: tuple[bool, ...],
    fabric: Fabric,
    calibration: Calibration,
) -> Family:
    """The family's pieces on every kind of the fabric, with no data or pipeline axis."""
    counts = tuple(chain.count(index) for index in range(len(works)))
    kinds = sorted(fabric.groups, key=peak, reverse=True)
    places = [_places(Fabric(groups=(group,)), degrees, 0, calibration)[0] for group in kinds]
    fastest = _passes(works, places[0])
    ideal = fastest
    if kinds[1:]:
        links = [_places(alone, degrees, 0, calibration)[0].channels for alone in ideal_groups(fabric)]
        found = [_passes(works, replace(place, channels=own)) for place in places for own in links]
        ideal = [tuple(map(_least, zip(*same, strict=True))) for same in zip(*found, strict=True)]
    overlap = calibration.of(kinds[0].kind.generation).overlap
    after = [works[index].boundary_bytes for index in dict.fromkeys(chain[1:])]
    return Family(
        tensor=degrees.tensor,
        context=degrees.context,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        works=works,
        counts=counts,
        is_gap=is_gap,
        times={remat: _times(works, chain, is_gap, fastest, ideal, overlap, remat) for remat in REMATS},
        send_bytes=max(after, default=0.0),
        least_send_bytes=min(after, default=0.0),
    )


_Passes = tuple[_Pass, ...]  # forward, backward, what selective recomputation runs again


def _passes(works: Sequence[LayerWork], place: _Place) -> list[_Passes]:
    return [tuple(_price(items, place, False) for items in (w.forward, w.backward, w.selective)) for w in works]


def _least(passes: Sequence[_Pass]) -> _Pass:
    """Each part at its best."""
    return _joined(passes, min)


def _sum(passes: Sequence[_Pass]) -> _Pass:
    """All of them as one layer."""
    return _joined(passes, sum)


def _joined(passes: Sequence[_Pass], join: Callable[[Iterable[float]], float]) -> _Pass:
    return _Pass(
        device_s=join(one.device_s for one in passes),
        exchange_s=join(one.exchange_s for one in passes),
        host_s=join(one.host_s for one in passes),
        hidden_s=join(one.hidden_s for one in passes),
    )


def _times(
    works: Sequence[LayerWork],
    chain: Sequence[int],
    is_gap: Sequence[bool],
    fastest: Sequence[_Passes],
    ideal: Sequence[_Passes],
    overlap: float,
    remat: Remat,
) -> RematTimes:
    quick = _with_remat(works, fastest, remat)
    least = quick if ideal is fastest else _with_remat(works, ideal, remat)
    blocks = [piece for piece in dict.fromkeys(chain) if not is_gap[piece]]
    ways = [list(chain), list(chain)[::-1]]  # forward, backward
    return RematTimes(
        pieces_s=tuple(sum(one.times(1).total_s(overlap) for one in pair) for pair in zip(*quick, strict=True)),
        total_s=sum(_in_order(passes, way).total_s(overlap) for passes, way in zip(quick, ways, strict=True)),
        forward=_bounds(least[0], ways[0], blocks),
        backward=_bounds(least[1], ways[1], blocks),
    )


def _with_remat(works: Sequence[LayerWork], passes: Sequence[_Passes], remat: Remat) -> tuple[list[_Pass], list[_Pass]]:
    """Forward and backward passes of all pieces, with what recomputation adds."""
    ahead, back = [], []
    for work, (forward, backward, again) in zip(works, passes, strict=True):
        parts = [backward]
        if remat == "full" and work.name != "head":
            parts.append(forward)
        elif remat == "selective":
            parts.append(again)
        ahead.append(forward)
        back.append(_sum(parts))
    return ahead, back


def _in_order(passes: Sequence[_Pass], pieces: Sequence[int]) -> _Pass:
    """The pass of ``pieces``, equal neighbours counted together as a chunk does."""
    found = _Pass()
    for piece, same in itertools.groupby(pieces):
        found.add(passes[piece], len(list(same)))
    return found


def _bounds(passes: Sequence[_Pass], pieces: Sequence[int], blocks: Sequence[int]) -> Least:
    """``pieces`` in the order in which the pass takes them; ``blocks``: the kinds of blocks among them."""
    total = _sum([passes[piece] for piece in pieces])
    block = _least([passes[piece] for piece in blocks]) if blocks else _Pass()
    return Least(
        cut_s=total.times(1).busy_s,
        whole_s=_in_order(passes, pieces).busy_s,
        block_s=block.times(1).busy_s,
        hidden_s=total.hidden_s,
        block_hidden_s=block.hidden_s,
    )


def machines_of(fabric: Fabric) -> tuple[object, ...]:
    """What prices inside a machine depend on."""
    return tuple(dict.fromkeys((g.kind.gpu.name, g.gpus_per_machine, g.link, g.network) for g in fabric.groups))


def peak(group: NodeGroup) -> float:
    """FLOP/s of the kind in the two-byte type, or of its best."""
    rates = group.kind.gpu.flops_per_s
    return rates.get("bfloat16") or rates.get("float16") or max(rates.values())
