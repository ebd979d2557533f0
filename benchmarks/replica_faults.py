"""Faults of replicas that train apart and agree every `EVERY` steps (DiLoCo)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.common import Row
from benchmarks.elastic_jobs import Job, running
from benchmarks.fault_job import EVERY, judge
from benchmarks.process_faults import STOP_TIME_S, killed, late, stopped

LARGEST_RATIO = 1.1  # of the loss that undisturbed replicas reach
MORE_STEPS = 10 * EVERY  # after the fault


def slow() -> Row:
    with running(("a", "b"), method="diloco") as job:
        plain_s = job.last("a")["time_s"]
        job.start("c", slowness=10 * plain_s / 4)
        job.all_take_part()
        return _finish(job)


REPLICA_FAULTS: dict[str, Callable[[], Row]] = {
    "kill -9, DiLoCo": lambda: killed("diloco", _finish),
    f"stopped for {STOP_TIME_S:g} s, DiLoCo": lambda: stopped("diloco", _finish),
    "joins late, DiLoCo": lambda: late("diloco", _finish),
    "a tenth of the speed, DiLoCo": slow,
}


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
