"""Copies of a job's state in memory: what one process has alone is on another machine as well.

Every few steps each process writes its part of a checkpoint, the same files as on disk, into the memory of its machine
(a folder of tmpfs, which outlives the process), and sends them to a *buddy*, a process on another machine where there
is one, which keeps them beside its own. The copies of a step count once all processes have told that theirs are
complete; the two latest stay, so that a crash at any moment leaves one. When the job starts again, the processes tell
each other which files their machines have, and take the latest step of which all are somewhere. So a job that has lost
a machine with its memory goes on from a few steps ago instead of from the last checkpoint on disk.

Source: Wang et al., GEMINI: Fast Failure Recovery in Distributed Training with In-Memory Checkpoints, SOSP 2023
(placement on one other machine: section 5; here by whole parts, without its interleaving with training's messages).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from partita.arguments import check_count, path_of
from partita.errors import CheckpointError
from partita.program.instructions import TensorSpec
from partita.runtime.transport import Line
from partita.training.checkpoint import folder as folders
from partita.training.checkpoint.folder import DamagedError, FileFacts, Meta, facts_of
from partita.training.events import WarningRaised, emit
from partita.training.job import Team
from partita.units import fingerprint

KEEP = 2  # steps whose copies stay: while one is written, the one before is complete


@dataclass(frozen=True)
class InMemory:
    """How often the state is copied into memory, and where that is.

    Args:
        every_steps: after so many steps each, in the background.
        folder: of tmpfs, on every machine.

    Example:
        >>> InMemory(20).folder
        '/dev/shm'
    """

    every_steps: int
    folder: str | os.PathLike[str] = "/dev/shm"

    def __post_init__(self) -> None:
        check_count(self.every_steps, "every_steps of InMemory")
        path_of(self.folder, "the folder of InMemory")


def buddies(machines: Sequence[int]) -> tuple[int, ...]:
    """For every process the one that keeps its copies, by rank; `machines` are theirs. Everybody keeps those of one
    process. It is on another machine, unless one machine has more than half of all processes.

    >>> buddies([0, 0, 1, 1])
    (2, 3, 0, 1)
    """
    order = sorted(range(len(machines)), key=lambda rank: (machines[rank], rank))
    most = max(list(machines).count(machine) for machine in machines)
    shift = most % len(order) or 1
    found = {rank: order[(place + shift) % len(order)] for place, rank in enumerate(order)}
    return tuple(found[rank] for rank in range(len(order)))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Where a process keeps copies: its own part and that of the process whose buddy it is.

    `root` is the job's folder on this machine, `buddies` are as of the function.
    """

    root: Path
    rank: int
    buddies: tuple[int, ...]

    @property
    def base(self) -> Path:
        """The folder of this process."""
        return self.root / f"process-{self.rank:05d}"

    @property
    def origin(self) -> int:
        """The process whose copies are kept here."""
        return self.buddies.index(self.rank)

    def begin(self, step: int) -> Path:
        """A new folder to write the copies of a step into. Later ones are of a past that training does not go on from.

        Raises:
            CheckpointError: the memory refuses, or somebody else has the folder.
        """
        make_private(self.root.parent)
        for path in self._useless(step):
            shutil.rmtree(path, ignore_errors=True)
        return folders.begin(self.base)

    def _useless(self, step: int) -> list[Path]:
        """What nobody can go on from, now that training is at `step`: what a crash has left half written, later copies,
        and those from before the ones that all have, of processes that are elsewhere now."""
        found = list(self.base.glob(f"{folders.WRITING}*"))
        own = folders.complete(self.base)
        kept = [path for path in own if folders.order(path)[0] < step][-KEEP:]
        found += [path for path in own if folders.order(path)[0] >= step]
        if len(kept) == KEEP:
            least = folders.order(kept[0])[0]
            others = self.root.glob("process-*/step-*")
            found += [path for path in others if folders.order(path)[0] < least]
        return found

    def exchange(self, temporary: Path, files: Sequence[Mapping[str, FileFacts]], line: Line) -> None:
        """Sends this process' files, which are in `temporary`, to its buddy, and writes those of the process whose
        buddy it is; `files` are those of all processes.

        Raises:
            OSError, DamagedError: they cannot be written, or are not what was sent.
        """
        buddy, origin = self.buddies[self.rank], self.origin
        if buddy == self.rank:
            return
        own = [bytes_of(temporary / name) for name in files[self.rank]]
        wanted = [TensorSpec((facts.num_bytes,), torch.uint8) for facts in files[origin].values()]
        received = line.exchange({buddy: own}, {origin: wanted})[origin]
        for (name, facts), content in zip(files[origin].items(), received, strict=True):
            write_bytes(temporary / name, content, facts)

    def restore(self, team: Team, least: int) -> Path | None:
        """The latest copies of a step later than `least` of which all files are on some machine, put together in a
        folder of this process; None if there are none. All processes call it."""
        here = found_in(self.root)
        own = msgspec.json.encode(_Told(copies=here)).decode()
        told = [msgspec.json.decode(text, type=_Told) for text in team.gather(own, "copies in memory")]
        for text in _latest_first(told):
            meta = msgspec.json.decode(text, type=Meta)
            if meta.step <= least:
                break
            holders = {file: [rank for rank, one in enumerate(told) if one.has(text, file)] for file in meta.files}
            missing = [file for file, ranks in holders.items() if not ranks]
            if missing:
                message = (
                    f"those of step {meta.step} lack {', '.join(missing[:3])}: the machines that had them are gone, or "
                    "they are damaged. An earlier state is taken"
                )
                emit(WarningRaised(subject="copies in memory", message=message))
            else:
                places = {file: Path(one.folder) / file for one in here if one.meta == text for file in one.files}
                return self._put_together(meta, places, holders, team)
        return None

    def _put_together(
        self, meta: Meta, places: Mapping[str, Path], holders: Mapping[str, Sequence[int]], team: Team
    ) -> Path | None:
        """Every process gets the files that its machine does not have from the first one that has."""
        base = self.root / f"restored-{self.rank:05d}"
        target = base / f"step-{meta.step:08d}"
        self.forget_restored()
        error = ""
        for file, ranks in sorted(holders.items()):
            content = None
            if len(ranks) < team.num_processes:
                is_source = team.rank == ranks[0]
                content = bytes_of(places[file]) if is_source else torch.zeros(_size(meta, file), dtype=torch.uint8)
                team.spread([content], source=ranks[0])
            try:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                if file in places:
                    os.link(places[file], target / file)
                elif content is not None:
                    write_bytes(target / file, content, meta.files[file])
            except (OSError, DamagedError) as found:
                error = error or str(found)
        try:
            folders.write_meta(target, meta)
        except OSError as found:
            error = error or str(found)
        if any(team.gather(error, "what was put together from copies in memory")):
            self.forget_restored()
            return None
        return base

    def forget_restored(self) -> None:
        """Removes what `restore` has put together."""
        shutil.rmtree(self.root / f"restored-{self.rank:05d}", ignore_errors=True)

    def clear(self) -> None:
        """Removes the copies of this process: the job has come to its end."""
        self.forget_restored()
        shutil.rmtree(self.base, ignore_errors=True)
        for path in (*self.root.glob("process-*"), self.root):
            with contextlib.suppress(OSError):  # others have something there
                path.rmdir()


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of one step in one folder: what it says of itself, and the files that are there as they were written."""

    meta: str
    folder: str
    files: list[str]


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    copies: list[Copy]

    def has(self, meta: str, file: str) -> bool:
        return any(one.meta == meta and file in one.files for one in self.copies)


def root_of(settings: InMemory, checkpoints: Path) -> Path:
    """The folder of a job's copies on a machine: one job for a user and a folder of checkpoints."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(settings.folder) / f"partita-{user}" / fingerprint([checkpoints.resolve()])


