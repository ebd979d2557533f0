"""The deadline and how the time is dealt out."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita import InputError
from partita.search.deadline import FACTOR, LAST_RUNG_SHARE, MOST_RUNGS, STARTUPS, Budget, instant_of, rung_s

NOW_S = 1_700_000_000.0


@pytest.mark.parametrize(
    ("given_as", "seconds"),
    [(90, 90), (1.5, 1.5), ("90s", 90), ("20m", 1200), ("1h30m", 5400), ("2d", 172_800), ("1.5 h", 5400),
     (datetime.timedelta(minutes=2), 120), (f"@{NOW_S + 7}", 7),
     (datetime.datetime.fromtimestamp(NOW_S + 60), 60),
     (datetime.datetime.fromtimestamp(NOW_S + 60, tz=datetime.UTC), 60)],
)  # fmt: skip
def test_forms(given_as: object, seconds: float) -> None:
    assert instant_of(given_as, now_s=NOW_S) == pytest.approx(NOW_S + seconds)


@pytest.mark.parametrize("wrong", ["20", "soon", "", "5 parsecs", None, True, float("nan"), float("inf"), [], "m20"])
def test_what_is_no_deadline(wrong: object) -> None:
    with pytest.raises(InputError, match="deadline must be"):
        instant_of(wrong, now_s=NOW_S)


@pytest.mark.parametrize("past", [0, -5, "@5", datetime.datetime(2001, 1, 1)])
def test_the_past(past: object) -> None:
    with pytest.raises(InputError, match="s ago"):
        instant_of(past, now_s=NOW_S)


@given(st.floats(1, 1e6), st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_instants_are_in_order(total_s: float, share: float) -> None:
    budget = Budget(start_s=NOW_S, deadline_s=NOW_S + total_s, final_share=share)
    assert NOW_S < budget.explore_end_s < budget.last_s < budget.deadline_s
    assert budget.margin_s <= max(0.3, 0.05 * total_s), "what is given up is little"
    assert budget.final_s == pytest.approx(share * (budget.last_s - NOW_S), rel=1e-3, abs=1e-3)


def test_rungs_are_long_enough_for_what_beginning_takes_and_short_enough_to_have_some() -> None:
    long = Budget(start_s=0, deadline_s=10_000, final_share=0.4)
    assert long.first_rung_s(0.5) == pytest.approx(long.final_s / FACTOR**MOST_RUNGS)
    assert long.first_rung_s(100) == STARTUPS * 100
    short = Budget(start_s=0, deadline_s=10, final_share=0.4)
    assert short.first_rung_s(0.5) == STARTUPS * 0.5
    assert short.first_rung_s(60) <= short.explore_end_s / FACTOR + 1e-9
    assert [rung_s(2.0, k) for k in range(3)] == [2.0, 6.0, 18.0]


def test_fewer_and_wider_trials_towards_the_end() -> None:
    budget = Budget(start_s=0, deadline_s=100, final_share=0.4)
    slots = [budget.num_slots(16, now_s) for now_s in range(0, 80, 5)]
    assert slots[0] == 16 and slots[-1] == 2
    assert slots == sorted(slots, reverse=True)
    assert {budget.num_slots(1, now_s) for now_s in range(0, 80, 5)} == {1}
    assert {budget.num_slots(2, now_s) for now_s in range(0, 80, 5)} == {2}


@pytest.mark.parametrize("first_rung_s", [0.5, 1.0, 2.9, 11.0, 50.0])
def test_the_last_rung_is_at_most_half_of_the_final_training(first_rung_s: float) -> None:
    budget = Budget(start_s=0.0, deadline_s=100.0, final_share=0.4)
    most_s, last = LAST_RUNG_SHARE * budget.final_s, budget.last_rung(first_rung_s)
    assert last == 0 or rung_s(first_rung_s, last) <= most_s
    assert rung_s(first_rung_s, last + 1) > most_s
    assert budget.last_rung(budget.final_s / FACTOR**4) == 3
