"""Constants of generations: which one a kind takes, files, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from partita.cluster.presets import GPU_KINDS
from partita.cost.calibration import GENERATIONS, LIMITS, PRIOR_SPREADS, Calibration, Constants
from partita.errors import InputError


def test_every_kind_has_constants() -> None:
    for kind in GPU_KINDS.values():
        assert kind.generation != "unknown"
        assert isinstance(Calibration().of(kind.generation), Constants)
    assert set(PRIOR_SPREADS) <= set(vars(Constants()))
    for constants in GENERATIONS.values():
        for name, (low, high) in LIMITS.items():
            assert low <= getattr(constants, name) <= high


def test_save_and_load(tmp_path: Path) -> None:
    changed = Calibration().with_constants("volta", matmul=0.5)
    assert changed.save(tmp_path / "sub" / "c.json") == tmp_path / "sub" / "c.json"
    assert Calibration.load(tmp_path / "sub" / "c.json") == changed
    assert Calibration().of("volta").matmul != 0.5


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    assert Calibration.cached() == Calibration()
    changed = Calibration().with_constants("hopper", link=0.5)
    changed.save()
    assert Calibration.cached() == changed


@pytest.mark.parametrize("text", ["[", "[]", '{"volta": 1}', '{"volta": {"speed": 1}}', '{"volta": {"matmul": -1}}'])
def test_wrong_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=r"c\.json"):
        Calibration.load(tmp_path / "c.json")
