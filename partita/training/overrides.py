"""What the command line fixes for a script that calls the API: a plan, and whether it is a dry run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from partita.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Override:
    """`plan` replaces the script's choice; `dry_run` says that the caller stops the script after one step."""

    plan: Plan | None = None
    dry_run: bool = False


_NONE = Override()
_CURRENT: ContextVar[Override] = ContextVar("partita_override", default=_NONE)


def current_override() -> Override:
    """The override in force; an empty one outside of `override`."""
    return _CURRENT.get()


@contextlib.contextmanager
def override(*, plan: Plan | None = None, dry_run: bool = False) -> Iterator[None]:
    """Every `parallelize` inside uses `plan`.

    Example:
        >>> with override(plan=Plan.load("plan.json")):
        ...     runpy.run_path("train.py", run_name="__main__")
    """
    token = _CURRENT.set(Override(plan=plan, dry_run=dry_run))
    try:
        yield
    finally:
        _CURRENT.reset(token)
