"""The exactness benchmark finds what is equal and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import exactness


def test_a_few_instances_are_equal(tmp_path: Path) -> None:
    file = tmp_path / "exactness.json"
    assert exactness.main(["--num", "5", "--json", str(file), "--check"]) == 0
    found = json.loads(file.read_text())
    assert found["summary"]["intra"]["equal"] == found["summary"]["inter"]["equal"] == 5
    assert len(found["rows"]) == 10


def test_what_differs_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**exactness.compare(1.0, 1.5, 0.0), "integral": True, "gap": 0.0, "bound_holds": True}
    monkeypatch.setattr(exactness, "KINDS", {"made up": lambda seed: row})
    assert exactness.main(["--num", "1", "--check"]) == 1


@pytest.mark.parametrize(
    ("best", "found", "equal"), [(1.0, 1.0 + 1e-9, True), (1.0, 1.1, False), (None, None, True), (None, 1.0, False)]
)
def test_infeasible_ones_are_equal_if_both_say_so(best: float | None, found: float | None, equal: bool) -> None:
    assert exactness.compare(best, found, 0.0)["equal"] is equal
