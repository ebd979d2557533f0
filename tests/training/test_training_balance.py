"""Rows that follow the measured speed of processes while they train: two real processes, one of them slow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import uneven_job
from test_training_processes import run_job

from partita.training.planning import has_compiler

SCRIPT = Path(uneven_job.__file__)


def check(found: Sequence[dict[str, Any]]) -> None:
    """Losses are those of plain PyTorch, weights the same everywhere, and both were told of the same changes."""
    losses = uneven_job.plain_losses(len(found[0]["losses"]))
    for one in found:
        assert one["losses"] == pytest.approx(losses, abs=1e-5)
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["shares"] == found[1]["shares"] and found[0]["changes"] == found[1]["changes"]


def check_is_relieved(one: dict[str, Any]) -> None:
    assert one["shares"][0] in ([], [8, 8])
    assert one["slow"] == [12, 4]  # it takes three times as long for a row
    assert one["changes"][0] == one["slow"]
    [named] = [text for text in one["named"] if "process 1 (host " in text]
    assert (
        "times as long as the fastest" in named and f"gets {one['slow'][1]} rows of every batch instead of 8" in named
    )


def test_a_process_that_is_really_slow_is_found_by_the_time_in_its_segments(tmp_path: Path) -> None:
    found = run_job("real", tmp_path, SCRIPT)
    check(found)
    for one in found:
        assert 8 < one["slow"][0] < 16 and one["end"][0] < one["slow"][0]


@pytest.mark.parametrize("corner", ["steps", "ahead"])
def test_a_slow_process_gets_fewer_rows_until_it_recovers(corner: str, tmp_path: Path) -> None:
    found = run_job(corner, tmp_path, SCRIPT)
    check(found)
    for one in found:
        check_is_relieved(one)
        assert one["end"] == [8, 8]
    if corner == "steps":  # each reads its own rows: those of before or after, or of both while they change
        for rank, one in enumerate(found):
            assert one["rows"][0] == 8
            pairs = zip(one["rows"], one["shares"], strict=True)
            assert sum(rows == shares[rank] for rows, shares in pairs if shares) >= len(one["rows"]) - 40


def test_parts_of_parameters_and_their_states_go_along(tmp_path: Path) -> None:
    found = run_job("fully_sharded", tmp_path, SCRIPT)
    check(found)
    for one in found:
        check_is_relieved(one)
        assert not one["whole"]


@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
def test_compiled_segments_of_the_new_shares_are_made_before_they_are_used(tmp_path: Path) -> None:
    found = run_job("compiled", tmp_path, SCRIPT)
    check(found)
    for one in found:
        check_is_relieved(one)
        assert one["compiled"]


def test_a_plan_that_was_given_stays_and_the_slow_process_is_named(tmp_path: Path) -> None:
    found = run_job("given", tmp_path, SCRIPT)
    check(found)
    for one in found:
        assert one["changes"] == [] and one["end"] in ([], [8, 8])
        [named] = [text for text in one["named"] if "process 1 (host " in text]
        assert "all wait for it, as the plan was given" in named


def test_a_slow_replica_gets_fewer_rows_and_all_rows_count_alike(tmp_path: Path) -> None:
    found = run_job("replicas", tmp_path, SCRIPT)
    first, second = found
    assert first["shares"] == second["shares"] and first["changes"] == second["changes"]
    assert first["weights"] == second["weights"]
    num_steps = len(first["losses"])
    held = [[8, 8], *first["shares"]][:num_steps]  # what was known before the step
    together = [
        (rows[0] * one + rows[1] * other) / 16
        for rows, one, other in zip(held, first["losses"], second["losses"], strict=True)
    ]
    assert together == pytest.approx(uneven_job.plain_losses(num_steps, coupled=False), abs=1e-5)
    assert first["slow"] == [12, 4] and first["end"] == [8, 8]
    for rank, one in enumerate(found):
        assert any("replica 1 (host " in text for text in one["named"])
        assert all(rows >= dealt[rank] for rows, dealt in zip(one["rows"], held, strict=True))
