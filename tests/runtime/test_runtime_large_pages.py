from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from partita.runtime import large_pages
from partita.runtime.large_pages import LARGE, use_large_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_large_pages = pytest.mark.skipif(
    sys.platform != "linux" or not SETTING.exists() or "[never]" in SETTING.read_text(),
    reason="the system must know and allow transparent huge pages",
)


# In a process of its own: in that of the tests, memory is scattered and mappings have grown together.
SCRIPT = """
import sys
from pathlib import Path
import torch
from partita.runtime.large_pages import LARGE, use_large_pages

def large_bytes_at(place):
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and ":" not in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= place < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0

touched = torch.arange(64 * LARGE // 8)
expected = touched.sum()
moved = use_large_pages(budget_s=60.0)
assert touched.sum() == expected and (touched[1:] - touched[:-1] == 1).all()
print(moved, large_bytes_at(touched.data_ptr()) // LARGE)

untouched = torch.empty(512 * LARGE, dtype=torch.uint8)
before = large_bytes_at(untouched.data_ptr())
use_large_pages(budget_s=60.0)
print((large_bytes_at(untouched.data_ptr()) - before) // LARGE)
"""


@needs_large_pages
def test_what_is_there_is_moved_with_its_values_and_what_is_not_there_is_left_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True)
    moved, large, grown = map(int, done.stdout.split())
    if moved == 0:
        pytest.skip("the kernel has no MADV_COLLAPSE (Linux 6.1)")
    assert moved >= 32 * LARGE and large >= 32  # of 64, as far as the system has such pieces
    assert grown < 256  # of 512


def test_no_time_moves_nothing() -> None:
    assert use_large_pages(budget_s=0.0) == 0


def test_a_system_without_them_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(large_pages, "_SETTING", tmp_path / "missing")
    assert use_large_pages() == 0
    (tmp_path / "missing").write_text("always madvise [never]\n")
    assert use_large_pages() == 0
