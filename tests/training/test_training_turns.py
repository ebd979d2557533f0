"""Whose turn it is: whoever is fastest is found, whenever it is ready, and everyone has a chance."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from partita.training.turns import DISTURBED_RATIO, MAX_STEPS, NUM_TURNS, TIE_SHARE, Turns


def run(
    times_s: list[float], ready_at: list[int], *, start: int = 0, provisional: bool = False, failing: frozenset[int]
) -> tuple[Turns, list[int]]:
    """Who ran each step until one was adopted; those in `failing` fail at their first step, which another one makes."""
    turns = Turns([(0,) for _ in times_s], start=start, provisional=provisional)
    order: list[int] = []
    for number in range(MAX_STEPS * 2 * (NUM_TURNS + 1) * len(times_s) ** 2 + max(ready_at)):
        out = [course.failed != "" for course in turns.courses]
        ready = [number >= when and not gone for when, gone in zip(ready_at, out, strict=True)]
        runner = turns.next(ready)
        if number > max(ready_at) and turns.is_over([not gone for gone in out]):
            return turns, order
        if runner in failing:
            turns.fail(runner, "it fails")
            continue
        order.append(runner)
        turns.record(times_s[runner])
    raise AssertionError("no candidate was adopted")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.05, 2.0), min_size=2, max_size=5), st.data())
def test_who_was_disturbed_more_than_others_races_again(times_s: list[float], data: st.DataObject) -> None:
    num, calm_at = len(times_s), data.draw(st.integers(1, 120))
    ready_at = [0, *(data.draw(st.integers(0, calm_at)) for _ in times_s[1:])]
    factors = [data.draw(st.floats(1.0, DISTURBED_RATIO * 0.99)) for _ in times_s]
    turns = Turns([(0,)] * num, start=0)
    number = 0
    while True:
        runner = turns.next([number >= when for when in ready_at], calm=number >= calm_at)
        if number > calm_at and turns.is_over([True] * num):
            break
        turns.record(times_s[runner] * (1.0 if number >= calm_at else factors[runner]))
        number += 1
        assert number < 10_000
    # Who raced while it was not calm to the end may have had some steps of each kind.
    assert times_s[turns.best] <= min(times_s) * (1 + TIE_SHARE) ** num


TIMES = st.lists(st.floats(1e-3, 2.0), min_size=2, max_size=5)


@settings(max_examples=200, deadline=None)
@given(TIMES, st.data())
def test_the_fastest_is_adopted(times_s: list[float], data: st.DataObject) -> None:
    ready_at = [0, *(data.draw(st.integers(0, 60)) for _ in times_s[1:])]
    failing = frozenset(data.draw(st.sets(st.integers(1, len(times_s) - 1))))
    turns, order = run(times_s, ready_at, failing=failing)
    alive = [time_s for index, time_s in enumerate(times_s) if index not in failing]
    # Each race may give away one tie.
    assert times_s[turns.best] <= min(alive) * (1 + TIE_SHARE) ** len(times_s)
    assert turns.best not in failing
    assert set(order) == set(range(len(times_s))) - failing
    for index in set(order) - {0}:
        assert order.index(index) >= ready_at[index]


@settings(max_examples=50, deadline=None)
@given(TIMES, st.data())
def test_a_provisional_start_is_left_whatever_its_time(times_s: list[float], data: st.DataObject) -> None:
    ready_at = [0, *(data.draw(st.integers(1, 30)) for _ in times_s[1:])]
    turns, order = run(times_s, ready_at, provisional=True, failing=frozenset())
    assert turns.best != 0 and order[0] == 0
    assert times_s[turns.best] <= min(times_s[1:]) * (1 + TIE_SHARE) ** len(times_s)


def test_if_all_others_fail_the_start_goes_on() -> None:
    turns, order = run([1.0, 0.5, 0.4], [0, 0, 3], failing=frozenset({1, 2}))
    assert turns.best == 0 and set(order) == {0}


def test_ties_go_to_the_simpler_one() -> None:
    turns = Turns([(1,), (0,)], start=0)
    while not turns.is_over([True, True]) or not turns.courses[0].times_s:
        turns.record([0.100, 0.101][turns.next([True, True])])
    assert turns.best == 1


def test_the_first_step_after_another_candidate_is_not_measured() -> None:
    turns = Turns([(0,), (1,)], start=0)
    seen: list[int] = []
    while True:
        runner = turns.next([True, True])
        if turns.is_over([True, True]):
            break
        first = bool(seen) and seen[-1] != runner
        seen.append(runner)
        turns.record(100.0 if first else 0.5 + runner / 10)  # caches are cold
    assert all(time_s < 1 for course in turns.courses for time_s in course.times_s)
    assert turns.courses[0].num_turns == NUM_TURNS


def test_stopping_early_takes_the_best_that_was_measured() -> None:
    turns = Turns([(0,), (0,), (0,)], start=0)
    for _ in range(9):
        turns.record([0.5, 0.3, 0.1][turns.next([True, True, False])])
    turns.stop()
    assert turns.best == 1
