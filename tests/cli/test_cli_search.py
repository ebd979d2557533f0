"""`partita search`: what it refuses, and the process that goes on with a killed command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from partita.cli import main

PATIENCE_S = 60.0
BEGIN = """
import os, signal, sys, time
from partita.cli.attend import attend
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
attend(float(sys.argv[1]))
"""
KILLED_ONCE = """
with open(sys.argv[2], "a+") as file:
    file.write("started\\n")
    file.seek(0)
    first = len(file.readlines()) == 1
if first:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3)
"""
KILLED_ALWAYS = "os.kill(os.getpid(), signal.SIGKILL)"
WAITS = """
print(os.getpid(), flush=True)
time.sleep(600)
"""
PATIENT = """
try:
    print(os.getpid(), flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(7)
"""


def attended(code: str, *arguments: str, until_s: float | None = None) -> subprocess.Popen[str]:
    until = str(time.time() + 600 if until_s is None else until_s)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, until, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def test_a_killed_command_goes_on_until_it_ends_by_itself(tmp_path) -> None:
    with attended(KILLED_ONCE, str(tmp_path / "starts")) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3 and "killed by signal 9; it goes on in another process" in errors
    assert (tmp_path / "starts").read_text() == "started\n" * 2


def test_nothing_is_started_again_when_its_time_is_over() -> None:
    with attended(KILLED_ALWAYS, until_s=time.time() - 1) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGKILL and "goes on" not in errors


def test_the_command_ends_with_who_attends_it() -> None:
    with attended(WAITS) as process:
        assert process.stdout is not None
        command = psutil.Process(int(process.stdout.readline()))
        process.kill()
    psutil.wait_procs([command], timeout=PATIENCE_S)
    assert not command.is_running() or command.status() == psutil.STATUS_ZOMBIE


def test_who_asks_it_to_end_is_obeyed() -> None:
    with attended(WAITS) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM


def test_an_interruption_is_the_commands_own() -> None:
    """As a terminal sends it, to both: the command may save what it has, and its code is what counts."""
    with attended(PATIENT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 7


def test_the_command_is_killed_before_who_attends_it() -> None:
    with attended(WAITS) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        scores = [int(Path(f"/proc/{one}/oom_score_adj").read_text()) for one in (process.pid, child)]
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
    assert scores[1] > scores[0]


@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        (None, ["--deadline", "5s"], "SCRIPT must be a Python file"),
        ("x = 1\n", ["--deadline", "5s"], "must define build and data, but has no build and no data"),
        ("def build(trial): ...\ndef data(): ...\n", [], "--deadline must be given"),
        ("def build(trial): ...\ndef data(): ...\n", ["--deadline", "soon"], "deadline must be"),
        ("def build(trial): ...\ndata = 5\n", ["--deadline", "5s"], "data must be"),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, script: str | None, options: list[str], told: str) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"script_{abs(hash((script, *options)))}"
    path = tmp_path / f"{name}.py"
    if script is not None:
        path.write_text(script)
    assert main(["search", str(path), "--unattended", "--folder", str(tmp_path / "s"), *options]) == 1
    assert told in capsys.readouterr().err


def test_a_script_with_the_name_of_another_module_is_refused(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("def build(trial): ...\ndef data(): ...\n")
    assert main(["search", str(tmp_path / "json.py"), "--unattended", "--deadline", "5s"]) == 1
    assert "rename it" in capsys.readouterr().err
