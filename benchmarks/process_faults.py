"""Faults of one process of three, whatever the method that brings them together; for `benchmarks.faults`.

`finish` ends the job, and says what it has come to.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.common import Row
from benchmarks.elastic_jobs import NAMES, Job, running
from benchmarks.fault_job import EVERY

STOP_TIME_S = 20.0
IN_FLIGHT_S = {"exact": 0.1, "diloco": 0.0}  # after a stop: steps that end meanwhile may have been made with all
UNAWARE_S = {"exact": 0.0, "diloco": 0.5}  # after it: a replica goes on by what it knew until it agrees next


def killed(method: str, finish: Callable[[Job], Row]) -> Row:
    with _training(method) as job:
        moment_s = time.time()
        job.signal("b", signal.SIGKILL)
        others_s = _others_s(job, moment_s)
        again_s = time.time()
        job.start("b")
        rejoined_s = job.stepped_after("b", again_s) - again_s
        job.all_take_part()
        return {"others_s": others_s, "rejoined_s": rejoined_s, **finish(job)}


def stopped(method: str, finish: Callable[[Job], Row]) -> Row:
    with _training(method) as job:
        moment_s = time.time()
        job.signal("b", signal.SIGSTOP)
        others_s = _others_s(job, moment_s, IN_FLIGHT_S[method])
        time.sleep(max(STOP_TIME_S - (time.time() - moment_s), 0.0))
        going_s = time.time()
        job.signal("b", signal.SIGCONT)
        rejoined_s = job.stepped_after("b", going_s + UNAWARE_S[method], len(NAMES)) - going_s
        job.all_take_part()
        return {"others_s": others_s, "rejoined_s": rejoined_s, **finish(job)}


def late(method: str, finish: Callable[[Job], Row]) -> Row:
    with _training(method, ("a", "b")) as job:
        started_s = time.time()
        job.start("c")
        rejoined_s = job.stepped_after("c", started_s) - started_s
        job.all_take_part()
        return {"rejoined_s": rejoined_s, **finish(job)}


@contextlib.contextmanager
def _training(method: str, names: Sequence[str] = NAMES) -> Iterator[Job]:
    """A job that has made some steps: replicas have agreed."""
    with running(names, method=method) as job:
        job.until(lambda: job.last("a")["step"] >= 3 * EVERY, f"step {3 * EVERY}")
        yield job


def _others_s(job: Job, moment_s: float, in_flight_s: float = 0.0) -> float:
    """From the moment until the next step of both others is over."""
    return max(job.stepped_after(name, moment_s + in_flight_s) for name in ("a", "c")) - moment_s
