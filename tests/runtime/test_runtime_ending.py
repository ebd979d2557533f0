"""Every way for a process to end: with the exit code that it should have, nothing on standard error, and no thread left
that could want the interpreter's lock while that goes away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from partita.runtime import ending
from partita.runtime.ending import Order

SCRIPT = Path(__file__).with_name("ending_script.py")
ROOT = Path(__file__).parents[2]
LIMIT_S = 150


def run_job(mode: str, folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of both processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(port), mode, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def assert_at_rest(folder: Path, *, of_script: int = 0) -> None:
    """No thread but the main one, the store's server, which never touches Python, and those of groups of the script."""
    for rank in range(2):
        names = (folder / f"threads-{rank}").read_text().splitlines()
        assert "MainThread" in names
        left = [name for name in names if name.startswith(("gloo_tcp_loop", "partita"))]  # one loop a group
        assert left in ([], ["gloo_tcp_loop"] * of_script), f"rank {rank}: {names}"


@pytest.mark.parametrize("mode", ["closed", "open", "group of the script", "destroyed by the script", "fork"])
def test_a_script_that_ends_leaves_no_thread_and_says_nothing(mode: str, tmp_path: Path) -> None:
    for code, output, errors in run_job(mode, tmp_path):
        assert (code, output, errors) == (0, "finished\n", "")
    assert_at_rest(tmp_path, of_script=1 if "script" in mode else 0)


def test_a_script_that_raises_ends_with_its_own_error_alone(tmp_path: Path) -> None:
    for code, _, errors in run_job("raised", tmp_path):
        assert code == 1
        assert errors.endswith("ValueError: of the script\n"), errors
        assert errors.count("Traceback") == 1, errors
    assert_at_rest(tmp_path)


@pytest.mark.parametrize(("mode", "expected_code"), [("left", 5), ("interrupted", -2)])
def test_a_process_that_leaves_a_step_ends_with_its_code_and_the_other_is_told(
    mode: str, expected_code: int, tmp_path: Path
) -> None:
    (code, output, errors), (left_code, _, left_errors) = run_job(mode, tmp_path)
    assert code == 0 and "told: " in output and "rank 1" in output and not errors, (code, output, errors)
    assert left_code == expected_code, left_errors
    assert left_errors == "" if mode == "left" else left_errors.endswith("KeyboardInterrupt\n"), left_errors
    assert_at_rest(tmp_path)


class Noted:
    """Something to be closed that notes when it was, and may fail."""

    def __init__(self, name: str, notes: list[str], *, fails: bool = False) -> None:
        self.name, self.notes, self.fails = name, notes, fails

    def at_end(self) -> None:
        self.notes.append(self.name)
        if self.fails:
            raise ValueError(self.name)


@pytest.fixture
def nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_OPEN", {order: weakref.WeakSet() for order in Order})
    monkeypatch.setattr(ending, "_OWNERS", [os.getpid()])


@pytest.mark.usefixtures("nothing_open")
def test_workers_end_before_connections_and_an_error_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    connection, worker, collected = Noted("connection", notes), Noted("worker", notes, fails=True), Noted("gone", notes)
    ending.close_at_end(connection, Order.CONNECTIONS)
    ending.close_at_end(worker, Order.WORKERS)
    ending.close_at_end(collected, Order.WORKERS)
    del collected
    ending._close_all()
    assert notes == ["worker", "connection"]
    assert "ValueError: worker" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_open")
def test_a_fork_closes_what_is_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    of_parent, own = Noted("parent's", notes), Noted("own", notes)
    ending.close_at_end(of_parent, Order.WORKERS)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    ending._close_all()
    assert notes == []
    ending.close_at_end(own, Order.WORKERS)
    ending._close_all()
    assert notes == ["own"]
