"""The command `partita`, verb by verb, on a small model; most in this process, because each start costs seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from partita.cli import main
from partita.cli.output import table
from partita.cli.target import load_cluster, load_target
from partita.cluster import Link
from partita.cluster import doctor as doctor_module
from partita.cluster import measure as measuring
from partita.cluster.doctor import Finding
from partita.errors import ClusterError, InputError
from partita.plan import Plan

SCRIPT = """
import sys
import partita
import torch
from torch import nn

NOT_A_FUNCTION = 3


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return model, loss_fn, (torch.randn(8, 8), torch.randn(8, 4)), torch.optim.SGD(model.parameters(), lr=0.1)


def two():
    return 1, 2


def swapped():
    model, loss_fn, batch, _ = task()
    return loss_fn, model, batch


if __name__ == "__main__":
    model, loss_fn, batch, optimizer = task()
    print("arguments", sys.argv[1:])
    if "fail" in sys.argv:
        raise ValueError("the user's own mistake")
    if "exit" in sys.argv:
        sys.exit(7)
    if "none" in sys.argv:
        sys.exit(0)
    fixed = partita.Constraints(num_workers=1, compiled=False)
    with partita.parallelize(model, optimizer, loss_fn, batch, plan=fixed) as step:
        for _ in range(3):
            result = step(batch)
    print("steps made", result.step)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def _plan(name: str = "plan.json", *options: str) -> Plan:
    assert main(["plan", "train.py:task", "--compiled", "False", "--num-workers", "1", *options, "--out", name]) == 0
    return Plan.load(name)


