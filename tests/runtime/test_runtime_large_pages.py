from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from partita.runtime import large_pages
from partita.runtime.large_pages import LARGE, use_large_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_large_pages = pytest.mark.skipif(
    sys.platform != "linux" or not SETTING.exists() or "[never]" in SETTING.read_text(),
    reason="the system must know and allow transparent huge pages",
)


def large_bytes_of(value: torch.Tensor) -> int:
    """Bytes in large pages of the mapping that holds the tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and ":" not in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= value.data_ptr() < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


@needs_large_pages
def test_memory_that_is_there_is_moved_and_keeps_its_values() -> None:
    values = torch.arange(32 * LARGE // 8)  # mapped for itself
    expected = values.clone()
    before = large_bytes_of(values)
    moved = use_large_pages(budget_s=30.0)
    if moved == 0:
        pytest.skip("the kernel has no MADV_COLLAPSE (Linux 6.1)")
    assert torch.equal(values, expected)
    assert large_bytes_of(values) >= max(before, 28 * LARGE)


@needs_large_pages
def test_memory_that_was_never_touched_is_left_alone() -> None:
    values = torch.empty(64 * LARGE, dtype=torch.uint8)
    use_large_pages(budget_s=30.0)
    assert large_bytes_of(values) <= 2 * LARGE


def test_no_time_moves_nothing() -> None:
    assert use_large_pages(budget_s=0.0) == 0


def test_a_system_without_them_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(large_pages, "_SETTING", tmp_path / "missing")
    assert use_large_pages() == 0
    (tmp_path / "missing").write_text("always madvise [never]\n")
    assert use_large_pages() == 0
