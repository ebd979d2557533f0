"""Keeps a command alive: it goes on in a child process, and in another one whenever that is killed.

The child is forked, so a new one has everything that was imported before, and can meet a deadline that is near. The
system kills the largest process when memory is short; the child asks to be taken before the one that attends it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import Pipe

from partita.search.lifeline import end_with, offer_to_be_killed

MOST_STARTS = 20
CAN_ATTEND = hasattr(os, "fork")
_ASKED = (-signal.SIGINT, -signal.SIGTERM)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OFFER = 250


def attend(until_s: float) -> None:
    """Returns in a child process. The process that called it waits, forks another child if this one is killed, and ends
    with the code of the last one.

    A child that ends by itself, whatever its code, or is asked to end (SIGINT, SIGTERM) has no successor; nor has any
    after `until_s` (seconds since 1970). When the process that called this is gone, so is the child.
    """
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in range(1, MOST_STARTS + 1):
        sys.stdout.flush()
        sys.stderr.flush()
        far, near = Pipe(duplex=False)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until both have handlers of their own
        child = os.fork()
        if child == 0:
            for asked, handler in handlers.items():
                signal.signal(asked, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            near.close()
            offer_to_be_killed(_OFFER)
            end_with(far)
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child gets it as well, and ends
        signal.signal(signal.SIGTERM, lambda *_, child=child: os.kill(child, signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        far.close()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        near.close()
        if code >= 0:
            os._exit(code)
        if code in _ASKED or time.time() > until_s or number == MOST_STARTS:
            os._exit(128 - code)
        print(f"partita: the search was killed by signal {-code}; it goes on in another process", file=sys.stderr)
        time.sleep(min(5.0, 0.05 * 2**number))
    raise AssertionError("unreachable")
