"""The same script under every launcher: it trains as plain PyTorch does in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from plain_training import train_plain

SCRIPT = Path(__file__).with_name("launched.py")
ROOT = Path(__file__).parents[2]
LIMIT_S = 600
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FOREIGN = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "TORCHELASTIC_")


def environment(cache: Path) -> dict[str, str]:
    """This process' own, without what another launcher may have left in it."""
    kept = {
        name: value for name, value in os.environ.items() if name not in JOB_VARIABLES and not name.startswith(FOREIGN)
    }
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PARTITA_CACHE": str(cache)}


def finish(processes: list[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            output = process.communicate(timeout=LIMIT_S)[0]
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def expected(count: int) -> tuple[list[float], list[float]]:
    """Losses and sums of the weights of plain PyTorch."""
    spec = importlib.util.spec_from_file_location("launched", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model, optimizer = script.build()
    losses = train_plain(model, optimizer, map(script.batch, range(count)), script.loss_fn)
    return losses, [float(value.detach().sum()) for value in model.parameters()]


def compare(folder: Path, launcher: str, *, num_processes: int | None = 2) -> list[dict[str, Any]]:
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    losses, weights = expected(len(results[0]["losses"]))
    for rank, result in enumerate(results):
        assert (result["rank"], result["launcher"]) == (rank, launcher)
        assert result["losses"] == pytest.approx(losses, rel=1e-4)
        assert result["weights"] == pytest.approx(weights, rel=1e-3, abs=1e-4)
        assert num_processes is None or result["processes"] == num_processes
    return results


def slurm(rank: int, job: int) -> dict[str, str]:
    """What srun tells task `rank` of a step of two tasks on this host."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }


def test_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish([start([*launcher, str(SCRIPT), str(tmp_path), "given"], environment(tmp_path / "cache"))])
    compare(tmp_path, "torchrun")


MPIRUNS = {
    "Open MPI": ("mpirun.openmpi", ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]),
    "MPICH": ("mpirun.mpich", []),
}


@pytest.mark.parametrize("launcher", MPIRUNS)
def test_mpirun(launcher: str, tmp_path: Path) -> None:
    name, options = MPIRUNS[launcher]
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{launcher} is not installed ({name} of Debian's openmpi-bin or mpich)")
    command = [found, *options, "-np", "2", sys.executable, str(SCRIPT), str(tmp_path), "given"]
    finish([start(command, environment(tmp_path / "cache"))])
    compare(tmp_path, launcher)


def test_srun(tmp_path: Path) -> None:
    """With the environment that it gives; Slurm itself needs a cluster."""
    variables = environment(tmp_path / "cache")
    job = os.getpid()
    command = [sys.executable, str(SCRIPT), str(tmp_path), "given"]
    finish([start(command, variables | slurm(rank, job)) for rank in range(2)])
    compare(tmp_path, "srun")


def test_a_plan_is_adopted_in_a_job(tmp_path: Path) -> None:
    """All processes change from candidate to candidate at the same steps, and adopt the same plan."""
    variables = environment(tmp_path / "cache")
    command = [sys.executable, str(SCRIPT), str(tmp_path), "auto"]
    finish([start(command, variables | slurm(rank, os.getpid() + 1)) for rank in range(2)])
    results = compare(tmp_path, "srun", num_processes=None)
    assert all(result["settled"] for result in results)
    assert results[0]["plan"] == results[1]["plan"]
    assert results[0]["losses"] == results[1]["losses"]


def test_alone(tmp_path: Path) -> None:
    finish([start([sys.executable, str(SCRIPT), str(tmp_path), "given"], environment(tmp_path / "cache"))])
    result = json.loads((tmp_path / "0.json").read_text())
    losses, weights = expected(len(result["losses"]))
    assert result["launcher"] == "" and result["processes"] == 1
    assert result["losses"] == pytest.approx(losses, rel=1e-4)
    assert result["weights"] == pytest.approx(weights, rel=1e-3, abs=1e-4)
    assert not torch.distributed.is_initialized()
