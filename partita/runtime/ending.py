"""The end of the process: what partita still has open is closed in order while the interpreter is whole.

A thread that comes back from C++ code (a kernel, a store, gloo's own threads when they let go of a tensor) asks for the
interpreter's lock. Once the interpreter is being taken down, Python before 3.14 answers by ending that thread; C++ does
not allow that in a destructor, so the *process* is aborted ("terminate called without an active exception"), after
results that were right (pytorch/pytorch#190489). No thread that partita has started may therefore be in C++ code by
then. Torch does not see to it: `destroy_process_group` forgets a group, whose threads end with the last reference.

The order: worker threads come to rest, the others hear goodbye, process groups end, and with them their threads. Stores
go last, with the interpreter. Every wait has a limit; when it passes, standard error says what was waited for.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import weakref
from enum import IntEnum
from typing import Protocol

# Beyond this, what is waited for is not about to come: a kernel takes seconds, a lost process shows after ten.
END_TIME_S = 12.0


class Order(IntEnum):
    """When something is closed, at the end of the process."""

    WORKERS = 0
    CONNECTIONS = 1


class Ends(Protocol):
    def at_end(self) -> None:
        """Come to rest, within a time limit. Called in the main thread; may have been closed before."""
        ...


_OPEN: dict[Order, weakref.WeakSet[Ends]] = {order: weakref.WeakSet() for order in Order}
_OWNERS: list[int] = []  # the process that registered; its forks have none of its threads, and must not speak for it


def close_at_end(what: Ends, order: Order) -> None:
    """Have `what.at_end()` called when the interpreter ends, unless `what` has been collected by then."""
    if os.getpid() not in _OWNERS:
        for group in _OPEN.values():
            group.clear()  # those of the parent, in a fork
        if not _OWNERS:
            atexit.register(_close_all)
        _OWNERS[:] = [os.getpid()]
    _OPEN[order].add(what)


def _close_all() -> None:
    if os.getpid() not in _OWNERS:
        return
    for order in Order:
        for what in list(_OPEN[order]):
            try:
                what.at_end()
            except Exception:  # told, like any error at the end, but the rest must still be closed
                traceback.print_exc()


def tell_unended(what: str, limit_s: float) -> None:
    """Say at the end of the process what did not come to rest in time."""
    print(
        f"partita: the process must end with all its threads at rest, but waited {limit_s:g} s in vain for {what}; it "
        "ends without",
        file=sys.stderr,
        flush=True,
    )
