"""The checkpoints of a step: where they are, when they are written, and what is in them besides the model."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from partita.arguments import path_of
from partita.errors import InputError, PartitaError
from partita.runtime.transport import Transport
from partita.training.checkpoint.loader import Loaded, latest_step, load
from partita.training.checkpoint.memory import Memory, buddies, root_of
from partita.training.checkpoint.saver import Saver, Saving, Source
from partita.training.checkpoint.settings import Checkpoints, Stateful, check_also, states_of
from partita.training.events import Checkpointed, WarningRaised, emit
from partita.training.job import Team

_TAKEN_OVER = (
    "what {path} has of a synchronisation method belongs to another method or number of processes than {own!r} of this "
    "job, or is not seen by all of them: the method starts anew, and what was not sent yet is lost"
)
Folder = str | os.PathLike[str]
Also = Mapping[str, Stateful]


class Keeper:
    """Writes and reads the checkpoints of one step; `settings` are those of `parallelize`, `machines` those of the
    processes, by rank, `method` is the text of its method of synchronisation ("": exact), `own` what of the step itself
    is saved besides."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        team: Team,
        transport: Transport | None,
        timeout_s: float,
        settings: Checkpoints | None,
        method: str,
        machines: Sequence[int],
        own: Also,
    ) -> None:
        self._model, self._optimizer, self._team = model, optimizer, team
        self._settings, self._method, self._own = settings, method, own
        self._saver = Saver(team, transport, timeout_s)
        self._memory: Memory | None = None
        self._restored: Path | None = None  # what was put together from copies, to be loaded
        if settings is not None and settings.memory is not None:
            root = root_of(settings.memory, settings.path)
            self._memory = Memory(root=root, rank=team.rank, buddies=buddies(machines))

    def save(self, source: Source, folder: Folder | None, also: Also | None, *, in_background: bool) -> Saving:
        """Begins to write a checkpoint; see `Saver.save`."""
        path = self._path(folder, "save")
        keep = {} if self._settings is None else {"keep": self._settings.keep}
        return self._saver.save(path, self._with_extra(source, also), in_background=in_background, **keep)

    def _with_extra(self, source: Source, also: Also | None) -> Source:
        states = states_of(self._all(also)) if self._team.rank == 0 else {}
        return dataclasses.replace(source, method=self._method, extra={"also": states})

    def save_if_due(self, step: int, source: Callable[[], Source], *, since: int | None = None) -> None:
        """Begins to write a checkpoint in the background, or copies in memory, if the settings have some after this
        step or one of those after step `since`. A disk that refuses is warned of; training goes on."""
        settings = self._settings
        if settings is None:
            return
        try:
            if _is_due(step, since, settings.every_steps):
                self.save(source(), None, None, in_background=True)
            elif self._memory is not None and settings.memory and _is_due(step, since, settings.memory.every_steps):
                self._saver.copy(self._memory, self._with_extra(source(), None))
        except PartitaError as error:
            emit(WarningRaised(subject="checkpoint", message=f"of step {step}: {error}"))

    def load(self, folder: Folder | None, also: Also | None) -> Loaded:
        """Reads the latest checkpoint; see `partita.training.checkpoint.load`."""
        path, start_s = self._path(folder, "load"), time.perf_counter()
        self._saver.settle()
        wanted = self._all(also)
        found = self._from_memory(path) if folder is None else None
        found = found or load(path, self._model, self._optimizer, self._team)
        for name, item in wanted.items():
            if name in found.also:
                item.load_state_dict(found.also[name])
            else:
                emit(WarningRaised(subject="checkpoint", message=f"{found.path} has no state of {name!r}: it stays"))
        time_s = time.perf_counter() - start_s
        emit(Checkpointed(action="loaded", path=found.path, step=found.step, num_bytes=found.num_bytes, time_s=time_s))
        if found.method == self._method and (found.sync or not found.has_sync):
            return found
        if found.has_sync:
            emit(WarningRaised(subject="checkpoint", message=_TAKEN_OVER.format(path=found.path, own=self._method)))
        return dataclasses.replace(found, sync={})

    def has_any(self) -> bool:
        """Whether there is one in the folder of the settings, or in memory; asked by all processes."""
        if self._settings is None:
            return False
        latest = latest_step(self._settings.path, self._team)
        if self._memory is not None:
            self._restored = self._memory.restore(self._team, latest)
        return latest >= 0 or self._restored is not None

    def _from_memory(self, path: Path) -> Loaded | None:
        """What copies in memory have, if that is later than what is on disk; None otherwise."""
        if self._memory is None:
            return None
        base, self._restored = self._restored, None
        base = base or self._memory.restore(self._team, latest_step(path, self._team))
        if base is None:
            return None
        try:
            return load(base, self._model, self._optimizer, self._team, own=True)
        finally:
            self._memory.forget_restored()

    def close(self, *, failed: bool = False) -> None:
        """Completes what is being written. Copies in memory go where the job ends as it should, and stay for the next
        start where it does not: it has `failed`, or an exception passes."""
        try:
            self._saver.close()
        except PartitaError:  # of a job that has failed: whoever closes it knows
            return
        if self._memory is not None and not failed and sys.exc_info()[0] is None:
            self._memory.clear()

    def _path(self, folder: Folder | None, verb: str) -> Path:
        if folder is not None:
            return path_of(folder, f"the folder of step.{verb}")
        if self._settings is None:
            raise InputError(
                f'step.{verb} must have a folder, but got none. Pass one, or parallelize(..., checkpoints="runs/first")'
            )
        return self._settings.path

    def _all(self, also: Also | None) -> dict[str, Stateful]:
        check_also(also or {})
        return {**self._own, **(self._settings.also if self._settings is not None else {}), **(also or {})}


def _is_due(step: int, since: int | None, every: int | None) -> bool:
    """Whether a multiple of `every` lies after step `since` (None: the one before) and not after `step`."""
    return every is not None and step // every != (step - 1 if since is None else since) // every
