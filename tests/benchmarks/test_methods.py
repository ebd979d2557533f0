"""What the comparison of synchronisation methods and that of faults judge by."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.fault_job import plain_losses
from benchmarks.faults import misses_of
from benchmarks.method_entries import entries, formula, parts_of_model
from benchmarks.method_outcomes import MOST_FACTOR, OUTCOMES, steps_factor
from benchmarks.methods import summarise

CURVE = [(10, 4.0), (20, 3.0), (30, 3.5), (40, 2.0)]


@pytest.mark.parametrize(
    ("loss", "factor"),
    [(2.0, 1.0), (1.5, 1.0), (2.5, 40 / 30), (3.0, 2.0), (3.2, 40 / 18), (4.0, 4.0), (9.0, 4.0)],
)
def test_steps_that_exact_training_needs_for_a_loss(loss: float, factor: float) -> None:
    assert steps_factor(CURVE, loss) == pytest.approx(factor)
    assert steps_factor([(1, 4.0), (1000, 1.0)], 4.0) == MOST_FACTOR


def row(task: str, method: str, **values: Any) -> dict[str, Any]:
    return {"task": task, "method": method, **values}


def test_known_outcomes_are_held_against_the_rows() -> None:
    losses = {"exact": 1.0, "diloco H=10": 1.1, "diloco H=20": 1.2, "diloco H=50": 1.3, "one process": 1.4}
    rows = [row("chars", name, loss=loss) for name, loss in losses.items()]
    outcome = next(one for one in OUTCOMES if "one process" in one.methods)
    assert outcome.holds(rows) is True
    assert outcome.holds(rows[1:]) is None
    rows[1]["loss"] = 1.25
    assert outcome.holds(rows) is False
    summary, misses = summarise(rows)
    assert summary["outcomes"][outcome.text] is False and any(outcome.text in text for text in misses)
    assert all(name in entries(one.task) for one in OUTCOMES for name in one.methods)


def test_bytes_are_those_of_every_sum() -> None:
    from torch import nn

    from partita import sync

    parts = parts_of_model(nn.Linear(10, 10))
    whole, halves = [parts], [parts[:1], parts[1:]]
    method = sync.Rounded(to="bf16")
    assert formula(method, halves, 2, 0, 5) == formula(method, whole, 2, 0, 5)
    speeds = 2 * 3 * 8 / 20  # what replicas tell of themselves, every 20 steps
    sent = sync.DiLoCo(every=1).sent_bytes(parts, _peers()) * 2 / 25 + speeds
    assert formula(sync.DiLoCo(every=10), whole, 2, 0, 25) == pytest.approx(sent)


def _peers() -> Any:
    from partita.training.sync.method import Peers

    return Peers((0, 1), 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"deviation": 1e-6, "lost_steps": 0, "others_s": 0.5}, ""),
        ({"deviation": 1e-2, "lost_steps": 0, "others_s": 0.5}, "must be those of plain PyTorch"),
        ({"deviation": 0.0, "lost_steps": 2, "others_s": 0.5}, "nothing must be lost"),
        ({"deviation": 0.0, "lost_steps": 0, "others_s": 1.5}, "within 1 s"),
        ({"errors": "Hung: a step"}, "Hung"),
    ],
)
def test_every_limit_of_a_fault_that_is_missed_is_told(values: dict[str, Any], words: str) -> None:
    found = misses_of({"fault": "kill -9", **values})
    assert (not found) if not words else any(words in text for text in found)


def test_losses_of_the_faults_job_fall() -> None:
    losses = plain_losses(60)
    assert losses[-1] < losses[0] and len(losses) == 60
