"""What holds for all tests."""

from __future__ import annotations

import pytest

from partita.sharding.found import SEARCH_LIMIT_S, rule_book


@pytest.fixture(autouse=True)
def searches_of_their_own() -> None:
    """A process searches rules for a limited time in all, which one with thousands of tests would use up on a slow
    machine: every test may search for as long."""
    rule_book().allow(SEARCH_LIMIT_S)