def make_private(folder: Path) -> None:
    """Makes a folder that others cannot look into.

    Raises:
        CheckpointError: somebody else has it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise folders.not_written(folder, error) from error
    if folder.is_symlink() or (hasattr(os, "getuid") and facts.st_uid != os.getuid()):
        raise CheckpointError(
            f"copies in memory must be in a folder of this user, but {folder} is a link or another user's. Remove it, "
            "or give InMemory another folder"
        )


def found_in(root: Path) -> list[Copy]:
    """The copies on this machine, of all processes that were here."""
    found = []
    for path in sorted(root.glob("process-*/step-*")):
        with contextlib.suppress(DamagedError, OSError):
            meta = folders.read_meta(path)
            files = [name for name, facts in meta.files.items() if _is(path / name, facts)]
            found.append(Copy(meta=msgspec.json.encode(meta).decode(), folder=str(path), files=files))
    return found


def _latest_first(told: Sequence[_Told]) -> list[str]:
    """What the steps say of themselves; of one step that was made twice, the one that was copied last."""
    every = {one.meta: folders.order(Path(one.folder)) for all_of in told for one in all_of.copies}
    return sorted(every, key=lambda text: (every[text], text), reverse=True)


def _size(meta: Meta, file: str) -> int:
    return meta.files[file].num_bytes


def _is(path: Path, facts: FileFacts) -> bool:
    return path.is_file() and path.stat().st_size == facts.num_bytes and facts_of(path) == facts


def bytes_of(path: Path) -> torch.Tensor:
    """A file's content."""
    content = bytearray(path.read_bytes())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)


def write_bytes(path: Path, content: torch.Tensor, facts: FileFacts) -> None:
    """Writes a file that came from another process.

    Raises:
        OSError, DamagedError: it cannot be written, or is not what was sent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.numpy().tobytes())
    if facts_of(path) != facts:
        raise DamagedError(f"{path.name} is not as it was sent")
