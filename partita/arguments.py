"""Checks of arguments that every floor shares."""

from __future__ import annotations

import os
from pathlib import Path

from partita.errors import InputError


def told(value: object) -> str:
    """A value as error messages name it: its type and, of plain values, what it is.

    >>> told(3), told(None), told([])
    ('int 3', 'None', 'list')
    """
    kind = type(value).__name__
    if value is None:
        return kind.removesuffix("Type")
    return f"{kind} {value!r:.80}" if isinstance(value, (bool, int, float, str)) else kind


def path_of(value: object, what: str) -> Path:
    """`value` as a path; `what` names the argument, e.g. ``"the folder of step.save"``.

    Raises:
        InputError: it is no path.
    """
    if isinstance(value, str) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)):
        return Path(value)
    raise InputError(f'{what} must be a path (a text or pathlib.Path), but got {told(value)}. Pass e.g. "runs/first".')


def check_count(value: object, what: str) -> None:
    """Raises InputError unless `value` is a whole number from 1 on; `what` names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} must be a whole number from 1 on, but got {told(value)}")
