"""A process that keeps one core partly busy: `python -m benchmarks.peers.neighbour --child burn`.

Asked to `start`, it burns `share` of every `period_s` on the core `core` until it is asked to `stop`; it then tells
how much processor time it took, and over how long.
"""

from __future__ import annotations

import os
import threading
import time

from benchmarks.processes import Message, serve


class Neighbour:
    """Answers `start` and `stop`."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken: Message = {}

    def __call__(self, message: Message) -> Message:
        if message["do"] == "start":
            self._stop.clear()
            arguments = (message["core"], message["share"], message["period_s"])
            self._thread = threading.Thread(target=self._burn, args=arguments)
            self._thread.start()
            return {}
        assert self._thread is not None, "a neighbour must be started before it is stopped"
        self._stop.set()
        self._thread.join()
        return self._taken

    def _burn(self, core: int, share: float, period_s: float) -> None:
        """Busy by the clock, not by processor time: who shares the core with it slows it down as well."""
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})  # of this thread only
        start_s, cpu_start_s = time.perf_counter(), time.thread_time()
        begin_s = start_s
        while not self._stop.is_set():
            while time.perf_counter() - begin_s < share * period_s:
                pass
            begin_s += period_s
            time.sleep(max(0.0, begin_s - time.perf_counter()))
            begin_s = max(begin_s, time.perf_counter() - period_s)  # no burst after a long wait
        wall_s = time.perf_counter() - start_s
        self._taken = {"cpu_s": time.thread_time() - cpu_start_s, "wall_s": wall_s}


if __name__ == "__main__":
    serve(Neighbour())
