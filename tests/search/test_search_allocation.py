"""Who trains on: by rungs, by predicted values, with one objective and with several."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from partita.search.allocation import Standing, best_at, dominates, front, goes_on, next_promoted, ordered
from partita.search.deadline import FACTOR

VECTORS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda v: (float(v[0]), float(v[1]))), max_size=12
)


def standing(number: int, rung: int, *values: float, waits: bool = True) -> Standing:
    return Standing(number=number, rung=rung, at=(values,) * (rung + 1), is_waiting=waits)


def test_the_best_third_goes_on() -> None:
    others = [standing(i, 0, float(i)) for i in range(5)]
    assert best_at(0, others) == [0]
    assert goes_on(9, [*others, standing(9, 0, -1.0, waits=False)], 9)
    assert not goes_on(9, [*others, standing(9, 0, 3.5, waits=False)], 9)


def test_the_first_ones_wait_for_others() -> None:
    assert not goes_on(0, [standing(0, 0, 0.0)], 9)
    assert not goes_on(0, [standing(0, 0, 0.0), standing(1, 0, 1.0)], 9)
    assert goes_on(0, [standing(0, 0, 0.0), standing(1, 0, 1.0), standing(2, 0, 2.0)], 9)


def test_who_waits_goes_on_once_others_are_worse() -> None:
    known = [standing(0, 0, 1.0), standing(1, 0, 2.0)]
    assert next_promoted(known, 9) is None
    assert next_promoted([*known, standing(2, 0, 3.0)], 9) == 0


def test_higher_rungs_come_first() -> None:
    low = [standing(i, 0, float(i)) for i in range(6)]
    high = [standing(10 + i, 1, 10.0 + i) for i in range(3)]
    assert next_promoted([*low, *high], 9) == 10


def test_who_has_moved_on_or_trains_is_not_promoted() -> None:
    known = [standing(0, 1, 0.0), standing(1, 0, 1.0, waits=False), *(standing(i, 0, float(i)) for i in range(2, 6))]
    assert best_at(0, known) == [0, 1]
    assert next_promoted(known, 9) is None


@given(VECTORS)
@settings(max_examples=80, deadline=None)
def test_the_order_is_by_layers_of_the_front(values: list[tuple[float, float]]) -> None:
    order = ordered(values)
    assert sorted(order) == list(range(len(values)))
    for earlier, later in product(range(len(order)), repeat=2):
        if earlier < later:
            assert not dominates(values[order[later]], values[order[earlier]])
    assert all(not dominates(other, values[i]) for i in front(values) for other in values)


@given(VECTORS)
@settings(max_examples=80, deadline=None)
def test_layers_are_fronts_of_what_is_left(values: list[tuple[float, float]]) -> None:
    order = ordered(values)
    while order:
        left = [values[i] for i in sorted(order)]
        layer = {sorted(order)[place] for place in front(left)}
        assert set(order[: len(layer)]) == layer
        order = order[len(layer) :]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_one_objective_is_its_own_order(values: list[float]) -> None:
    assert [values[i] for i in ordered([(v,) for v in values])] == sorted(values)


def test_extremes_of_a_layer_come_before_its_crowd() -> None:
    values = [(0.0, 10.0), (5.0, 5.0), (5.1, 4.9), (5.2, 4.8), (10.0, 0.0)]
    assert set(ordered(values)[:2]) == {0, 4}


def test_dominated_candidates_stop_with_several_objectives() -> None:
    good = [standing(i, 0, float(i), float(5 - i)) for i in range(6)]
    bad = standing(9, 0, 7.0, 7.0, waits=False)
    assert not goes_on(9, [*good, bad], 9)


def test_about_a_factor_of_each_rung_goes_on() -> None:
    known = [standing(i, 0, float(i)) for i in range(27)]
    assert len(best_at(0, known)) == 27 // FACTOR


def test_nobody_goes_beyond_the_last_rung() -> None:
    known = [standing(i, 1, float(i)) for i in range(3)]
    assert next_promoted(known, 2) == 0 and next_promoted(known, 1) is None
    assert goes_on(0, known, 2) and not goes_on(0, known, 1)
