"""What the benchmark of blocks makes of its times."""

from __future__ import annotations

import pytest

from benchmarks.blocks import CHANGE_EVERY, NUM_CHANGES, apart


def test_what_a_change_takes_is_told_apart() -> None:
    """Dense steps know none; of the other column the first change takes longest, and is not counted."""
    times_s = []
    for number in range(3, 3 + CHANGE_EVERY * (1 + NUM_CHANGES)):
        extra_s = {0: 5.0 if number > CHANGE_EVERY else 100.0, 1: 0.5}.get(number % CHANGE_EVERY, 0.0)
        times_s.append([3.0, 1.0 + extra_s])
    usual, changes_s = apart(times_s)
    assert all(turn == [3.0, 1.0] for turn in usual)
    assert changes_s == pytest.approx([0.0, 5.5])
