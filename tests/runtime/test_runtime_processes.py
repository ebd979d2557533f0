"""Two real processes over gloo: exchanges of all kinds, and every way in which one of them can end too early."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runtime_cases import free_port

SCRIPT = Path(__file__).parent / "process_script.py"
ROOT = Path(__file__).parents[2]


def job(mode: str) -> list[tuple[int, str, str]]:
    """Exit code, output and error output of both ranks."""
    port = str(free_port())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), port, mode],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    deadline_s = time.monotonic() + 100
    try:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=max(deadline_s - time.monotonic(), 1))
            results.append((process.returncode, out, err))
        return results
    finally:
        for process in processes:
            process.kill()


def test_all_exchanges_between_processes() -> None:
    for code, out, err in job("ok"):
        assert code == 0 and "done" in out, err


@pytest.mark.parametrize("mode", ["kill", "leave"])
def test_a_lost_process_is_named_on_the_other(mode: str) -> None:
    (code, out, err), _ = job(mode)
    assert code == 3, err
    assert out.startswith("PeerLostError: process rank 1 (host ") and ", pid " in out and "is gone" in out


def test_the_process_that_holds_the_store_may_be_the_one_that_is_lost() -> None:
    _, (code, out, err) = job("kill0")
    assert code == 3, err
    assert out.startswith("PeerLostError: process rank 0 (host ") and "is gone" in out


def test_a_worker_that_raises_ends_both_processes_with_its_words() -> None:
    (first, out0, err0), (second, out1, err1) = job("raise")
    assert (first, second) == (3, 3), err0 + err1
    assert out1.startswith("WorkerError: worker ") and "the user's own words" in out1
    assert out0.startswith("StepError: process rank 1 (host ") and "the user's own words" in out0


def test_a_process_that_hangs_is_a_time_out_on_both() -> None:
    (first, out0, err0), (second, out1, err1) = job("hang")
    assert (first, second) == (3, 3), err0 + err1
    assert "must not wait longer than timeout_s=3" in out0 + out1
