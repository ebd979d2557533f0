"""How pieces of a batch are dealt to processes of unequal speed, and when they are dealt anew."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.training.dealing import GAIN, NUM_FIRST, Dealer, Patience, deal, ready_s

TIMES_S = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4)


@given(st.integers(4, 9), TIMES_S, st.integers(0, 1))
def test_no_other_deal_with_so_many_for_each_is_ready_sooner(num_pieces: int, times_s: list[float], least: int) -> None:
    found = deal(num_pieces, times_s, least)
    assert sum(found) == num_pieces and min(found) >= least
    every = itertools.product(range(least, num_pieces + 1), repeat=len(times_s))
    best = min(ready_s(counts, times_s) for counts in every if sum(counts) == num_pieces)
    assert ready_s(found, times_s) == pytest.approx(best)


@given(st.integers(100, 100_000), TIMES_S)
def test_many_pieces_are_ready_almost_at_once(num_pieces: int, times_s: list[float]) -> None:
    found = deal(num_pieces, times_s)
    assert sum(found) == num_pieces
    at_once_s = num_pieces / sum(1 / time_s for time_s in times_s)
    assert ready_s(found, times_s) <= at_once_s + max(times_s)


@given(TIMES_S, st.integers(4, 64))
def test_what_a_dealer_wants_is_worth_it_or_what_there_is(times_s: list[float], num_pieces: int) -> None:
    dealer = Dealer(num_pieces, least=1)
    dealer.start(len(times_s))
    before = dealer.counts
    for _ in range(NUM_FIRST + 1):
        assert dealer.wanted == before
        dealer.note(times_s)
    assert dealer.counts == before  # nothing is taken that was not asked for
    if dealer.wanted != before:
        assert ready_s(dealer.wanted, times_s) < (1 - GAIN) * ready_s(before, times_s)
    dealer.take(dealer.wanted)
    assert dealer.wanted == dealer.counts


def patience(cost_s: float) -> Patience:
    dealer = Dealer(16, least=1)
    dealer.start(2)
    return Patience(dealer, cost_s)


@given(st.floats(0.1, 50.0))
def test_a_change_comes_when_waiting_has_cost_as_much(cost_s: float) -> None:
    waiting = patience(cost_s)
    lost_s = 0.0
    for number in itertools.count(1):
        counts = waiting.look(10, [0.01, 0.03])
        if number > NUM_FIRST:
            lost_s += 10 * (8 * 0.03 - 4 * 0.03)
        if counts is not None:
            break
        assert lost_s < cost_s
    assert counts == (12, 4) and lost_s - 1.2 < cost_s <= lost_s


def test_who_is_slow_for_a_moment_only_costs_no_change() -> None:
    waiting = patience(1.0)
    for _ in range(30):
        for times_s in ([0.001, 0.0014], *[[0.001, 0.001]] * 8):
            assert waiting.look(10, times_s) is None


def test_who_recovers_gets_its_pieces_back() -> None:
    waiting = patience(0.5)
    found = [waiting.look(10, [0.01, 0.03]) for _ in range(5)]
    assert found[NUM_FIRST] == (12, 4)
    waiting.take((12, 4), 2.0)
    assert waiting.look(10, [0.01, 0.03]) is None and waiting.dealer.counts == (12, 4)
    changes = []
    for _ in range(100):
        counts = waiting.look(10, [0.01, 0.01])
        if counts is not None:
            changes.append(counts)
            waiting.take(counts, 2.0)
    assert changes and changes[-1] == (8, 8)
