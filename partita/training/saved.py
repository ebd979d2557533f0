"""What of a step is written to checkpoints and read back."""

from __future__ import annotations

import abc

from partita.training.checkpoint.loader import Loaded
from partita.training.checkpoint.saver import Saving, Source
from partita.training.keeping import Also, Folder, Keeper


class Saved(abc.ABC):
    """The part of a step that saves and loads, by its `Keeper`."""

    _keeper: Keeper

    @abc.abstractmethod
    def source(self) -> Source:
        """What a checkpoint is written from."""

    @abc.abstractmethod
    def take_loaded(self, loaded: Loaded) -> None:
        """Goes on from what was loaded into model and optimizer."""

    @abc.abstractmethod
    def _require_open(self) -> None:
        """Raises `StepError` if no further step can be made."""

    def save(self, folder: Folder | None = None, *, also: Also | None = None) -> str:
        """Writes a checkpoint of weights, optimizer, step count, random states and the method of synchronisation; any
        plan can load it. In a job every process calls it, and writes its part.

        The previous checkpoint stays until the new one is complete.

        Args:
            folder: of the checkpoints; None: that of `parallelize(checkpoints=...)`.
            also: what else to save, by name: schedulers, loaders, anything with `state_dict`.

        Returns:
            The path of the new one.

        Raises:
            CheckpointError: the disk refuses; earlier ones are complete.
        """
        return self._begin_saving(folder, also, in_background=False).wait()

    def save_async(self, folder: Folder | None = None, *, also: Also | None = None) -> Saving:
        """As `save`, but copies everything and writes in the background while training goes on.

        Example:
            >>> saving = step.save_async("checkpoints/")
            >>> result = step(batch)
            >>> path = saving.wait()
        """
        return self._begin_saving(folder, also, in_background=True)

    def load(self, folder: Folder | None = None, *, also: Also | None = None) -> None:
        """Continues from the latest checkpoint in `folder` that is as it was written, whatever plan wrote it. In a job
        every process calls it.

        Args:
            folder: of the checkpoints, or one of them; None: that of `parallelize(checkpoints=...)`.
            also: what else to load the state of, by name.

        Raises:
            CheckpointError: none is complete and undamaged, or it belongs to another model or optimizer. Nothing was
                changed.
        """
        self._require_open()
        self.take_loaded(self._keeper.load(folder, also))

    def resume(self) -> bool:
        """Loads the latest checkpoint of `parallelize(checkpoints=...)`, if there is one; whether there was."""
        found = self._keeper.has_any()
        if found:
            self.load()
        return found

    def _begin_saving(self, folder: Folder | None, also: Also | None, *, in_background: bool) -> Saving:
        return self._keeper.save(self.source(), folder, also, in_background=in_background)
