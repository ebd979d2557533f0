"""The checkpoints of a step: where they are, when they are written, and what is in them besides the model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from partita.arguments import path_of
from partita.errors import InputError, PartitaError
from partita.runtime.transport import Transport
from partita.training.checkpoint.loader import Loaded, has_any, load
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
    """Writes and reads the checkpoints of one step; `settings` are those of `parallelize`, `method` is the text of its
    method of synchronisation ("": exact), `own` what of the step itself is saved besides."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        team: Team,
        transport: Transport | None,
        timeout_s: float,
        settings: Checkpoints | None,
        method: str,
        own: Also,
    ) -> None:
        self._model, self._optimizer, self._team = model, optimizer, team
        self._settings, self._method, self._own = settings, method, own
        self._saver = Saver(team, transport, timeout_s)

    def save(self, source: Source, folder: Folder | None, also: Also | None, *, in_background: bool) -> Saving:
        """Begins to write a checkpoint; see `Saver.save`."""
        path = self._path(folder, "save")
        states = states_of(self._all(also)) if self._team.rank == 0 else {}
        keep = {} if self._settings is None else {"keep": self._settings.keep}
        source = dataclasses.replace(source, method=self._method, extra={"also": states})
        return self._saver.save(path, source, in_background=in_background, **keep)

    def save_if_due(self, step: int, source: Callable[[], Source]) -> None:
        """Begins to write a checkpoint in the background, if the settings have one after this step. A disk that refuses
        is warned of; training goes on."""
        every = self._settings.every_steps if self._settings is not None else None
        if every is None or step % every:
            return
        try:
            self.save(source(), None, None, in_background=True)
        except PartitaError as error:
            emit(WarningRaised(subject="checkpoint", message=f"of step {step}: {error}"))

    def load(self, folder: Folder | None, also: Also | None) -> Loaded:
        """Reads the latest checkpoint; see `partita.training.checkpoint.load`."""
        path, start_s = self._path(folder, "load"), time.perf_counter()
        self._saver.settle()
        wanted = self._all(also)
        found = load(path, self._model, self._optimizer, self._team)
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
        """Whether there is one in the folder of the settings; asked by all processes."""
        return self._settings is not None and has_any(self._settings.path, self._team)

    def close(self) -> None:
        """Completes what is being written."""
        with contextlib.suppress(PartitaError):  # of a job that has failed: whoever closes it knows
            self._saver.close()

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
