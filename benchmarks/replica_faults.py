"""Faults of replicas that train apart and agree every `EVERY` steps (DiLoCo)."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable

import torch

from benchmarks.common import Row
from benchmarks.elastic_jobs import NAMES, Job, running
from benchmarks.fault_job import EVERY, judge

LARGEST_RATIO = 1.1  # of the loss that undisturbed replicas reach
MORE_STEPS = 10 * EVERY  # after the fault
STOP_TIME_S = 20.0


def killed() -> Row:
    with running(method="diloco") as job:
        _train(job, 3 * EVERY)
        moment_s = time.time()
        job.signal("b", signal.SIGKILL)
        others_s = max(job.stepped_after(name, moment_s) for name in ("a", "c")) - moment_s
        again_s = time.time()
        job.start("b")
        rejoined_s = job.stepped_after("b", again_s) - again_s
        job.all_take_part()
        return {"others_s": others_s, "rejoined_s": rejoined_s, **_finish(job)}


def stopped() -> Row:
    with running(method="diloco") as job:
        _train(job, 3 * EVERY)
        moment_s = time.time()
        job.signal("b", signal.SIGSTOP)
        others_s = max(job.stepped_after(name, moment_s) for name in ("a", "c")) - moment_s
        time.sleep(STOP_TIME_S)
        going_s = time.time()
        job.signal("b", signal.SIGCONT)
        job.until(lambda: job.last("b")["num"] == len(NAMES) and job.last("b")["end_s"] > going_s + 0.5, "an agreement")
        rejoined_s = time.time() - going_s
        return {"others_s": others_s, "rejoined_s": rejoined_s, **_finish(job)}


def late() -> Row:
    with running(("a", "b"), method="diloco") as job:
        _train(job, 3 * EVERY)
        started_s = time.time()
        job.start("c")
        rejoined_s = job.stepped_after("c", started_s) - started_s
        job.all_take_part()
        return {"rejoined_s": rejoined_s, **_finish(job)}


def slow() -> Row:
    with running(("a", "b"), method="diloco") as job:
        plain_s = job.last("a")["time_s"]
        job.start("c", slowness=10 * plain_s / 4)
        job.all_take_part()
        return _finish(job)


REPLICA_FAULTS: dict[str, Callable[[], Row]] = {
    "kill -9, DiLoCo": killed,
    f"stopped for {STOP_TIME_S:g} s, DiLoCo": stopped,
    "joins late, DiLoCo": late,
    "a tenth of the speed, DiLoCo": slow,
}


def _train(job: Job, num_steps: int) -> None:
    job.until(lambda: job.last("a")["step"] >= num_steps, f"step {num_steps}")


def _finish(job: Job) -> Row:
    """Ends the job some agreements later; what the replicas have come to, beside undisturbed ones."""
    end = (job.last("a")["step"] + MORE_STEPS) // EVERY * EVERY
    job.end_at(end)
    weights = {name: torch.load(job.folder / f"{name}.pt", weights_only=True) for name in job.processes}
    first = next(iter(weights.values()))
    differ = [
        name for name, own in weights.items() if any(not torch.equal(a, b) for a, b in zip(own, first, strict=True))
    ]
    lines = {name: job.lines(name) for name in job.processes}
    seen = {line["step"] for own in lines.values() for line in own}
    longest = max(len(own) for own in lines.values())
    return {
        "steps": end,
        "loss_ratio": judge(first) / undisturbed(end),
        "lost_steps": sum(number not in seen for number in range(1, end + 1)),
        "windows_missed": sum((longest - len(own)) // EVERY for own in lines.values()),
        "longest_s": max(line["time_s"] for own in lines.values() for line in own),
        **({"errors": f"{differ} must end with the weights of {next(iter(weights))}"} if differ else {}),
    }


@functools.cache
def undisturbed(num_steps: int) -> float:
    """What replicas reach that nothing happens to."""
    with running(method="diloco") as job:
        job.end_at(num_steps)
        return judge(torch.load(job.folder / "a.pt", weights_only=True))
