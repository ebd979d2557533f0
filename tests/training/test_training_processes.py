"""Two real processes over the loopback: same losses and weights as plain PyTorch in one."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")
BROKEN = SCRIPT.with_name("broken_jobs.py")
ROOT = Path(__file__).parents[2]
LIMIT_S = 600  # a job that hangs; on two cores that others use as well, one that compiles has taken 150 s


def run_processes(script: Path, corner: str, folder: Path, *, num_started: int = 2) -> list[tuple[int, str]]:
    """Exit code and output of every process; the job is of two, of which `num_started` are started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_started):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(script), corner, str(folder), str(rank)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def run_job(corner: str, folder: Path, script: Path = SCRIPT) -> list[dict[str, Any]]:
    for code, output in run_processes(script, corner, folder):
        assert code == 0, output[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def expected() -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model, optimizer = script.build(0)
    batches = list(script.loader())
    losses = []
    for number, batch in enumerate([*batches, *batches, batches[0]]):
        if number == 2 * len(batches):
            state = {name: value.clone() for name, value in model.state_dict().items()}
            moments = [float(optimizer.state[item]["exp_avg"].sum()) for item in model.parameters()]
        optimizer.zero_grad()
        loss = script.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, state, moments


@pytest.mark.parametrize(
    "corner",
    [
        "data", "pipeline", "tensor", "fully sharded", "tensor and fully sharded", "block", "uneven shares",
        "second process first", "one of them alone",
    ],
)  # fmt: skip
def test_two_processes_equal_plain_pytorch(corner: str, tmp_path: Path) -> None:
    results = run_job(corner, tmp_path)
    losses, state, moments = expected()
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-4)
        for name, value in state.items():
            torch.testing.assert_close(torch.tensor(result["state"][name]), value, rtol=1e-3, atol=1e-5)
        assert result["moments"] == pytest.approx(moments, rel=1e-3, abs=1e-6)
    if corner == "data":  # each process read its half of the batches of the planned size
        assert [result["rows"][0] for result in results] == [4, 4]
    if corner == "one of them alone":
        assert [result["rows"][0] for result in results] == [8, 1]
    if corner == "uneven shares":
        assert [result["rows"][0] for result in results] == [6, 2]


@pytest.mark.parametrize(
    ("corner", "words"),
    [
        ("widths", "'2.bias': rank 0 has (12,) torch.float32, rank 1 has none"),
        ("optimizer", "rank 0: AdamW with groups of [279] elements, rank 1: SGD"),
    ],
)
def test_processes_with_other_models_or_optimizers_say_what_differs(corner: str, words: str, tmp_path: Path) -> None:
    for code, output in run_processes(BROKEN, corner, tmp_path):
        assert code == 3 and "StepError: every process must have the same " in output and words in output, output


def test_a_peer_that_never_comes_is_named_with_the_limit_that_was_given(tmp_path: Path) -> None:
    [(code, output)] = run_processes(BROKEN, "alone", tmp_path, num_started=1)
    assert code == 3 and "rank 1" in output and "within 3 s" in output, output


def test_a_process_killed_while_planning_is_named(tmp_path: Path) -> None:
    (code, output), _ = run_processes(BROKEN, "killed", tmp_path)
    assert code == 3 and "PeerLostError: process rank 1 (host " in output and "is gone" in output, output
    assert "the comparison of the captured graph" in output, output


def test_a_process_may_plan_for_longer_than_the_limit(tmp_path: Path) -> None:
    for code, output in run_processes(BROKEN, "slow", tmp_path):
        assert code == 0, output


def test_the_process_that_plans_for_all_is_named_when_it_is_killed(tmp_path: Path) -> None:
    _, (code, output) = run_processes(BROKEN, "planner killed", tmp_path)
    assert code == 3 and "PeerLostError: process rank 0 (host " in output and "is gone" in output, output
    assert "sharing a decision of rank 0" in output, output


def test_what_planning_raises_is_told_to_all(tmp_path: Path) -> None:
    (first, output0), (second, output1) = run_processes(BROKEN, "planner raises", tmp_path)
    assert (first, second) == (3, 3), output0 + output1
    assert output0.startswith("ZeroDivisionError: no rows at all"), output0
    assert "StepError: process rank 0 failed while it planned: ZeroDivisionError: no rows at all" in output1


@pytest.mark.parametrize("corner", ["fewer", "rows"])
def test_processes_that_do_different_things_end_with_an_error_of_their_own(corner: str, tmp_path: Path) -> None:
    for code, output in run_processes(BROKEN, corner, tmp_path):
        assert code == 3, output
        assert any(name in output for name in ("WaitTimeoutError: ", "PeerLostError: ", "StepError: ")), output
