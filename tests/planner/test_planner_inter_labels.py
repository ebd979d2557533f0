"""Labels bound the makespan from below, are exact for equal stages, and dominance drops nothing that is needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.planner.inter.labels import GroupOrder, StageTimes, put_in_front, undominated
from partita.planner.inter.schedule_time import PipelineTimes, in_flight, makespan_s, passes_of_group

PLAIN = ["gpipe", "1f1b", "zero_bubble"]


def label_end_s(schedule: str, times: PipelineTimes, m: int) -> float:
    count = len(times.forward_s)
    parts = None
    for s in reversed(range(count)):
        order = GroupOrder(schedule=schedule, num_microbatches=m, from_end=count - s, num_stages=count)
        moves = (times.forward_transfer_s[s], times.backward_transfer_s[s]) if s + 1 < count else (0.0, 0.0)
        stage = StageTimes(times.forward_s[s], times.backward_s[s], times.weight_s[s], times.end_s[s], *moves)
        parts = put_in_front(order, stage, parts)
    assert parts is not None
    return float(parts[-1])


@st.composite
def pipelines(draw: st.DrawFn) -> PipelineTimes:
    count = draw(st.integers(1, 5))
    row = st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count)
    weight = draw(row)
    return PipelineTimes(
        forward_s=draw(row),
        backward_s=[b + w for b, w in zip(draw(row), weight, strict=True)],
        weight_s=weight,
        end_s=draw(row),
        forward_transfer_s=draw(row)[1:],
        backward_transfer_s=draw(row)[1:],
    )


@given(st.sampled_from(PLAIN), pipelines(), st.integers(1, 9))
def test_never_above_the_makespan(schedule: str, times: PipelineTimes, m: int) -> None:
    assert label_end_s(schedule, times, m) <= makespan_s(schedule, times, m) * (1 + 1e-12)


@given(pipelines(), st.integers(1, 9))
def test_gpipe_without_ends_is_exact(times: PipelineTimes, m: int) -> None:
    """sum of all + (m - 1)(max f + max b)."""
    count = len(times.forward_s)
    times = PipelineTimes(**{**vars(times), "end_s": [0.0] * count, "weight_s": [0.0] * count})
    closed = sum(times.forward_s) + sum(times.backward_s) + sum(times.forward_transfer_s)
    closed += sum(times.backward_transfer_s) + (m - 1) * (max(times.forward_s) + max(times.backward_s))
    assert makespan_s("gpipe", times, m) == pytest.approx(closed)


@given(st.sampled_from(PLAIN), st.integers(1, 6), st.integers(1, 12))
def test_equal_stages_are_exact(schedule: str, count: int, m: int) -> None:
    m = max(m, count)
    times = PipelineTimes(
        forward_s=[1.0] * count,
        backward_s=[2.0] * count,
        weight_s=[1.0] * count,
        end_s=[0.0] * count,
        forward_transfer_s=[0.0] * (count - 1),
        backward_transfer_s=[0.0] * (count - 1),
    )
    assert label_end_s(schedule, times, m) == pytest.approx(makespan_s(schedule, times, m))


@given(st.sampled_from(PLAIN), st.integers(1, 6), st.integers(1, 9))
def test_the_order_is_described_right(schedule: str, count: int, m: int) -> None:
    for s in range(count):
        order = GroupOrder(schedule=schedule, num_microbatches=m, from_end=count - s, num_stages=count)
        kinds = [kind for kind, _, _ in passes_of_group(schedule, s, count, m)]
        last = max(i for i, kind in enumerate(kinds) if kind == "B")
        assert order.forward_first == kinds[: kinds.index("B")].count("F")
        assert order.weight_before_last == kinds[:last].count("W")
        assert order.in_flight == in_flight(schedule, s, count, m)


@given(
    st.lists(st.tuples(st.integers(0, 2), *[st.integers(0, 4)] * 4), min_size=1, max_size=25),
    st.sampled_from([1, 3, 50]),
)
def test_undominated_undercuts_everything(rows: list[tuple[int, ...]], most: int) -> None:
    table = np.array(rows, dtype=float).T
    state, labels, place = undominated(table[0].astype(np.int64), table[1:], most)
    for row in rows:
        own = labels[:, state == row[0]]
        assert own.shape[1] <= most
        assert (own <= np.array(row[1:])[:, None]).all(axis=0).any()
    if most == 50:  # exactly the frontier
        found = {(int(s), *label) for s, label in zip(state, labels.T.tolist(), strict=True)}
        frontier = {
            row
            for row in rows
            if not any(o[0] == row[0] and o != row and all(x <= y for x, y in zip(o, row, strict=True)) for o in rows)
        }
        assert found == frontier
        assert [tuple(table[1:, i]) for i in place] == [tuple(label) for label in labels.T]
