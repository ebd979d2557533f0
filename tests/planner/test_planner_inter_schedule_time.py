"""Makespans against an event simulation of the program's task orders, and against the published closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.inter_cases import makespan, orders_of
from partita.planner.inter import StageOption
from partita.planner.inter.problem import SCHEDULES
from partita.planner.inter.schedule_time import PipelineTimes, chunk_peaks, in_flight, makespan_s, passes_of_group

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 9))


@given(st.sampled_from(SCHEDULES), SIZES, st.integers(2, 3), st.data())
def test_equals_a_simulation_of_the_programs_orders(
    schedule: str, size: tuple[int, int], chunks: int, data: st.DataObject
) -> None:
    groups, m = size
    if schedule == "interleaved":
        m = groups * (1 + m // 4)
    else:
        chunks = 1
    count = groups * chunks
    number = st.integers(0, 9).map(float)
    options = []
    for _ in range(count):
        f, b, w, e = (data.draw(number) for _ in range(4))
        options.append(
            StageOption(
                name="", forward_s=f, backward_s=b + w, weight_s=w, end_s=e, static_bytes=(), saved_bytes=(), rows=()
            )
        )
    moves = [(data.draw(number), data.draw(number)) for _ in range(count - 1)]
    times = PipelineTimes(
        forward_s=[o.forward_s for o in options],
        backward_s=[o.backward_s for o in options],
        weight_s=[o.weight_s for o in options],
        end_s=[sum(o.end_s for o in options[s::groups]) for s in range(groups)],
        forward_transfer_s=[there for there, _ in moves],
        backward_transfer_s=[back for _, back in moves],
    )
    expected = makespan(schedule, groups, chunks, m, tuple(options), moves, float("inf"))
    assert makespan_s(schedule, times, m) == pytest.approx(expected)


@pytest.mark.parametrize("m", [4, 8, 12])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equal_stages_give_the_published_bubbles(groups: int, m: int) -> None:
    """Bubble (S - 1)(f + b) of gpipe and 1f1b, of it 1/v when interleaved (Narayanan et al. 2021, section 2.2), and
    (S - 1)(f + b - w) of ZB-H1 (Qi et al. 2023, table 1; b + w is our backward)."""

    def step_s(schedule: str, chunks: int) -> float:
        count = groups * chunks
        times = PipelineTimes(
            forward_s=[1 / chunks] * count,
            backward_s=[2 / chunks] * count,
            weight_s=[1 / chunks] * count,
            end_s=[0.0] * groups,
            forward_transfer_s=[0.0] * (count - 1),
            backward_transfer_s=[0.0] * (count - 1),
        )
        return makespan_s(schedule, times, m)

    bubble = (groups - 1) * 3
    assert step_s("gpipe", 1) == step_s("1f1b", 1) == 3 * m + bubble
    assert step_s("zero_bubble", 1) == 3 * m + (groups - 1)
    for chunks in (2, 3):
        assert step_s("interleaved", chunks) == pytest.approx(3 * m + bubble / chunks)


@given(st.sampled_from(["gpipe", "1f1b", "zero_bubble"]), SIZES)
def test_in_flight_is_the_peak_of_the_order(schedule: str, size: tuple[int, int]) -> None:
    groups, m = size
    for group in range(groups):
        held = peak = 0
        for kind, _, _ in passes_of_group(schedule, group, groups, m):
            held += {"F": 1, "B": -1 if schedule != "zero_bubble" else 0, "W": -1}[kind]
            peak = max(peak, held)
        assert in_flight(schedule, group, groups, m) == peak


@given(st.integers(1, 5), st.integers(1, 3), st.integers(2, 4))
def test_chunk_peaks_undercut_no_moment(groups: int, rounds: int, chunks: int) -> None:
    for group in range(groups):
        peaks = chunk_peaks(group, groups, groups * rounds, chunks)
        held = [0] * chunks
        for kind, chunk, _ in passes_of_group("interleaved", group, groups, groups * rounds, chunks):
            held[chunk] += 1 if kind == "F" else -1
            assert any(all(x <= y for x, y in zip(held, peak, strict=True)) for peak in peaks)


@given(st.sampled_from(SCHEDULES), SIZES, st.integers(2, 3))
def test_both_floors_have_the_same_orders(schedule: str, size: tuple[int, int], chunks: int) -> None:
    groups, m = size
    m, chunks = (m * groups, chunks) if schedule == "interleaved" else (m, 1)
    for group, order in enumerate(orders_of(schedule, groups, m, chunks)):
        own = passes_of_group(schedule, group, groups, m, chunks)
        assert [(kind, chunk * groups + group, i) for kind, chunk, i in own] == order
