"""The envelope, the table's cells, and children that answer, fail, hang or end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import Report, first_line, format_cell, median, option_parser, show
from benchmarks.processes import Child, ChildError, Group, free_port, job_environment

ECHO = "tests.benchmarks.echo"


def test_report_has_the_common_envelope_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    report = Report("example", {"num_steps": 3}, path=path)
    report.add({"family": "lstm", "value": 1.5})
    written = json.loads(path.read_text())
    assert list(written) == ["benchmark", "machine", "started", "settings", "rows", "summary", "misses"]
    assert written["rows"] == [{"family": "lstm", "value": 1.5}] and written["summary"] == {}
    assert {"cpu", "num_cores", "memory_bytes", "torch", "load"} <= set(written["machine"])
    report.finish({"share": 0.5}, ["share must be 1"])
    assert json.loads(path.read_text())["misses"] == ["share must be 1"]
    assert (report.exit_code(check=True), report.exit_code(check=False)) == (1, 0)
    assert not list(tmp_path.rglob("*.part"))


def test_show_prints_rows_summary_and_misses(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("example", {}, rows=[{"family": "lstm", "value": 0.123456}])
    report.finish({"share": 0.25}, ["too small"])
    show(report, ("family", "value"))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("lstm", "0.123", "share: 0.25", "MISSED: too small"))


def test_cells_and_helpers() -> None:
    cells = [format_cell(value) for value in (None, True, 1e-7, "a", {"x": 0.5})]
    assert cells == ["", "yes", "1e-07", "a", "x 0.5"]
    assert median([3.0, 1.0, 2.0]) == 2.0 and median([]) != median([])
    assert first_line("\n  first \nsecond") == "first" and first_line("") == ""
    options = option_parser("x").parse_args(["--json", "f", "--check", "--families", "a,b"])
    assert (options.json, options.check, options.families, options.child) == (Path("f"), True, "a,b", None)


def test_child_answers_in_turn_and_reports_exceptions() -> None:
    with Child(ECHO, "role", num_threads=3, environment={"EXTRA": "1"}) as child:
        reply = child.ask({"do": "environment"}, 60)
        assert reply["OMP_NUM_THREADS"] == "3" and reply["OMP_WAIT_POLICY"] == "passive" and reply["EXTRA"] == "1"
        failed = child.ask({"do": "raise"}, 60)
        assert failed["error_type"] == "ValueError" and failed["error"] == "as asked"
        assert child.ask({"do": "echo", "value": [1, 2]}, 60) == {"value": [1, 2]}


def test_child_that_ends_or_hangs_is_named_with_its_last_words() -> None:
    with Child(ECHO, "role") as child, pytest.raises(ChildError, match=r"exit status 3[\s\S]*last words"):
        child.ask({"do": "exit"}, 60)
    with Child(ECHO, "role") as child:
        child.ask({"do": "echo"}, 60)
        with pytest.raises(ChildError, match="did not answer within"):
            child.ask({"do": "hang"}, 0.3)
        process_id = child.process_id
        child.close(grace_s=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_group_members_know_their_job() -> None:
    with Group(ECHO, "role", num_processes=2) as group:
        replies = group.ask({"do": "environment"}, 60)
    assert [(reply["RANK"], reply["WORLD_SIZE"], reply["LOCAL_RANK"]) for reply in replies] == [
        ("0", "2", "0"),
        ("1", "2", "1"),
    ]
    assert len({reply["MASTER_PORT"] for reply in replies}) == 1


def test_a_single_child_belongs_to_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in job_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with Child(ECHO, "role") as child:
        assert "RANK" not in child.ask({"do": "environment"}, 60)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_children_end_when_their_parent_is_killed() -> None:
    code = (
        "import os, signal; from benchmarks.processes import Child; child = Child('tests.benchmarks.echo', 'role');"
        "child.ask({'do': 'echo'}, 60); child.send({'do': 'hang'}); print(child.process_id, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    status = Path(f"/proc/{int(parent.stdout)}/stat")
    deadline_s = time.monotonic() + 30
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline_s, "the child outlives its parent"
        time.sleep(0.05)
