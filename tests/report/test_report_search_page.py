"""The page about a search: complete by itself, with all candidates, and what they are called is text."""

from __future__ import annotations

import dataclasses
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from partita import InputError
from partita.report import write_search_page
from tests.search.made_up import candidate, result


class Outline(HTMLParser):
    """Tags, what they load, and the text of `pre`."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags[-1:] == ["pre"] else ""


def outline(path: Path) -> Outline:
    found = Outline()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def test_a_page_has_all_candidates_and_needs_nothing_else(tmp_path: Path) -> None:
    made = [candidate(i, 16 * (i + 1), 0.03 * i, 1e-3 * (1 + i)) for i in range(12)]
    found = result(*made)
    made[3] = dataclasses.replace(made[3], params={**made[3].params, "kind": "<script>alert(1)</script>"})
    found = dataclasses.replace(found, trials=tuple(made))
    path = write_search_page(found, tmp_path / "page.html")
    read = outline(path)
    assert read.loads == [], "nothing is loaded from elsewhere"
    assert read.text.strip() == found.explain().strip()
    text = path.read_text(encoding="utf-8")
    assert all(f"candidate {one.number}: " in text for one in made) and "<script>alert" not in text
    assert read.tags.count("h1") == 1


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = result(candidate(0, 16, 0.0, 1e-3))
    with pytest.raises(InputError, match="must be a file that can be written"):
        write_search_page(found, tmp_path / "no" / "page.html")
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    with pytest.raises(InputError, match=r"partita\[report\]"):
        write_search_page(found, tmp_path / "page.html")
