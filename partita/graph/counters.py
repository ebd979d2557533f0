"""Numbers that tell whether anything but counting is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Reads:
    """Where the watched numbers of a recording were looked at."""

    def __init__(self) -> None:
        self.names: set[str] = set()


def watched(value: int | float, name: str, reads: Reads) -> int | float:
    """A number equal to ``value`` that notes its name in ``reads`` when it is compared, converted or computed with.

    Adding to it and subtracting from it gives a number that is watched as well, so a mere counter notes nothing.
    """
    kind = type(value)

    def counts(operation: str) -> Callable[..., Any]:
        def run(self: Any, other: Any) -> Any:
            result = getattr(kind, operation)(self, other)
            return watched(result, name, reads) if type(result) in (int, float) else result

        return run

    def looks(operation: str) -> Callable[..., Any]:
        def run(self: Any, *others: Any) -> Any:
            reads.names.add(name)
            return getattr(kind, operation)(self, *others)

        return run

    methods = {operation: counts(operation) for operation in _COUNTING}
    methods |= {operation: looks(operation) for operation in _LOOKING if hasattr(kind, operation)}
    number: int | float = type(f"Watched{kind.__name__.title()}", (kind,), methods)(value)
    return number


_COUNTING = ("__add__", "__radd__", "__sub__")
_LOOKING = (
    "__lt__", "__le__", "__eq__", "__ne__", "__gt__", "__ge__", "__bool__", "__hash__", "__int__", "__float__",
    "__index__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__floordiv__", "__rfloordiv__", "__truediv__",
    "__rtruediv__", "__pow__", "__rpow__", "__rsub__", "__neg__", "__abs__", "__round__", "__divmod__", "__and__",
    "__or__", "__xor__", "__lshift__", "__rshift__",
)  # fmt: skip


@contextmanager
def watched_numbers(model: nn.Module, names: list[str]) -> Iterator[Reads]:
    """Replaces the numbers among the attributes ``names`` (``path.attribute``) by watched ones, for a recording.

    Numbers that are entries of such a list or dict are watched as well. The caller restores the attributes.
    """
    reads = Reads()
    modules = dict(model.named_modules())
    for name in names:
        path, _, attribute = name.rpartition(".")
        held = modules[path].__dict__
        value = held.get(attribute)
        if type(value) in (int, float):
            held[attribute] = watched(value, name, reads)
        elif type(value) in (list, dict):
            for key in list(value) if type(value) is dict else range(len(value)):
                if type(value[key]) in (int, float):
                    value[key] = watched(value[key], name, reads)
    yield reads
