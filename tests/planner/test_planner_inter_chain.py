"""Bounds and intervals of a chain's boundaries against enumeration of all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import InputError
from partita.planner.inter.chain import PRECISION, Chain
from partita.planner.inter.schedule_time import PipelineTimes, makespan_s


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    num_ops = draw(st.integers(1, 9))
    num_stages = draw(st.integers(1, min(4, num_ops)))

    def grid(most: int) -> np.ndarray:
        row = st.lists(st.integers(0, most).map(float), min_size=num_ops, max_size=num_ops)
        if draw(st.booleans()):  # equal devices
            return np.array([draw(row)] * num_stages)
        return np.array(draw(st.lists(row, min_size=num_stages, max_size=num_stages)))

    limits = draw(st.lists(st.sampled_from([9.0, 20.0, np.inf]), min_size=num_stages, max_size=num_stages))
    return Chain(
        forward_s=grid(9),
        backward_s=grid(9),
        end_s=grid(3),
        memory_bytes=grid(9),
        limit_bytes=np.array(limits),
        there_s=grid(4),
        back_s=grid(4),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        num_microbatches=draw(st.integers(1, 7)),
    )


def pipelines(chain: Chain) -> dict[tuple[int, ...], float]:
    """The makespan of every choice of starts that fits, by the task order."""
    found = {}
    for starts in combinations(range(1, chain.num_ops), chain.num_stages - 1):
        edges = (0, *starts, chain.num_ops)
        spans = [slice(low, high) for low, high in pairwise(edges)]
        if any(chain.memory_bytes[q, span].sum() > chain.limit_bytes[q] for q, span in enumerate(spans)):
            continue
        times = PipelineTimes(
            forward_s=[float(chain.forward_s[q, span].sum()) for q, span in enumerate(spans)],
            backward_s=[float(chain.backward_s[q, span].sum()) for q, span in enumerate(spans)],
            weight_s=[0.0] * len(spans),
            end_s=[float(chain.end_s[q, span].sum()) for q, span in enumerate(spans)],
            forward_transfer_s=[float(chain.there_s[q, cut]) for q, cut in enumerate(starts, start=1)],
            backward_transfer_s=[float(chain.back_s[q, cut]) for q, cut in enumerate(starts, start=1)],
        )
        found[starts] = makespan_s(chain.schedule, times, chain.num_microbatches)
    return found


@given(chains())
@settings(max_examples=600, deadline=None)
def test_no_pipeline_is_below_the_bound(chain: Chain) -> None:
    assert chain.bound_s() <= min(pipelines(chain).values(), default=np.inf)


@given(chains(), st.floats(0.9, 1.5))
@settings(max_examples=600, deadline=None)
def test_the_windows_hold_every_pipeline_below_the_target(chain: Chain, factor: float) -> None:
    found = pipelines(chain)
    below_s = factor * min(found.values(), default=10.0)
    windows = chain.windows(below_s)
    for starts, time_s in found.items():
        if time_s <= below_s:
            assert windows is not None
            assert all(low <= cut <= high for cut, (low, high) in zip(starts, windows, strict=True))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_ops_are_bounded_tightly_and_divided_evenly(schedule: str) -> None:
    """S equal stages of t take (m + S - 1) t; with many microbatches the bound comes near and leaves few boundaries."""
    one, zero = np.ones((4, 400)), np.zeros((4, 400))
    chain = Chain(
        forward_s=one, backward_s=one, end_s=zero, memory_bytes=zero, limit_bytes=np.full(4, np.inf), there_s=zero,
        back_s=zero, schedule=schedule, num_microbatches=64,
    )  # fmt: skip
    best_s = (64 + 3) * 200.0
    assert 0.95 * best_s <= chain.bound_s() <= best_s
    windows = chain.windows(best_s)
    assert windows is not None
    assert all(low <= cut <= high for cut, (low, high) in zip((100, 200, 300), windows, strict=True))
    assert sum(high - low for low, high in windows) < 60


def test_one_microbatch_takes_the_path_wherever_the_boundary_is() -> None:
    one, zero = np.ones((2, 4)), np.zeros((2, 4))
    chain = Chain(
        forward_s=one, backward_s=one, end_s=zero, memory_bytes=one, limit_bytes=np.full(2, np.inf), there_s=zero,
        back_s=zero, schedule="1f1b", num_microbatches=1,
    )  # fmt: skip
    assert chain.windows(8.1) == [(1, 3)] and chain.windows(7.9) is None
    assert chain.bound_s() == pytest.approx(8.0, rel=2 * PRECISION)
    assert replace(chain, limit_bytes=np.array([1.0, 9.0])).windows(8.1) == [(1, 1)]
    assert replace(chain, limit_bytes=np.array([1.0, 2.0])).bound_s() == np.inf
    with pytest.raises(InputError, match="schedule"):
        replace(chain, schedule="interleaved")
