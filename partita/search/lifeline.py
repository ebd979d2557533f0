"""A process that ends when the one that started it is gone, however that has ended.

The starter holds one end of a pipe and never writes to it; when it is gone, the other end reads "end of file". A thread
waits for that. On Linux the kernel is asked as well, for a process whose threads hang in code that never lets Python
run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with(lifeline: Connection) -> None:
    """From now on this process is killed when the other end of `lifeline`, or its parent process, is gone."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_wait, args=(lifeline,), name="lifeline", daemon=True).start()


def offer_to_be_killed(score: int) -> None:
    """Where the system is short of memory, this process and those that it starts are killed before others; a score
    counts like so many thousandths of the memory that a process uses. Only Linux knows how."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score), encoding="ascii")


def _wait(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)
