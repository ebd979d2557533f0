"""The bound at scale lies under every way to train, and the search leaves out nothing of its space: by enumeration."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from partita.cluster.model import Link
from partita.cluster.presets import GPU_KINDS
from partita.cost.calibration import Calibration
from partita.cost.networks import Fabric, NodeGroup, channel, edge_s
from partita.errors import InfeasibleError
from partita.planner.scale import search as searching
from partita.planner.scale.families import REMATS, Family
from partita.planner.scale.rates import Groups, Rates
from partita.planner.scale.search import Found, chunks_of, memory_limits
from partita.planner.scale.solution import ScaleConstraints
from partita.planner.scale.space import SLACK, Corners, tabled
from partita.planner.scale.step import Degrees, StepPrediction, predict_step
from tests.planner.scale_chains import Case, random_case

SEEDS = range(48)
Way = tuple[Family, int, int, int, str, int]  # family, stages, chunks of each, replicas, recomputation, ZeRO stage


def families_of(case: Case) -> Iterator[Family]:
    """By definition: tensor degrees divide the smallest machine, context degrees are powers of two where devices would
    be left over without, micro-batches powers of two, boundaries cut where they can be."""
    searcher, fabric = case.searcher, case.fabric
    size = min(group.gpus_per_machine for group in fabric.groups)
    blocks = sum(not searcher.maker.model.pieces[piece].is_gap for piece in searcher.chain)
    for t, c, b in itertools.product(range(1, size + 1), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
        if size % t or t * c > fabric.num_gpus or searcher.batch % b:
            continue
        left_over = t * (c // 2) * blocks * searcher.batch < fabric.num_gpus or fabric.num_gpus >= 2 * searcher.batch
        if c > 1 and (b > 1 or not left_over):
            continue
        for sequence in (True, False) if t > 1 else (False,):
            family = searcher.family(fabric, t, c, b, sequence)
            if not isinstance(family, str):
                yield family
                break


def ways(case: Case) -> Iterator[Way]:
    """Every corner of the space."""
    num_gpus, batch, num_pieces = case.fabric.num_gpus, case.searcher.batch, len(case.searcher.chain)
    for family in families_of(case):
        group = family.tensor * family.context
        for p, d in itertools.product(range(1, num_pieces + 1), range(1, batch + 1)):
            if group * p * d > num_gpus or batch % (d * family.micro_batch):
                continue
            m = batch // (d * family.micro_batch)
            chunks = range(1, max(family.num_blocks // p, 1) + 1) if p > 1 and m % p == 0 else (1,)
            for v, remat, zero in itertools.product(chunks, REMATS, range(4)):
                yield family, p, v, d, remat, zero


def priced(case: Case, way: Way, cuts: tuple[int, ...]) -> StepPrediction:
    family, _, v, d, remat, zero = way
    searcher = case.searcher
    return predict_step(
        chunks_of(family, searcher.chain, cuts), degrees_of(way), case.fabric,
        num_microbatches=searcher.batch // (d * family.micro_batch), schedule="interleaved" if v > 1 else "1f1b",
        remat=remat, zero=zero, state=searcher.state, calibration=searcher.calibration,  # type: ignore[arg-type]
    )  # fmt: skip


def degrees_of(way: Way) -> Degrees:
    family, p, v, d, _, _ = way
    return Degrees(data=d, tensor=family.tensor, pipeline=p, virtual=v, context=family.context)


def fits(case: Case, way: Way, prediction: StepPrediction) -> bool:
    limits = memory_limits(case.fabric, degrees_of(way))
    return all(have <= limit for have, limit in zip(prediction.memory_bytes, limits, strict=True))


def row_of(case: Case, way: Way) -> Corners:
    """The table of this way alone."""
    family, p, v, d, remat, zero = way
    m = case.searcher.batch // (d * family.micro_batch)
    return tabled(
        [family], [np.array([[p], [v], [d], [m]])], remats=(remat,), zeros=(zero,), state=case.searcher.state,  # type: ignore[arg-type]
        rates=Rates(case.fabric, case.searcher.calibration),
    )  # fmt: skip


def least_of_pair(case: Case, way: Way) -> float:
    """The bound by which the search leaves out a number of stages and replicas as a whole."""
    family, p, _, d, *_ = way
    search = searching._Search(case.searcher, case.fabric, ScaleConstraints(pipeline=p, data=d), "quick")
    (found,) = search._least_s(family, search._pairs(family))
    return float(found)


def all_cuts(case: Case, way: Way) -> list[tuple[int, ...]]:
    _, p, v, *_ = way
    rest = itertools.combinations(range(1, len(case.searcher.chain)), p * v - 1)
    return [(0, *cuts) for cuts in rest]


def found_by(case: Case, effort: str = "exhaustive", **fixed: Any) -> Found | None:
    try:
        return case.searcher.search(case.fabric, ScaleConstraints(**fixed), effort)  # type: ignore[arg-type]
    except InfeasibleError:
        return None


@pytest.mark.parametrize("seed", SEEDS)
def test_every_cut_of_every_corner_takes_its_bound_and_least_memory(seed: int) -> None:
    case = random_case(seed)
    draw = random.Random(seed)
    some = list(ways(case))
    for way in draw.sample(some, min(len(some), 25)):
        row, skipped_below_s = row_of(case, way), least_of_pair(case, way)
        cuts = all_cuts(case, way)
        for cut in draw.sample(cuts, min(len(cuts), 12)):
            prediction = priced(case, way, cut)
            assert row.bound_s[0] <= prediction.step_time_s, (way[1:], cut)
            assert skipped_below_s * (1 - SLACK) <= prediction.step_time_s, (way[1:], cut)
            assert row.least_memory_bytes[0] <= prediction.peak_memory_bytes + len(case.searcher.chain), (way[1:], cut)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_of_long_chains_hold_at_any_number_of_microbatches(seed: int) -> None:
    case = random_case(1000 + seed, most_blocks=24)
    case.searcher.batch = 96
    draw = random.Random(seed)
    some = list(ways(case))
    for way in draw.sample(some, min(len(some), 40)):
        _, p, v, *_ = way
        bound_s = row_of(case, way).bound_s[0]
        for _ in range(4):
            begins = draw.sample(range(1, len(case.searcher.chain)), p * v - 1)
            assert bound_s <= priced(case, way, (0, *sorted(begins))).step_time_s, (way[1:], begins)


@pytest.mark.parametrize("seed", range(24))
def test_uncut_chains_on_equal_machines_take_what_their_bound_says(seed: int) -> None:
    case = random_case(seed)
    case.fabric = Fabric(groups=case.fabric.groups[:1])
    for way in list(ways(case))[:100]:
        family, p, v, d, _, zero = way
        # An all-reduce takes the better of two algorithms, its bound the better of each of their parts.
        if p * v == 1 and (zero >= 2 or d * family.context == 1):
            assert row_of(case, way).bound_s[0] == pytest.approx(priced(case, way, (0,)).step_time_s, rel=2 * SLACK)


@pytest.mark.parametrize("seed", range(24))
def test_search_finds_what_enumeration_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every corner, cut as the search cuts it; the bound also lies under all other cuts."""
    case = random_case(seed, most_blocks=3)
    best_s = any_cut_s = float("inf")
    search = searching._Search(case.searcher, case.fabric, ScaleConstraints(), "exhaustive")
    for way in ways(case):
        family, p, v, _, remat, _ = way
        own = {
            searching.cut_chain(search._times(family, remat, degrees_of(way)), p * v, from_end=end)  # type: ignore[arg-type]
            for end in ((False, True) if v == 1 else (True,))
        }
        for cuts in all_cuts(case, way):
            prediction = priced(case, way, cuts)
            if fits(case, way, prediction):
                any_cut_s = min(any_cut_s, prediction.step_time_s)
                best_s = min(best_s, prediction.step_time_s if cuts in own else best_s)
    found = found_by(case)
    if found is None:
        assert best_s == float("inf")
        return
    assert found.num_open == 0
    assert found.best.prediction.step_time_s == pytest.approx(best_s, rel=1e-12)
    assert found.bound_s <= any_cut_s
    # The same when nearly every corner is an unusual one.
    monkeypatch.setattr("partita.planner.scale.space.stage_numbers", lambda most, blocks: [1])
    monkeypatch.setattr("partita.planner.scale.space.VIRTUALS", (1,))
    searching.paired.cache_clear()
    again = found_by(case)
    searching.paired.cache_clear()
    assert again is not None and again.best.prediction.step_time_s == found.best.prediction.step_time_s
    assert again.bound_s == pytest.approx(found.bound_s, rel=1e-12)


