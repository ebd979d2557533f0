"""Pipeline schedules as data: the order of forward and backward tasks of one stage.

* GPipe (Huang et al., 2019): all forward tasks, then all backward tasks.
* 1F1B (Narayanan et al., 2019, PipeDream-Flush): stage s of S runs S - s - 1 forward tasks ahead, then one forward and
  one backward in turn, so that it holds the activations of at most S - s microbatches.
* Zero-bubble (ZB-H1 of Qi et al., 2023, section 2.2): 1F1B in which a backward task computes the gradients of its
  inputs alone; the weight gradients of microbatch k follow the backward task of microbatch k + s, so that every stage
  holds at most S microbatches and the last stages do not wait at the end.
* Interleaved (Narayanan et al., 2021, section 2.2): every device has v chunks, chunk c of device s being stage c S + s
  of v S. Forward tasks come in rounds: S microbatches through chunk 0, the same S through chunk 1, .., then the next S;
  backward tasks likewise from the last chunk on; 2 (S - s - 1) + (v - 1) S forward tasks go ahead. S divides m.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from partita.errors import PlanError
from partita.graph.graph import Phase


@dataclass(frozen=True)
class Task:
    """One pass of a microbatch through a stage. `phases` has both phases where they run as one. `part` is what of the
    backward phase runs: all of it, what other stages wait for ("input"), or the weight gradients ("weight")."""

    phases: tuple[Phase, ...]
    microbatch: int
    chunk: int = 0
    part: Literal["whole", "input", "weight"] = "whole"


def tasks_of_stage(
    schedule: str, stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> tuple[Task, ...]:
    """The tasks of one stage in order; for the interleaved schedule those of one device and its `num_chunks` chunks,
    `num_stages` being the number of devices. Raises `PlanError` where the schedule cannot be.

    Example:
        >>> [(t.phases[0].value[0], t.microbatch) for t in tasks_of_stage("1f1b", 0, 2, 2)]
        [('f', 0), ('f', 1), ('b', 0), ('b', 1)]
    """
    if schedule == "interleaved":
        return _interleaved(stage, num_stages, num_microbatches, num_chunks)
    if num_chunks != 1:
        raise PlanError(f"Only the interleaved schedule has chunks, but {schedule!r} was given {num_chunks} of them.")
    if schedule == "zero_bubble":
        return tuple(_zero_bubble(stage, num_stages, num_microbatches))
    ahead = num_microbatches if schedule == "gpipe" else min(num_stages - stage - 1, num_microbatches)
    if num_stages == 1 and num_microbatches == 1:
        ahead = 0
    if ahead == 0:  # the last stage under 1F1B: backward follows forward at once, so they are one task
        return tuple(Task((Phase.FORWARD, Phase.BACKWARD), k) for k in range(num_microbatches))
    tasks = [Task((Phase.FORWARD,), k) for k in range(ahead)]
    for k in range(num_microbatches):
        if k + ahead < num_microbatches:
            tasks.append(Task((Phase.FORWARD,), k + ahead))
        tasks.append(Task((Phase.BACKWARD,), k))
    return tuple(tasks)


def _zero_bubble(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Task]:
    """1F1B's tasks with the backward task split; its weight part comes `stage` microbatches later."""
    waiting: list[int] = []
    for task in tasks_of_stage("1f1b", stage, num_stages, num_microbatches):
        if Phase.FORWARD in task.phases:
            yield Task((Phase.FORWARD,), task.microbatch)
        if Phase.BACKWARD in task.phases:
            yield Task((Phase.BACKWARD,), task.microbatch, part="input")
            waiting.append(task.microbatch)
            if len(waiting) > stage:
                yield Task((Phase.BACKWARD,), waiting.pop(0), part="weight")
    for microbatch in waiting:
        yield Task((Phase.BACKWARD,), microbatch, part="weight")


def _interleaved(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Task, ...]:
    if num_microbatches % num_stages:
        raise PlanError(
            f"The interleaved schedule must have a number of microbatches that its {num_stages} stages divide, but got "
            f"{num_microbatches}. Use {-(-num_microbatches // num_stages) * num_stages} microbatches or 1f1b."
        )
    rounds = range(0, num_microbatches, num_stages)
    steps = [(chunk, first + k) for first in rounds for chunk in range(num_chunks) for k in range(num_stages)]
    forward = [Task((Phase.FORWARD,), k, chunk) for chunk, k in steps]
    backward = [Task((Phase.BACKWARD,), k, num_chunks - 1 - chunk) for chunk, k in steps]
    ahead = min(len(steps), 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages)
    tasks = forward[:ahead]
    for place, task in enumerate(backward):
        tasks += [*forward[ahead + place : ahead + place + 1], task]
    return tuple(tasks)