def test_plan_show_and_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan()
    assert "saved to plan.json" in capsys.readouterr().out
    assert main(["show", "plan.json"]) == 0
    assert capsys.readouterr().out.strip() == str(plan)
    assert main(["show", "plan.json", "--explain"]) == 0
    assert capsys.readouterr().out.strip() == plan.explain()
    assert main(["show", "plan.json", "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out.encode()) == plan
    assert main(["show", "plan.json", "--diff", "plan.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"same": True, "differences": []}
    assert main(["simulate", "train.py:task", "--plan", "plan.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == plan.hash and found["timeline"]["events"]
    assert main(["simulate", "train.py:task", "--plan", "plan.json"]) == 0
    assert "worker 0" in capsys.readouterr().out


def test_plan_for_machines_that_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cluster", "2x1xcpu-2", "--data", "2", "--pipeline", "1", "--num-microbatches", "1", "--json"]
    assert main(["plan", "train.py:task", *options]) == 0
    plan = Plan.from_json(capsys.readouterr().out.encode())
    assert [worker.process for worker in plan.workers] == [0, 1]


def test_run_trains_with_metrics_and_hands_arguments_on(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "train.py", "--lr", "3", "--runs", "r", "--json", "--", "--plan", "--dry-run"])
    assert code == 0
    out, err = capsys.readouterr()
    assert "arguments ['--lr', '3', '--plan', '--dry-run']" in err and "steps made 3" in err
    summary = json.loads(out)
    assert summary["num_steps"] == 3
    events = [json.loads(line) for line in Path(summary["metrics"]).read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step_finished"]
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert steps[-1]["loss"] == summary["loss"]
    assert [event["event"] for event in events].count("plan_chosen") == 1


def test_run_with_another_plan_for_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan("other.json", "--num-microbatches", "2")
    capsys.readouterr()
    assert main(["run", "train.py", "--plan", "other.json", "--dry-run", "--json"]) == 0
    out = capsys.readouterr().out
    assert "steps made" not in out
    summary = json.loads(out)
    assert summary["num_steps"] == 1 and summary["memory_bytes"] >= 0
    assert msgspec.convert(summary["plan"], Plan).hash == plan.hash
    assert main(["run", "train.py", "--plan", "other.json", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "estimate" in captured.out and "first step" in captured.out and "plan: 1 worker" in captured.err


def test_run_ends_as_the_script_ends(capsys: pytest.CaptureFixture[str]) -> None:
    argv, path = sys.argv, list(sys.path)
    assert main(["run", "train.py", "exit"]) == 7
    assert main(["run", "train.py", "fail"]) == 1
    error = capsys.readouterr().err
    assert "the user's own mistake" in error and 'File "train.py", line' in error
    assert "runpy" not in error  # only the user's own frames
    assert main(["run", "train.py", "none", "--dry-run"]) == 1
    assert "made no step" in capsys.readouterr().err
    assert sys.argv is argv and sys.path == path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "train.py"], "file.py:function"),
        (["plan", "absent.py:task"], "no file 'absent.py'"),
        (["plan", "train.py:taks"], "Nearest: task"),
        (["plan", "train.py:NOT_A_FUNCTION"], "no function"),
        (["plan", "train.py:two"], "returned 2 values"),
        (["plan", "train.py:swapped"], "must return an nn.Module first, but it returned function"),
        (["plan", "no_such_module_here:task"], "no module"),
        (["plan", "train.py:task", "--cluster", "4x8xH10"], "H100"),
        (["plan", "train.py:task", "--cluster", "no/where"], "no file 'no/where'"),
        (["plan", "train.py:task", "--cluster", "absent.toml"], "readable"),
        (["plan", "train.py:task", "--data", "0"], "positive integer"),
        (["show", "absent.json"], "PlanError"),
        (["simulate", "plan.json"], "--plan plan.json"),
        (["run", "absent.py"], "no file 'absent.py'"),
        (["run", "train.py", "--plan", "absent.json"], "PlanError"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("partita: ") and message in error and "Traceback" not in error


def test_a_wrong_command_line_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["plann"], [], ["show"], ["plan", "train.py:task", "--dta", "2"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fine = Finding(status="OK", subject="a", detail="well")
    bad = Finding(status="FAIL", subject="b", detail="ill", cure="rest")
    monkeypatch.setattr(doctor_module, "diagnose", lambda: (fine,))
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor_module, "diagnose", lambda: (fine, bad))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  b  ill" in out and "-> rest" in out and "1 OK, 0 WARN, 1 FAIL" in out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][1]["cure"] == "rest"


def test_profile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measuring, "WINDOW_S", 0.002)
    monkeypatch.setattr(measuring, "measure_process_link", lambda *, timeout_s: Link(bytes_per_s=2e9, latency_s=1e-4))
    monkeypatch.setattr(measuring, "busy_cores", lambda cores, *, sample_s: 1e3)
    assert main(["profile", "--json", "train.py:task"]) == 0
    captured = capsys.readouterr()
    found: dict[str, Any] = json.loads(captured.out)
    assert found["machine"]["flops_per_s_per_core"] > 0 and found["target"]["num_measured"] > 0
    assert "warning" in captured.err and "--again" in captured.err
    assert main(["profile"]) == 0
    assert "2.00 GB/s, latency 100 us" in capsys.readouterr().out


def test_targets_and_clusters(place: Path) -> None:
    target = load_target("train:task")
    assert target.optimizer is not None and target.loss_fn(target.model, target.batch).dim() == 0
    cluster = load_cluster("2x1xcpu-4")
    cluster.save(place / "c.toml")
    assert load_cluster("c.toml") == cluster
    with pytest.raises(ClusterError, match="preset"):
        load_cluster("nothing-like-it")
    (place / "broken.py").write_text("import no_such_thing_at_all\n")
    with pytest.raises(ModuleNotFoundError):  # the user's own mistake is not hidden behind ours
        load_target("broken:task")
    with pytest.raises(InputError):
        load_target(":task")


def test_tables() -> None:
    assert table([("a", 1), ("bcd", 20)], titles=("x", "y")) == "x    y\na    1\nbcd  20"
    assert table([]) == ""


def test_python_m_partita() -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "partita", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0
    for verb in ("doctor", "profile", "plan", "show", "run", "simulate"):
        assert verb in done.stdout


def test_profile_from_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"model": "GPT-1B", "layers": 16, "hidden": 2048, "heads": 16, "seq": 1024, "gpu": "A100", "n_gpus": 8,
           "tp": 1, "pp": 1, "dp": 8, "micro_batch": 4, "global_batch": 64, "remat": "full", "dtype": "fp16",
           "step_time_s": 0.9}  # fmt: skip
    path, out = tmp_path / "runs.json", tmp_path / "constants.json"
    path.write_text(json.dumps([row, row | {"seq": None}]))
    assert main(["profile", "--from-runs", str(path), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    found: dict[str, Any] = json.loads(captured.out)
    assert found["num_runs"] == 1 and found["error_after"] < found["error_before"]
    assert "row 1: seq is absent" in captured.err and json.loads(out.read_text()) == found["generations"]
    assert main(["profile", "--from-runs", str(path), "--out", str(out)]) == 0
    assert "ampere matmul" in capsys.readouterr().out
    path.write_text("[]")
    assert main(["profile", "--from-runs", str(path)]) == 1
