"""Schedules as data: every task once, backward after forward, and no more activations in flight than promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import PlanError
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


@given(SIZES)
def test_zero_bubble_is_1f1b_with_weight_gradients_apart(size: tuple[int, int, int]) -> None:
    """Every stage holds at most S microbatches until their weight gradients are done, and those come after their
    backward task, in order."""
    _, num_stages, num_microbatches = size
    tasks = tasks_of_stage("zero_bubble", *size)
    kinds = {part: [t.microbatch for t in tasks if B in t.phases and t.part == part] for part in ("input", "weight")}
    assert kinds == {"input": list(range(num_microbatches)), "weight": list(range(num_microbatches))}
    plain = [(p, t.microbatch) for t in tasks_of_stage("1f1b", *size) for p in t.phases]
    assert [(t.phases[0], t.microbatch) for t in tasks if t.part != "weight"] == plain
    held = most = 0
    done: set[int] = set()
    for task in tasks:
        if task.part == "weight":
            assert task.microbatch in done
        elif B in task.phases:
            done.add(task.microbatch)
        held += {"whole": 1, "input": 0, "weight": -1}[task.part]
        most = max(most, held)
    assert held == 0 and most == min(num_stages, num_microbatches)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_interleaved_never_waits_in_a_circle(num_stages: int, rounds: int, num_chunks: int) -> None:
    m = num_stages * rounds
    lists = [list(tasks_of_stage("interleaved", s, num_stages, m, num_chunks)) for s in range(num_stages)]
    done: set[tuple[int, Phase, int]] = set()
    last = num_stages * num_chunks - 1
    while any(lists):
        moved = False
        for device, tasks in enumerate(lists):
            if not tasks:
                continue
            stage, phase, k = tasks[0].chunk * num_stages + device, tasks[0].phases[0], tasks[0].microbatch
            needs = [(stage - 1, F, k)] if phase is F and stage else []
            needs += [(stage, F, k)] if phase is B else []
            needs += [(stage + 1, B, k)] if phase is B and stage < last else []
            if all(need in done for need in needs):
                tasks.pop(0)
                done.add((stage, phase, k))
                moved = True
        assert moved, "deadlock"
    assert len(done) == 2 * m * (last + 1)


def test_what_a_schedule_cannot_be() -> None:
    with pytest.raises(PlanError, match="2 stages divide, but got 3. Use 4 microbatches or 1f1b"):
        tasks_of_stage("interleaved", 0, 2, 3, 2)
    with pytest.raises(PlanError, match="Only the interleaved schedule has chunks"):
        tasks_of_stage("1f1b", 0, 2, 4, 2)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_one_stage_and_microbatch_is_one_task(schedule: str) -> None:
    assert tasks_of_stage(schedule, 0, 1, 1) == (Task((F, B), 0),)