@pytest.mark.parametrize("seed", range(24))
def test_no_forced_corner_is_faster_than_the_free_plan_or_its_bound(seed: int) -> None:
    case = random_case(seed)
    for effort in ("quick", "thorough"):
        free = found_by(case, effort)
        for fixed in _forced(case):
            found = found_by(case, effort, **fixed)
            if found is None:
                continue
            assert free is not None
            assert found.best.prediction.step_time_s >= free.bound_s, fixed
            if free.num_open == 0:
                assert found.best.prediction.step_time_s >= free.best.prediction.step_time_s, fixed
        assert effort == "quick" or free is None or free.num_open == 0  # small spaces are searched to the end


def _forced(case: Case) -> Iterator[dict[str, Any]]:
    """Single fields, and random combinations of all, each with a value that is in the space."""
    contexts = sorted({family.context for family in families_of(case)})
    values = {
        "tensor": sorted({family.tensor for family in families_of(case)}),
        "context": contexts,
        "micro_batch": [b for b in (1, 2, 4, 8) if case.searcher.batch % b == 0],
        "pipeline": range(1, len(case.searcher.chain) + 1),
        "virtual": range(1, len(case.searcher.chain) + 1),
        "data": [d for d in range(1, case.searcher.batch + 1) if case.searcher.batch % d == 0],
        "recompute": REMATS,
        "zero": range(4),
    }
    for name, choices in values.items():
        yield from ({name: value} for value in choices)
    draw = random.Random(7)
    for _ in range(20):
        names = draw.sample(sorted(values), draw.randint(2, 4))
        fixed = {name: draw.choice(list(values[name])) for name in names}
        if fixed.get("context", 1) == 1 or fixed.setdefault("micro_batch", 1) == 1:
            yield fixed


