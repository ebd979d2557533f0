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
ROOT = Path(__file__).parents[2]


def run_job(corner: str, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
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
        command = [sys.executable, str(SCRIPT), corner, str(folder), str(rank)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
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
            moments = [float(value["exp_avg"].sum()) for value in optimizer.state.values()]
        optimizer.zero_grad()
        loss = script.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, state, moments


@pytest.mark.parametrize("corner", ["data", "pipeline", "block"])
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
