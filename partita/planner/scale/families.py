"""Families of ways to train, and what their pieces cost: all that the bounds and estimates of a search are made of.

A *family* fixes tensor degree t, context degree c, samples b of a micro-batch, and whether blocks end
sequence-parallel. Each piece is priced once: the parts of its passes (device, exchange, host, hidden seconds) are sums
over its items, and recomputation adds one pass to another. A pass takes a norm of its parts (`partita.planner.scale
.step`), so times of pieces add up to no less than the time of the whole chain: ``sum w_s >= W`` for every cut.

On mixed clusters a chain is bounded by an ideal device, for each part the best of all kinds; estimates are those of
the kind with the highest peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.cost.calibration import Calibration
from partita.cost.kernels import LayerWork
from partita.cost.networks import Fabric, NodeGroup
from partita.planner.scale.step import Degrees, Remat, _Pass, _places, _price

REMATS: tuple[Remat, ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class RematTimes:
    """Seconds of one micro-batch with one kind of recomputation.

    Attributes:
        pieces_s: forward and backward pass of each piece of the chain's alphabet, on the fastest kind.
        total_s: of the chain priced as a whole.
        least_total_s: the same on the ideal device.
        least_block_s, least_forward_s: both passes, and the forward pass, of a block that is in each part of its time
            the least of all blocks: k blocks of a chunk take at least k times as long, whichever they are.
        most_backward_s: backward passes of all pieces of the chain, one after the other, on the slowest kind.
    """

    pieces_s: tuple[float, ...]
    total_s: float
    least_total_s: float
    least_block_s: float
    least_forward_s: float
    most_backward_s: float


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
    found = [_passes(works, Fabric(groups=(group,)), degrees, calibration) for group in kinds]
    overlaps = [calibration.of(group.kind.generation).overlap for group in kinds]
    ideal = (
        [tuple(map(_least, zip(*same, strict=True))) for same in zip(*found, strict=True)] if kinds[1:] else found[0]
    )
    after = [works[index].boundary_bytes for index in dict.fromkeys(chain[1:])]
    return Family(
        tensor=degrees.tensor,
        context=degrees.context,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        works=works,
        counts=counts,
        is_gap=is_gap,
        times={remat: _times(works, counts, is_gap, found, ideal, overlaps, remat) for remat in REMATS},
        send_bytes=max(after, default=0.0),
        least_send_bytes=min(after, default=0.0),
    )


_Passes = tuple[_Pass, ...]  # forward, backward, what selective recomputation runs again


def _passes(works: Sequence[LayerWork], fabric: Fabric, degrees: Degrees, calibration: Calibration) -> list[_Passes]:
    place = _places(fabric, degrees, 0, calibration)[0]
    return [tuple(_price(items, place, False) for items in (w.forward, w.backward, w.selective)) for w in works]


def _least(passes: Sequence[_Pass]) -> _Pass:
    """Each part at its best."""
    return _Pass(
        device_s=min(one.device_s for one in passes),
        exchange_s=min(one.exchange_s for one in passes),
        host_s=min(one.host_s for one in passes),
        hidden_s=min(one.hidden_s for one in passes),
    )


def _times(
    works: Sequence[LayerWork],
    counts: Sequence[int],
    is_gap: Sequence[bool],
    found: Sequence[Sequence[_Passes]],
    ideal: Sequence[_Passes],
    overlaps: Sequence[float],
    remat: Remat,
) -> RematTimes:
    fastest = [_with(work, one, remat) for work, one in zip(works, found[0], strict=True)]
    least = [_with(work, one, remat) for work, one in zip(works, ideal, strict=True)] if len(found) > 1 else fastest
    first, most = overlaps[0], max(overlaps)
    backwards = [
        [_with(work, one, remat)[1].total_s(overlap) for work, one in zip(works, passes, strict=True)]
        for passes, overlap in zip(found, overlaps, strict=True)
    ]
    blocks = [one for one, count, gap in zip(least, counts, is_gap, strict=True) if count and not gap]
    ahead_s, back_s = (_least(passes).total_s(most) for passes in zip(*blocks, strict=True)) if blocks else (0.0, 0.0)
    return RematTimes(
        pieces_s=tuple(ahead.total_s(first) + back.total_s(first) for ahead, back in fastest),
        total_s=_total_s(fastest, counts, first),
        least_total_s=_total_s(least, counts, most),
        least_block_s=ahead_s + back_s,
        least_forward_s=ahead_s,
        most_backward_s=sum(
            count * max(times) for count, times in zip(counts, zip(*backwards, strict=True), strict=True)
        ),
    )


def _with(work: LayerWork, passes: _Passes, remat: Remat) -> tuple[_Pass, _Pass]:
    """Forward and backward pass with recomputation."""
    forward, backward, again = passes
    added = forward if remat == "full" and work.name != "head" else again if remat == "selective" else None
    if added is None:
        return forward, backward
    both = _Pass()
    both.add(backward)
    both.add(added)
    return forward, both


def _total_s(passes: Sequence[tuple[_Pass, _Pass]], counts: Sequence[int], overlap: float) -> float:
    ahead, back = _Pass(), _Pass()
    for (forward, backward), count in zip(passes, counts, strict=True):
        ahead.add(forward, count)
        back.add(backward, count)
    return ahead.total_s(overlap) + back.total_s(overlap)


def machines_of(fabric: Fabric) -> tuple[object, ...]:
    """What prices inside a machine depend on."""
    return tuple(dict.fromkeys((g.kind.gpu.name, g.gpus_per_machine, g.link, g.network) for g in fabric.groups))


def peak(group: NodeGroup) -> float:
    """FLOP/s of the kind in the two-byte type, or of its best."""
    rates = group.kind.gpu.flops_per_s
    return rates.get("bfloat16") or rates.get("float16") or max(rates.values())
