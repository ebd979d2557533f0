"""The folders of checkpoints: which are complete, what they say of themselves, and how one is committed.

A checkpoint is written under a temporary name, flushed to disk, and renamed last, so a crash at any moment leaves the
previous one complete. ``checkpoint.json`` holds the checksums of all other files and one of its own content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from partita.errors import CheckpointError

FORMAT = 2
KEEP = 2  # complete checkpoints that stay
META = "checkpoint.json"
WRITING = ".writing-"
_LEFT_BEHIND_S = 3600.0  # a folder that nobody has written to for so long belongs to a process that is gone


class FileFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a file must be."""

    num_bytes: int
    sha256: str


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint says of itself.

    `aliases`: other names of the same weight -> the name in the file. `groups`: names of the parameters in each group
    of the optimizer. `num_processes`: of the job that wrote it; `num_replicas`: of them, replicas with states of their
    own (0: they trained as one). `sync`: the synchronisation method, as text.
    """

    format: int = FORMAT
    step: int
    optimizer: str
    groups: list[list[str]]
    aliases: dict[str, str]
    files: dict[str, FileFacts]
    num_processes: int = 1
    num_replicas: int = 0
    sync: str = ""


class _Signed(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    content: msgspec.Raw


class DamagedError(Exception):
    """A checkpoint is not as it was written; an earlier one may be."""


def facts_of(path: Path) -> FileFacts:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileFacts(num_bytes=file.tell(), sha256=digest)


def begin(base: Path) -> Path:
    """A new, empty folder to write a checkpoint into, under a temporary name.

    Raises:
        CheckpointError: the disk refuses.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
        _sweep(base)
        return Path(tempfile.mkdtemp(prefix=WRITING, dir=base))
    except OSError as error:
        raise not_written(base, error) from error


def is_seen(temporary: Path) -> bool:
    """Whether this process sees the folder that rank 0 has begun."""
    return temporary.is_dir()


def not_written(base: Path, error: object) -> CheckpointError:
    return CheckpointError(f"the checkpoint could not be written to {base}: {error}; earlier ones are complete")


def commit(temporary: Path, meta: Meta, keep: int = KEEP) -> Path:
    """Makes what was written the latest checkpoint, and removes all but the last `keep`; the path.

    Raises:
        OSError: the disk refuses.
    """
    base = temporary.parent
    write_meta(temporary, meta)
    for folder in {temporary / Path(name).parent for name in meta.files} | {temporary}:
        if folder.is_dir():  # a process' copies in memory are not all files
            flush(folder)
    target = _next(base, f"step-{meta.step:08d}")
    temporary.rename(target)
    flush(base)
    for old in complete(base)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def write_meta(folder: Path, meta: Meta) -> None:
    """Writes what a checkpoint says of itself, with a checksum of that.

    Raises:
        OSError: the disk refuses.
    """
    content = msgspec.json.format(msgspec.json.encode(meta), indent=1)
    signed = _Signed(sha256=hashlib.sha256(content).hexdigest(), content=msgspec.Raw(content))
    (folder / META).write_bytes(msgspec.json.encode(signed))
    flush(folder / META)


def discard(temporary: Path) -> None:
    """Gives up what was begun."""
    shutil.rmtree(temporary, ignore_errors=True)


def candidates(folder: Path) -> list[Path]:
    """Checkpoints that may be read, the latest first: those in `folder`, or `folder` itself if it is one."""
    return [folder] if (folder / META).exists() else complete(folder)[::-1]


def complete(base: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in base.glob("step-*") if (path / META).exists()), key=order)


def read_meta(path: Path) -> Meta:
    """What a checkpoint says of itself.

    Raises:
        DamagedError: it cannot be read, or is of another format.
    """
    try:
        signed = msgspec.json.decode((path / META).read_bytes(), type=_Signed)
        if hashlib.sha256(bytes(signed.content)).hexdigest() != signed.sha256:
            raise DamagedError(f"{META} is not as it was written: its checksum differs")
        meta = msgspec.json.decode(signed.content, type=Meta)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedError(f"{META}: {type(error).__name__}: {error}") from error
    if meta.format != FORMAT:
        raise DamagedError(f"format {meta.format} is not {FORMAT}, which this version reads")
    return meta


def verify(path: Path, meta: Meta, names: Iterable[str]) -> None:
    """Compares files with their checksums.

    Raises:
        DamagedError: one of them is not as it was written.
    """
    for name in names:
        wanted = meta.files[name]
        try:
            found = facts_of(path / name)
        except OSError as error:
            raise DamagedError(f"{name}: {error}") from error
        if found != wanted:
            sizes = f": {found.num_bytes} bytes instead of {wanted.num_bytes}"
            reason = sizes if found.num_bytes != wanted.num_bytes else ": its checksum differs"
            raise DamagedError(f"{name} is not as it was written{reason}")


def flush(path: Path) -> None:
    """Has the system write a file or the names in a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _next(base: Path, name: str) -> Path:
    """The name of the next checkpoint of one step. The older one stays until the newer one is complete."""
    last = max((path.name for path in base.glob(f"{name}*")), default="")
    return base / (f"{name}.{int(last.partition('.')[2] or 0) + 1:03d}" if last else name)


def order(path: Path) -> tuple[int, int]:
    """The step of a checkpoint by its name, and which one of that step it is."""
    step, _, repeat = path.name.removeprefix("step-").partition(".")
    return (int(step), int(repeat or 0)) if step.isdigit() and (repeat or "0").isdigit() else (-1, 0)


def _sweep(base: Path) -> None:
    """Removes what processes that are gone have left half written."""
    for path in base.glob(f"{WRITING}*"):
        with contextlib.suppress(OSError):
            if time.time() - max(item.stat().st_mtime for item in (path, *path.rglob("*"))) > _LEFT_BEHIND_S:
                shutil.rmtree(path, ignore_errors=True)
