"""The cache folder: round trip, damage, names."""

from __future__ import annotations

from pathlib import Path

import pytest

from partita.cache import cache_dir, read_json, write_json
from partita.errors import PartitaError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))


def test_round_trip_and_damage() -> None:
    assert read_json("a/b.json") is None
    path = write_json("a/b.json", {"x": [1, 2.5]})
    assert read_json("a/b.json") == {"x": [1, 2.5]}
    assert [item.name for item in path.parent.iterdir()] == ["b.json"]  # no temporary file stays
    path.write_text("{damaged")
    assert read_json("a/b.json") is None
    path.write_text("[1]")
    assert read_json("a/b.json") is None


def test_a_failed_write_keeps_the_old_value() -> None:
    write_json("b.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json("b.json", {"x": object()})
    assert read_json("b.json") == {"x": 1}


@pytest.mark.parametrize("name", ["", "/etc/x", "../x"])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(PartitaError):
        read_json(name)


def test_an_explicit_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "file"))
    with pytest.raises(PartitaError, match="PARTITA_CACHE"):
        cache_dir()
