"""`partita search`: what it refuses, and the small process that starts a killed command again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from partita.cli import attend, main

PATIENCE_S = 60.0
KILLED_ONCE = """
import os, signal, sys
with open(sys.argv[1], "a+") as file:
    file.write("started\\n")
    file.seek(0)
    first = len(file.readlines()) == 1
if first:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3)
"""
KILLED_ALWAYS = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
ENDS_WITH_ITS_STARTER = """
import os
print(os.getpid(), flush=True)
os.read(int(os.environ["PARTITA_LIFELINE"]), 1)
"""


def attended(*command: str, until_s: float | None = None) -> subprocess.Popen[str]:
    until = str(time.time() + 600 if until_s is None else until_s)
    return subprocess.Popen(
        [sys.executable, attend.__file__, until, sys.executable, "-c", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_command_is_started_again_until_it_ends_by_itself(tmp_path) -> None:
    with attended(KILLED_ONCE, str(tmp_path / "starts")) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3 and "killed by signal 9; it is started again" in errors
    assert (tmp_path / "starts").read_text() == "started\n" * 2


def test_nothing_is_started_again_when_its_time_is_over() -> None:
    with attended(KILLED_ALWAYS, until_s=time.time() - 1) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGKILL and "again" not in errors


def test_the_command_ends_with_who_attends_it() -> None:
    with attended(ENDS_WITH_ITS_STARTER) as process:
        assert process.stdout is not None
        command = psutil.Process(int(process.stdout.readline()))
        process.kill()
    psutil.wait_procs([command], timeout=PATIENCE_S)
    assert not command.is_running() or command.status() == psutil.STATUS_ZOMBIE


def test_who_asks_it_to_end_is_obeyed() -> None:
    with attended(ENDS_WITH_ITS_STARTER) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM


def test_it_stays_small() -> None:
    """It must survive what kills a search, so it is a file that imports the standard library alone."""
    code = f"""
import runpy, sys
runpy.run_path({attend.__file__!r})
print(sorted({{"torch", "partita"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
