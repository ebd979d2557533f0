"""Pipeline schedules as data: the order of forward and backward tasks of one stage.

* GPipe (Huang et al., 2019): all forward tasks, then all backward tasks.
* 1F1B (Narayanan et al., 2019, PipeDream-Flush): stage s of S runs S - s - 1 forward tasks ahead, then one forward and
  one backward in turn, so that it holds the activations of at most S - s microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.graph.graph import Phase


@dataclass(frozen=True)
class Task:
    """One pass of a microbatch through a stage. `phases` has both phases where they run as one."""

    phases: tuple[Phase, ...]
    microbatch: int


def tasks_of_stage(schedule: str, stage: int, num_stages: int, num_microbatches: int) -> tuple[Task, ...]:
    """The tasks of one stage in order.

    Example:
        >>> [(t.phases[0].value[0], t.microbatch) for t in tasks_of_stage("1f1b", 0, 2, 2)]
        [('f', 0), ('f', 1), ('b', 0), ('b', 1)]
    """
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
