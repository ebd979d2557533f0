"""Starts a command, and starts it again when it is killed. Run as a file, without partita and torch around it:

    python attend.py UNTIL COMMAND...

A command that ends by itself, whatever its code, or is asked to end (SIGINT, SIGTERM) is not started again; nor is any
after UNTIL (seconds since 1970). The command finds the number of a file in the environment that reads "end of file"
when this process is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

LIFELINE = "PARTITA_LIFELINE"
MOST_STARTS = 20
_ASKED = (-signal.SIGINT, -signal.SIGTERM)


def attend(until_s: float, command: list[str]) -> int:
    """Runs the command to its end; its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it as well, and ends
    for number in range(1, MOST_STARTS + 1):
        far, near = os.pipe()
        process = subprocess.Popen(command, env={**os.environ, LIFELINE: str(far)}, pass_fds=(far,))
        signal.signal(signal.SIGTERM, lambda *_, process=process: process.terminate())
        os.close(far)
        code = process.wait()
        os.close(near)
        if code >= 0:
            return code
        if code in _ASKED or time.time() > until_s or number == MOST_STARTS:
            return 128 - code
        print(f"partita: the search was killed by signal {-code}; it is started again", file=sys.stderr, flush=True)
        time.sleep(min(5.0, 0.1 * 2**number))
    raise AssertionError("unreachable")


if __name__ == "__main__":
    raise SystemExit(attend(float(sys.argv[1]), sys.argv[2:]))
