"""Writes checkpoints, at once or in the background: every process its part, rank 0 makes them count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from partita.errors import CheckpointError
from partita.runtime.transport import Line, Transport
from partita.training.checkpoint import folder as folders
from partita.training.checkpoint.contents import Contents, Names, Ownership, contents_of, plain, random_state, read_rest
from partita.training.checkpoint.folder import FileFacts, Meta
from partita.training.checkpoint.memory import KEEP as KEEP_COPIES
from partita.training.checkpoint.memory import Memory
from partita.training.checkpoint.shards import Chunk, write_chunks
from partita.training.events import Checkpointed, WarningRaised, emit
from partita.training.exchanges import Exchanges, all_tell
from partita.training.job import Team

SAVE_TIME_S = 1800.0  # that the slowest process gets to write its part


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be saved, as one process has it.

    `names` of weights and groups; `ownership` says who has what; `collect` makes every process have everything, where
    only rank 0 can write. `own_optimizer`: every process has an optimizer's state of its own. `sync`: states of the
    synchronisation method, by key, that this process has; `method` is its text. `extra`: what else rank 0 keeps.
    """

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ownership: Callable[[], Ownership]
    collect: Callable[[], None]
    own_optimizer: bool = False
    method: str = ""
    sync: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a process says after writing its part."""

    files: dict[str, FileFacts] = {}
    error: str = ""
    path: str = ""


class Saving:
    """A checkpoint that is being written. It counts once it is complete, whether or not anybody waits."""

    def __init__(self, step: int, wait: Callable[[], str], is_over: Callable[[], bool]) -> None:
        self.step = step
        self._wait, self._is_over = wait, is_over
        self.is_awaited = False

    @property
    def is_over(self) -> bool:
        """Whether it is complete, or has failed."""
        return self._is_over()

    def wait(self) -> str:
        """Waits until it is complete; its path.

        Raises:
            CheckpointError: it could not be written; earlier ones are complete.
            StepError: another process is gone.
        """
        self.is_awaited = True
        return self._wait()


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One checkpoint to write, on one process."""

    base: Path
    temporary: Path | None  # None: this process cannot see it, and writes nothing
    contents: Contents
    sync: list[Chunk]
    meta: Meta  # without files
    own_optimizer: bool
    keep: int
    started_s: float
    memory: Memory | None  # where copies are kept; None: it is a checkpoint on disk


class Saver:
    """Writes the checkpoints of a step. All processes call the same methods in the same order."""

    def __init__(self, team: Team, transport: Transport | None, timeout_s: float) -> None:
        self._team, self._transport = team, transport
        self._timeout_s = max(timeout_s, SAVE_TIME_S)
        self._exchanges: Exchanges | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._last: Saving | None = None

    def copy(self, memory: Memory, source: Source) -> Saving:
        """Begins to write copies into memory, in the background; otherwise as `save`."""
        return self._save(memory.base, source, memory, keep=KEEP_COPIES, in_background=True)

    def save(self, folder: Path, source: Source, *, keep: int = folders.KEEP, in_background: bool) -> Saving:
        """Begins to write a checkpoint, once the last one is over.

        With `in_background` everything is copied first, and training may go on at once; else training must wait for it.

        Raises:
            CheckpointError: the disk refuses already.
        """
        return self._save(folder, source, None, keep=keep, in_background=in_background)

    def _save(self, folder: Path, source: Source, memory: Memory | None, *, keep: int, in_background: bool) -> Saving:
        started_s = time.perf_counter()
        self.settle()
        temporary, is_shared = (
            self._begin(folder)
            if memory is None
            else (
                self._begin_copies(memory, source.step),
                True,
            )
        )
        rank, num = self._team.rank, self._team.num_processes
        if is_shared:
            ownership = source.ownership()
        else:  # only rank 0 sees the folder
            source.collect()
            ownership = Ownership()
        names = Names.of(source.model, source.optimizer)
        contents = contents_of(source.model, source.optimizer, names, ownership, rank)
        if source.own_optimizer:
            own = contents_of(source.model, source.optimizer, names, Ownership(), 0)
            contents = Contents(weights=contents.weights, optimizer=own.optimizer, rest=own.rest)
        if rank == 0:
            contents.rest.update(source.extra, others_of_model=names.others)
        if rank == 0 or source.own_optimizer:
            contents.rest["random"] = random_state()
        sync = [Chunk.whole(f"{key}/{name}", value) for key, state in source.sync.items()
                for name, value in state.items()]  # fmt: skip
        job = _Job(
            base=folder,
            temporary=temporary,
            contents=contents.frozen() if in_background else contents,
            sync=[chunk.frozen() for chunk in sync] if in_background else sync,
            meta=Meta(
                step=source.step,
                optimizer=type(source.optimizer).__name__,
                groups=names.groups,
                aliases=dict(names.aliases),
                files={},
                num_processes=num,
                num_replicas=(num if is_shared else 1) if source.own_optimizer else 0,
                sync=source.method,
            ),
            own_optimizer=source.own_optimizer,
            keep=keep,
            started_s=started_s,
            memory=memory,
        )
        self._last = self._start(job)
        return self._last

    def settle(self) -> None:
        """Waits for what is being written. If nobody else has waited for it, a failure becomes a warning."""
        saving, self._last = self._last, None
        if saving is None:
            return
        if saving.is_awaited:
            return
        try:
            saving.wait()
        except CheckpointError as error:
            emit(WarningRaised(subject="checkpoint", message=f"in the background, of step {saving.step}: {error}"))

    def close(self) -> None:
        """Completes what is being written."""
        self.settle()
        if self._thread is not None:
            self._thread.shutdown()
        if self._exchanges is not None:
            self._exchanges.close()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _begin(self, folder: Path) -> tuple[Path | None, bool]:
        """The folder to write into, and whether all processes see it; None on those that do not."""
        temporary, error = "", ""
        if self._team.rank == 0:
            try:
                temporary = str(folders.begin(folder).resolve())
            except CheckpointError as found:
                error = str(found)
        temporary, error = self._team.from_first((temporary, error), "the folder of a checkpoint")
        if error:
            raise CheckpointError(error)
        seen = self._team.gather(folders.is_seen(Path(temporary)), "who sees the folder of a checkpoint")
        return Path(temporary) if seen[self._team.rank] else None, all(seen)

    def _begin_copies(self, memory: Memory, step: int) -> Path | None:
        temporary, error = None, ""
        try:
            temporary = memory.begin(step)
        except CheckpointError as found:
            error = str(found)
        for text in self._team.gather(error, "the folders of copies in memory"):
            if text:
                raise CheckpointError(text)
        return temporary

    def _start(self, job: _Job) -> Saving:
        if self._transport is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "partita-checkpoints")
            future: Future[str] = self._thread.submit(_written_alone, job)
            return Saving(job.meta.step, future.result, future.done)
        if self._exchanges is None:
            self._exchanges = Exchanges(self._transport, self._timeout_s, "checkpoints")
        rank, num = self._team.rank, self._team.num_processes
        found: list[_Report] = []

        def call(line: Line) -> list[Tensor]:
            found.append(_written_together(job, line, rank, num))
            return []

        errand = self._exchanges.errand(f"of the checkpoint of step {job.meta.step}", call)

        def wait() -> str:
            errand.wait()
            if found[0].error:
                raise CheckpointError(found[0].error)
            return found[0].path

        return Saving(job.meta.step, wait, lambda: errand.is_over)


