"""Schedules as data: every task once, backward after forward, and no more activations in flight than promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.graph.graph import Phase
from partita.program.schedule import Task, tasks_of_stage

F, B = Phase.FORWARD, Phase.BACKWARD
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 7)).flatmap(
    lambda size: st.tuples(st.integers(0, size[0] - 1), st.just(size[0]), st.just(size[1]))
)


@given(st.sampled_from(["gpipe", "1f1b"]), SIZES)
def test_every_pass_comes_once_and_backward_after_forward(schedule: str, size: tuple[int, int, int]) -> None:
    num_microbatches = size[2]
    passes = [(phase, task.microbatch) for task in tasks_of_stage(schedule, *size) for phase in task.phases]
    assert sorted(passes, key=str) == sorted(((p, k) for p in (F, B) for k in range(num_microbatches)), key=str)
    for k in range(num_microbatches):
        assert passes.index((F, k)) < passes.index((B, k))
    for phase in (F, B):
        assert [k for p, k in passes if p is phase] == list(range(num_microbatches))


@given(SIZES)
def test_1f1b_holds_at_most_as_many_microbatches_as_stages_are_left(size: tuple[int, int, int]) -> None:
    stage, num_stages, num_microbatches = size
    held = most = 0
    for task in tasks_of_stage("1f1b", stage, num_stages, num_microbatches):
        for phase in task.phases:
            held += 1 if phase is F else -1
            most = max(most, held)
    assert most == min(num_stages - stage, num_microbatches)


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 5), st.integers(1, 7))
def test_stages_never_wait_in_a_circle(schedule: str, num_stages: int, num_microbatches: int) -> None:
    """Forward k of a stage needs forward k of the stage below, backward k that of the stage above."""
    lists = [list(tasks_of_stage(schedule, s, num_stages, num_microbatches)) for s in range(num_stages)]
    done: set[tuple[int, Phase, int]] = set()

    def ready(stage: int, task: Task) -> bool:
        below = stage == 0 or F not in task.phases or (stage - 1, F, task.microbatch) in done
        above = stage == num_stages - 1 or B not in task.phases or (stage + 1, B, task.microbatch) in done
        return below and above

    while any(lists):
        moved = [stage for stage, tasks in enumerate(lists) if tasks and ready(stage, tasks[0])]
        assert moved, "deadlock"
        for stage in moved:
            task = lists[stage].pop(0)
            done.update((stage, phase, task.microbatch) for phase in task.phases)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_one_stage_and_microbatch_is_one_task(schedule: str) -> None:
    assert tasks_of_stage(schedule, 0, 1, 1) == (Task((F, B), 0),)