@pytest.mark.parametrize("seed", range(40))
def test_no_mixed_channel_is_better_than_the_best_of_its_kinds(seed: int) -> None:
    """Exchanges and sends anywhere on the fabric take what `Rates` says at the least."""
    fabric, calibration = random_case(seed).fabric, Calibration()
    draw = random.Random(seed)
    rates = Rates(fabric, calibration)
    for _ in range(40):
        stride, ranks = draw.choice((1, 2, 4)), draw.randint(2, 8)
        if stride * ranks > fabric.num_gpus:
            continue
        groups = Groups(np.array([stride]), np.array([ranks]))
        first = draw.randrange(fabric.num_gpus - stride * ranks + 1)
        real = channel(fabric, calibration, num_ranks=ranks, stride=stride, first=first, span=stride * ranks)
        num_bytes = draw.choice((0.0, 1e4, 1e8))
        for kind in ("reduce_scatter", "all_reduce", "all_gather"):
            byte_s, fixed_s = (
                column[0]
                for column in rates.best_exchanges(groups, "all_reduce" if kind == "all_reduce" else kind)  # type: ignore[arg-type]
            )
            assert (fixed_s + num_bytes * byte_s) * (1 - 1e-9) <= real.collective_s(kind, num_bytes)  # type: ignore[arg-type]
        span = stride * ranks
        if 2 * span <= fabric.num_gpus:
            stage = draw.randrange(fabric.num_gpus // span - 1)
            byte_s, fixed_s = (column[0] for column in rates.sends(groups))
            real_s = edge_s(fabric, calibration, stage * span, (stage + 1) * span, span, num_bytes)
            assert (fixed_s + num_bytes * byte_s) * (1 - 1e-9) <= real_s


def test_machines_with_later_links_inside_than_outside() -> None:
    """A group on two kinds passes a network where each kind alone would use its links, here the slower ones."""
    fast = Link(bytes_per_s=1e12, latency_s=1e-7)
    kinds = [NodeGroup.of(GPU_KINDS[kind], 4, 4) for kind in ("A100-40", "H100")]
    late = [replace(group, network=fast, link=Link(bytes_per_s=1e12, latency_s=1e-4)) for group in kinds]
    fabric, calibration = Fabric(groups=tuple(late)), Calibration()
    groups = Groups(np.array([1]), np.array([4]))
    real = channel(fabric, calibration, num_ranks=4, stride=1, first=2, span=4)
    alone = channel(Fabric(groups=fabric.groups[:1]), calibration, num_ranks=4, stride=1, span=4)
    assert real.collective_s("all_gather", 0.0) < alone.collective_s("all_gather", 0.0)
    assert Rates(fabric, calibration).best_exchanges(groups)[1][0] <= real.collective_s("all_gather", 0.0)


def test_pieces_cost_what_a_pass_of_them_alone_costs() -> None:
    """Stages are cut by these times, so none of a piece that computes may be 0."""
    case = random_case(3)
    family = next(families_of(case))
    for piece, remat in itertools.product(set(case.searcher.chain), REMATS):
        alone = predict_step(
            [[(family.works[piece], 1)]], Degrees(tensor=family.tensor), case.fabric, num_microbatches=1, remat=remat,
        )  # fmt: skip
        busy_s = alone.parts["compute"] + alone.parts["exchange"]
        assert family.times[remat].pieces_s[piece] == pytest.approx(busy_s) and busy_s > 0


def test_a_chain_priced_whole_may_take_more_than_its_chunks() -> None:
    """Why the price of the whole chain is no bound on its cuts (`partita.planner.scale.families`)."""
    excess = []
    for seed in SEEDS:
        case = random_case(seed)
        case.fabric = Fabric(groups=case.fabric.groups[:1])
        for family in families_of(case):
            ahead = family.times["none"].forward
            excess.append(ahead.whole_s / ahead.cut_s)
    assert min(excess) >= 1 - 1e-12 and max(excess) > 1.05