def _written_alone(job: _Job) -> str:
    report = _committed(job, [_written_part(job, 0, 1)])
    if report.error:
        raise CheckpointError(report.error)
    return report.path


def _written_together(job: _Job, line: Line, rank: int, num: int) -> _Report:
    """Writes this process' part, and has rank 0 commit all of them."""
    own = _written_part(job, rank, num)
    told = all_tell(line, msgspec.json.encode(own), rank, num)
    reports = [msgspec.json.decode(text, type=_Report) for text in told]
    if job.memory is not None:
        return _copied_together(job, job.memory, reports, line, num)
    outcome = _committed(job, reports) if rank == 0 else _Report()
    found = all_tell(line, msgspec.json.encode(outcome), rank, num)[0]
    return msgspec.json.decode(found, type=_Report)


def _copied_together(job: _Job, memory: Memory, reports: list[_Report], line: Line, num: int) -> _Report:
    """Exchanges copies with buddies; they count, on every process, once all have theirs."""
    errors = [report.error for report in reports if report.error]
    if not errors:
        error = ""
        try:
            assert job.temporary is not None
            memory.exchange(job.temporary, [report.files for report in reports], line)
        except (OSError, folders.DamagedError) as found:
            error = f"rank {memory.rank}: {found}"
        told = all_tell(line, msgspec.json.encode(_Report(error=error)), memory.rank, num)
        errors = [text for one in told if (text := msgspec.json.decode(one, type=_Report).error)]
    return _committed(job, [_Report(error=text) for text in errors] or reports)


def _written_part(job: _Job, rank: int, num: int) -> _Report:
    """Writes what this process has; never raises."""
    if job.temporary is None:
        return _Report()
    try:
        return _Report(files=_write(job, job.temporary, rank, num))
    except Exception as error:  # full disks come as OSError, SafetensorError or RuntimeError
        return _Report(error=f"rank {rank}: {type(error).__name__}: {error}")


def _write(job: _Job, temporary: Path, rank: int, num: int) -> dict[str, FileFacts]:
    suffix = f"-{rank + 1:05d}-of-{num:05d}" if num > 1 else ""
    optimizer = f"replica-{rank:05d}" if job.own_optimizer else "optimizer"
    files = {
        f"weights{suffix}.safetensors": job.contents.weights,
        f"{optimizer}/optimizer{'' if job.own_optimizer else suffix}.safetensors": job.contents.optimizer,
        f"sync/sync{suffix}.safetensors": job.sync,
    }
    found = {}
    for name, chunks in files.items():
        if chunks:
            (temporary / name).parent.mkdir(exist_ok=True)
            write_chunks(temporary / name, chunks)
            found[name] = folders.facts_of(temporary / name)
    rest = f"rest{suffix}.pt"
    with (temporary / rest).open("wb") as file:
        torch.save(plain(job.contents.rest), file)
    folders.flush(temporary / rest)
    read_rest(temporary / rest)  # what could not be read back is told now
    found[rest] = folders.facts_of(temporary / rest)
    return found


def _committed(job: _Job, reports: list[_Report]) -> _Report:
    """On rank 0, of copies on every process: the checkpoint counts if everybody has written his part."""
    assert job.temporary is not None
    errors = [report.error for report in reports if report.error]
    files = {name: facts for report in reports for name, facts in report.files.items()}
    if not errors:
        try:
            path = folders.commit(job.temporary, msgspec.structs.replace(job.meta, files=files), job.keep)
        except OSError as error:
            errors.append(str(error))
    if errors:
        folders.discard(job.temporary)
        return _Report(error=str(folders.not_written(job.base, "; ".join(errors))))
    emit(
        Checkpointed(
            action="saved" if job.memory is None else "copied",
            path=str(path),
            step=job.meta.step,
            num_bytes=sum(facts.num_bytes for facts in files.values()),
            time_s=time.perf_counter() - job.started_s,
        )
    )
    return _Report(path=str(path))
