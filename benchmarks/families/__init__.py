"""Model families that the benchmarks and tests train: `FAMILIES`, `get(name)`, `select("gpt2,lstm")`."""

from __future__ import annotations

from benchmarks.families.base import SIZES, Batch, Family, Kind, LossFn, Scale, Size, Task, make_optimizer
from benchmarks.families.plain_other import PLAIN_OTHER
from benchmarks.families.plain_supervised import PLAIN_SUPERVISED
from benchmarks.families.transformers_other import TRANSFORMERS_OTHER
from benchmarks.families.transformers_text import TRANSFORMERS_TEXT

FAMILIES: tuple[Family, ...] = (*TRANSFORMERS_TEXT, *TRANSFORMERS_OTHER, *PLAIN_SUPERVISED, *PLAIN_OTHER)

__all__ = [
    "FAMILIES", "SIZES", "Batch", "Family", "Kind", "LossFn", "Scale", "Size", "Task", "get", "make_optimizer",
    "select",
]  # fmt: skip


def get(name: str) -> Family:
    """The family of that name.

    Raises:
        KeyError: there is none; the message lists those that are there.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise KeyError(f"a family must be one of: {known}; but got {name!r}")


def select(names: str | None) -> tuple[Family, ...]:
    """Families from a comma-separated list of names; all of them for None."""
    if names is None:
        return FAMILIES
    return tuple(get(name.strip()) for name in names.split(",") if name.strip())
