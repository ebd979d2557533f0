"""Copies of a job's state in the memory of other machines: placement, and crashes of real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import memory_job
from test_training_processes import ROOT, run_job, run_processes

from partita import Checkpoints, Elastic, InMemory
from partita.errors import CheckpointError, InputError
from partita.training.checkpoint.memory import Memory, buddies, found_in, make_private

SCRIPT = Path(memory_job.__file__)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_everybody_keeps_copies_of_one_process_on_another_machine(machines: list[int]) -> None:
    found = buddies(machines)
    assert sorted(found) == list(range(len(machines)))
    most = max(machines.count(machine) for machine in machines)
    if 2 * most <= len(machines):
        assert all(machines[found[rank]] != machine for rank, machine in enumerate(machines))
    if len(machines) > 1:
        assert all(buddy != rank for rank, buddy in enumerate(found))


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="must be in a folder of this user"):
        make_private(tmp_path / "link")
    make_private(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o077 == 0


def test_what_nobody_can_go_on_from_takes_no_memory(tmp_path: Path) -> None:
    def left(*names: str) -> None:
        for name in names:
            (tmp_path / "job" / name).mkdir(parents=True)
            (tmp_path / "job" / name / "checkpoint.json").touch()

    left("process-00000/step-00000004", "process-00000/step-00000006", "process-00000/step-00000090")  # 90: of a past
    left("process-00000/.writing-x", "process-00003/step-00000002", "process-00003/step-00000004")
    memory = Memory(root=tmp_path / "job", rank=0, buddies=(1, 0))
    begun = memory.begin(8)
    there = {str(path.relative_to(tmp_path / "job")) for path in (tmp_path / "job").glob("process-*/*")}
    kept = {"process-00000/step-00000004", "process-00000/step-00000006", "process-00003/step-00000004"}
    assert there == kept | {str(begun.relative_to(tmp_path / "job"))}
    memory.clear()
    assert {path.name for path in (tmp_path / "job").iterdir()} == {"process-00003"}


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"every_steps": True}, {"every_steps": 2, "folder": 3}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        InMemory(**options)
    with pytest.raises(InputError, match=r"memory must be partita\.InMemory"):
        Checkpoints("somewhere", memory=20)  # type: ignore[arg-type]


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """The folder of a job of which process 1 was killed, and its machine lost with its memory."""
    (_, output), (code, _) = run_processes(SCRIPT, "crash", tmp_path)
    assert code == -9 and "PeerLostError" in output, output[-3000:]
    shutil.rmtree(tmp_path / "machine-1")
    return tmp_path


def check_goes_on(folder: Path, step: int) -> list[dict[str, Any]]:
    found = run_job("again", folder, SCRIPT)
    check_is_as_undisturbed(found, folder, step)
    return found


def check_is_as_undisturbed(found: list[dict[str, Any]], folder: Path, step: int) -> None:
    losses = memory_job.plain_losses()
    for one in found:
        assert one["begun"] == step
        assert one["losses"] == {str(n + 1): pytest.approx(losses[n], abs=1e-5) for n in range(step, memory_job.END)}
    for rank in range(2):  # the job has come to its end: its copies are gone
        assert found_in(folder / f"machine-{rank}") == []
        assert not list((folder / f"machine-{rank}").glob("**/process-*"))


def test_a_lost_machine_is_made_up_for_by_the_copies_on_another_one(crashed: Path) -> None:
    found = check_goes_on(crashed, memory_job.LAST_COPY)  # on disk is step 5
    assert ["loaded", memory_job.LAST_COPY] in found[0]["actions"]
    assert ["copied", memory_job.END] in found[1]["actions"]


def test_a_damaged_copy_is_passed_over_for_the_one_before(crashed: Path) -> None:
    [damaged] = crashed.glob(f"machine-0/**/step-{memory_job.LAST_COPY:08d}/weights-00002-of-00002.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    found = check_goes_on(crashed, memory_job.LAST_COPY - 2)
    assert any("lack weights-00002-of-00002.safetensors" in text for text in found[0]["messages"])


def test_without_any_copy_the_last_checkpoint_on_disk_counts(crashed: Path) -> None:
    shutil.rmtree(crashed / "machine-0")
    check_goes_on(crashed, memory_job.ON_DISK)


def test_a_launcher_that_starts_the_job_again_needs_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SCRIPT), "crash", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    check_is_as_undisturbed(found, tmp_path, memory_job.LAST_COPY)


def test_an_elastic_job_needs_no_copies(tmp_path: Path) -> None:
    model, optimizer = memory_job.build()
    import partita

    with pytest.raises(InputError, match="a living process gives its state"):
        partita.parallelize(
            model,
            optimizer,
            memory_job.loss_fn,
            memory_job.batch_of(0),
            elastic=Elastic(lighthouse="http://127.0.0.1:1"),
            checkpoints=Checkpoints(tmp_path, memory=InMemory(2)),
        )
