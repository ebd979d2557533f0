"""Checks of arguments that every floor shares."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

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


def check_number(
    value: Any,
    what: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Raises InputError unless `value` is a number (with `whole` an integer) within the bounds; `what` names the
    argument.

    >>> check_number(0.5, "momentum", least=0, below=1)
    """
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    bounds = [
        ("at least", least, operator.ge),
        ("above", above, operator.gt),
        ("at most", most, operator.le),
        ("below", below, operator.lt),
    ]
    given = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
    if not is_number or not all(holds(value, bound) for _, bound, holds in given):
        wanted = " and ".join(f"{words} {bound:g}" for words, bound, _ in given)
        raise InputError(f"{what} must be a {'whole ' * whole}number, {wanted}, but got {told(value)}")


def check_count(value: object, what: str) -> None:
    """Raises InputError unless `value` is a whole number from 1 on; `what` names the argument."""
    check_number(value, what, least=1, whole=True)
