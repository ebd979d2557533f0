"""Ways of running calls on several axes: consistent with the rules, exact when run on real tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.planner.intra.exchanges import Exchanges, is_considered
from partita.planner.intra.storage import storages
from partita.planner.intra.ways import MeshPlacement, Ways, plain_placements, share_of
from partita.sharding.calls import OpCall, Slot, TensorSpec, fill_slots
from partita.sharding.placement import Partial, Placement, Replicate, Shard
from partita.sharding.rules import PARTIAL, REPLICATE

aten = torch.ops.aten


def call_of(target: Any, *args: Any) -> tuple[OpCall, list[torch.Tensor]]:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    slots = iter(range(len(tensors)))
    filled = tuple(Slot(next(slots)) if isinstance(arg, torch.Tensor) else arg for arg in args)
    output = target(*args)
    specs = tuple(TensorSpec.of(tensor) for tensor in tensors)
    return OpCall(target, filled, {}, specs, (TensorSpec.of(output),), False), tensors


Pieces = dict[tuple[int, ...], torch.Tensor]


def pieces(value: torch.Tensor, placement: MeshPlacement, sizes: tuple[int, ...]) -> Pieces:
    """The piece of every worker; a summand is the value on coordinate 0, and zeros elsewhere."""
    found = {(): value}
    for size, part in zip(sizes, placement, strict=True):
        longer = {}
        for place, piece in found.items():
            for coordinate in range(size):
                longer[(*place, coordinate)] = cut(piece, part, coordinate)
        found = longer
    return found


def cut(piece: torch.Tensor, part: Placement, coordinate: int) -> torch.Tensor:
    if isinstance(part, Shard):
        runs = piece.unflatten(part.dim, (part.outer, -1))
        length = part.sizes[coordinate] // part.outer
        return runs.narrow(part.dim + 1, part.offset(coordinate), length).flatten(part.dim, part.dim + 1).contiguous()
    return piece if coordinate == 0 or not isinstance(part, Partial) else torch.zeros_like(piece)


CALLS = [
    (aten.mm.default, lambda: (torch.randn(8, 4), torch.randn(4, 12))),
    (aten.view.default, lambda: (torch.randn(4, 4, 8), [16, 8])),
    (aten.view.default, lambda: (torch.randn(16, 8), [4, 4, 2, 4])),
    (aten.transpose.int, lambda: (torch.randn(4, 6, 8), 0, 2)),
    (aten.relu.default, lambda: (torch.randn(4, 8),)),
    (aten.sum.dim_IntList, lambda: (torch.randn(4, 8), [0])),
]


@pytest.mark.parametrize(("target", "arguments"), CALLS)
@pytest.mark.parametrize("sizes", [(2,), (2, 2), (4, 2)])
def test_the_parts_of_every_way_recombine(target: Any, arguments: Any, sizes: tuple[int, ...]) -> None:
    call, tensors = call_of(target, *arguments())
    ways = Ways(sizes)
    nothing = tuple(frozenset() for _ in sizes)
    whole = target(*fill_slots(call.args, tuple(tensors)))
    found = ways.of(call, [nothing] * len(tensors))
    assert len({(way.inputs, way.outputs) for way in found}) == len(found)
    for way in found:
        wanted = [place or (REPLICATE,) * len(sizes) for place in way.inputs]
        parts = [pieces(tensor, place, sizes) for tensor, place in zip(tensors, wanted, strict=True)]
        output = way.outputs[0]
        assert output is not None
        expected = pieces(whole, output, sizes)
        results = {
            place: way.local.target(*fill_slots(way.local.args, tuple(part[place] for part in parts)))
            for place in itertools.product(*map(range, sizes))
        }
        assert tuple(results[(0,) * len(sizes)].shape) == way.local.outputs[0].shape  # type: ignore[union-attr]
        assert share_of(output) <= 1
        sums = [axis for axis, part in enumerate(output) if isinstance(part, Partial)]
        for place, piece in expected.items():
            if all(place[axis] == 0 for axis in sums):
                groups = [range(sizes[a]) if a in sums else [place[a]] for a in range(len(sizes))]
                total = sum(results[other] for other in itertools.product(*groups))
                torch.testing.assert_close(total, piece)


def test_rules_of_an_axis_are_those_of_what_the_axes_before_leave() -> None:
    call, _ = call_of(aten.view.default, torch.randn(4, 4, 8), [16, 8])
    found = Ways((2, 2)).of(call, [(frozenset(), frozenset())])
    nested = [way for way in found if way.rules == ("S0 -> S0*4", "S0 -> S0*4")]
    assert nested[0].inputs[0] == (Shard(0, (2, 2)), Shard(0, (1, 1)))
    assert nested[0].outputs[0] == (Shard(0, (8, 8)), Shard(0, (4, 4)))
    assert nested[0].share == 0.25
    runs = [way for way in found if way.rules[0] == "S0 -> S0*4" and way.rules[1].startswith("S1 -> S0")]
    assert runs[0].outputs[0] == (Shard(0, (8, 8)), Shard(0, (4, 4), 2))


def ring(source: Placement, target: Placement, num_bytes: int, axis: int) -> float:
    """Whatever leaves a cut or a sum costs its bytes."""
    return 0.0 if isinstance(source, Replicate) else float(num_bytes)


SPEC = TensorSpec((8, 8), torch.float32, torch.device("cpu"), (8, 1))
PLACES: list[Placement] = [REPLICATE, PARTIAL, Shard(0, (4, 4)), Shard(1, (4, 4))]


@settings(max_examples=60, deadline=None)
@given(*[st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES))] * 2)
def test_conversions_cost_nothing_only_where_nothing_moves(source: MeshPlacement, target: MeshPlacement) -> None:
    conversion = Exchanges(ring).price(256, source, target)
    free = all(old == new or isinstance(old, Replicate) for old, new in zip(source, target, strict=True))
    inner, outer = source[1], [part for part in (source[0], target[0]) if isinstance(part, Shard)]
    nested = source[0] != target[0] and isinstance(inner, Shard) and inner.dim in [part.dim for part in outer]
    assert (conversion.time_s == 0) == (free and not nested)
    assert conversion.temporary_bytes >= 0


def test_bytes_are_those_that_the_other_axes_leave_in_the_cheapest_order() -> None:
    cut = Shard(0, (4, 4)), Shard(1, (4, 4))
    gathered = Exchanges(ring).price(256, cut, (REPLICATE, REPLICATE))
    assert gathered.time_s == 128 + 256
    reduced = Exchanges(ring).price(256, (PARTIAL, PARTIAL), (Shard(0, (4, 4)), REPLICATE))
    assert reduced.time_s == 256 + 128, "cut first, so that less is summed along the other axis"


def test_an_outer_cut_of_the_same_dim_cannot_be_gathered_alone() -> None:
    nested = Shard(0, (4, 4)), Shard(0, (2, 2))
    conversion = Exchanges(ring).price(256, nested, (REPLICATE, Shard(0, (4, 4))))
    assert conversion.time_s == 128 + 256
    assert is_considered((REPLICATE, PARTIAL), (Shard(0, (4, 4)), REPLICATE))
    assert not is_considered((Shard(0, (4, 4)), PARTIAL), (Shard(1, (4, 4)), REPLICATE))


def test_storage_ranges_from_whole_to_fully_sharded() -> None:
    ways = Ways((2, 2))
    options = storages(
        SPEC, ways, Exchanges(ring), trained=True, state_bytes_per_element=8.0,
        update_time_s=float, num_microbatches=1,
    )  # fmt: skip
    assert len({option.stored for option in options}) == len(plain_placements(SPEC, (2, 2), ways)) == 9
    whole = [option for option in options if option.stored == (REPLICATE, REPLICATE)]
    assert {option.fixed_bytes for option in whole} == {256 + 512, 256 + 256, 256 + 128}
    assert {option.update_s for option in whole} == {64.0, 32.0, 16.0}
    for option in options:
        assert option.returned == option.updated
        assert option.reduce_s == 0
    summed = storages(
        SPEC, ways, Exchanges(ring), trained=True, state_bytes_per_element=8.0,
        update_time_s=float, num_microbatches=4,
    )  # fmt: skip
    assert any(option.returned == (PARTIAL, PARTIAL) and option.reduce_s > 0 for option in summed)
