"""What a user asks of checkpoints."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from partita.arguments import check_count, path_of, told
from partita.errors import InputError
from partita.training.checkpoint.folder import KEEP
from partita.training.checkpoint.memory import InMemory


@runtime_checkable
class Stateful(Protocol):
    """What has a state of its own: a learning-rate scheduler, a loader that knows its position."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Checkpoints:
    """Where a step's checkpoints are, and when they are written.

    Args:
        folder: of the checkpoints; in a job one that all processes see, or rank 0 alone writes and reads.
        every_steps: after so many steps each a checkpoint is written in the background; None: only by `Step.save`.
        keep: so many complete ones stay, the latest.
        memory: how often the state is copied into the memory of this machine and of another one, from where a job that
            starts again takes it if that is later than the last checkpoint; None: never.
        also: what else is saved and loaded, by name: schedulers, loaders, anything with `state_dict` and
            `load_state_dict`, of rank 0.

    Example:
        >>> Checkpoints("runs/first", every_steps=500).keep
        2
    """

    folder: str | os.PathLike[str]
    every_steps: int | None = None
    keep: int = KEEP
    also: Mapping[str, Stateful] = field(default_factory=dict)
    memory: InMemory | None = None

    def __post_init__(self) -> None:
        path_of(self.folder, "the folder of Checkpoints")
        for name, value in (("every_steps", self.every_steps), ("keep", self.keep)):
            if value is not None:
                check_count(value, name)
        check_also(self.also)
        if not isinstance(self.memory, (InMemory, type(None))):
            raise InputError(f"memory must be partita.InMemory or None, but got {told(self.memory)}. Pass InMemory(20)")

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @classmethod
    def of(cls, value: object) -> Checkpoints | None:
        """Given ones, those of a folder, or None.

        Raises:
            InputError: it is neither.
        """
        if value is None or isinstance(value, Checkpoints):
            return value
        return cls(path_of(value, "checkpoints"))


def check_also(also: object) -> None:
    """Raises InputError unless these are named things with a state."""
    if not isinstance(also, Mapping):
        raise InputError(f'also must be a mapping, e.g. {{"scheduler": scheduler}}, but got {told(also)}')
    for name, item in also.items():
        if not isinstance(name, str) or not isinstance(item, Stateful):
            raise InputError(
                f"also must map names to what has state_dict and load_state_dict, but {name!r} is {told(item)}. Wrap "
                "plain values in an object with both"
            )


def states_of(also: Mapping[str, Stateful]) -> dict[str, Any]:
    """The states, as they are now.

    Raises:
        InputError: one of them has something in it that must not be read back from a file of a stranger.
    """
    found = {}
    for name, item in also.items():
        state = item.state_dict()
        buffer = io.BytesIO()
        try:
            torch.save(state, buffer)
            buffer.seek(0)
            found[name] = torch.load(buffer, weights_only=True)
        except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the state of {name!r} must consist of tensors, numbers, texts, lists and mappings, since nothing "
                f"else is read back from a file without running its code, but: {error}"
            ) from error
    return found
