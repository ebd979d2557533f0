"""Crashes, full disks and strangers: what was committed stays, nothing half-written is left, and no code runs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_cases import Trap, build, same, trained, write

from partita.errors import CheckpointError
from partita.training.checkpoint import folder as folders
from partita.training.checkpoint.loader import load


class Crash(BaseException):
    """The process is gone: nobody tidies up."""


def test_a_crash_at_every_moment_of_a_save_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = trained(1), trained(2)
    write(tmp_path, 1, before)
    num_calls = 0
    crash_at = -1

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == crash_at:
                raise Crash
            return real(*arguments, **options)

        return call

    for place, name in ((os, "fsync"), (os, "open"), (Path, "rename"), (Path, "write_bytes"), (torch, "save")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    for crash_at in itertools.count(1):  # noqa: B007  counted() reads it
        num_calls = 0
        try:
            write(tmp_path, 2, after)
        except Crash:
            pass
        else:
            break
        model, optimizer = build(9)
        found = load(tmp_path, model, optimizer)  # a crash after the renaming has lost nothing
        assert same(model, (before if found.step == 1 else after)[0])
    assert crash_at > 10


SAVES_FOR_EVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint_cases import build, write
import os, random, signal, time, torch
from partita.training.checkpoint.loader import load

base = Path(sys.argv[2])
chance = random.Random(4)
last = 0
for kill in range(20):
    pid = os.fork()
    if pid == 0:
        model, optimizer = build()
        step = last
        while True:
            step += 1
            with torch.no_grad():
                model.scale.fill_(float(step))
            write(base, step, (model, optimizer))
    while not list(base.glob("step-*")):
        time.sleep(0.01)
    time.sleep(chance.uniform(0.01, 0.12))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    model, optimizer = build(1)
    found = load(base, model, optimizer)
    assert found.step >= last and float(model.scale.detach()) == found.step, (found.step, last)
    last = found.step
print(last)
"""


def test_a_process_that_is_killed_at_random_moments_loses_nothing_committed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVES_FOR_EVER, str(Path(__file__).parent), str(tmp_path)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 1


@pytest.mark.parametrize("name", ["write_chunks", "commit"])
def test_a_full_disk_leaves_the_previous_one_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, 1)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(
        f"partita.training.checkpoint.{'saver.write_chunks' if name == 'write_chunks' else 'folder.commit'}", fail
    )
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path, 1)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path / "file", 1)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    torch.save({"also": Trap()}, path / "rest.pt")
    meta = folders.read_meta(path)  # a stranger signs what he likes
    files = {**meta.files, "rest.pt": folders.facts_of(path / "rest.pt")}
    path.rename(tmp_path / ".writing-x")
    folders.commit(
        tmp_path / ".writing-x", type(meta)(**{**{n: getattr(meta, n) for n in meta.__struct_fields__}, "files": files})
    )
    with pytest.raises(CheckpointError, match="weights_only|Unsupported"):
        load(tmp_path, *build())
    assert not Trap.sprung
