"""Slow processes are named, each once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest

from partita.training.events import WarningRaised, subscribe
from partita.training.slow import SLOW, SlowProcesses, SlowProcessWarning


@pytest.mark.parametrize(
    ("slowness", "wanted"), [([1.0, SLOW, SLOW], ["a 1", "a 2"]), ([1.0, SLOW - 0.01], []), ([3.0, 1.0], ["a 0"])]
)
def test_whoever_is_slow_is_named_once(slowness: Sequence[float], wanted: list[str]) -> None:
    slow, heard = SlowProcesses(), []
    unsubscribe = subscribe(heard.append)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for place, times in enumerate(slowness):
                slow.name(place, times, f"a {place}", "so it rests", stacklevel=1)
    unsubscribe()
    assert all(one.category is SlowProcessWarning and one.filename == __file__ for one in caught)
    told = [str(one.message) for one in caught]
    assert [text[:3] for text in told] == wanted and all(", so it rests." in text for text in told)
    assert [event.message for event in heard if isinstance(event, WarningRaised)] == told
