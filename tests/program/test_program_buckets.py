"""Gradients in buckets, reduced and applied while the backward phase goes on: the same losses and weights as plain
PyTorch, whatever is cut, in any order of the workers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from partita.errors import PlanError, ProgramError
from partita.graph.capture import capture
from partita.graph.graph import Graph
from partita.program import buckets, check, lower
from partita.program.instructions import (
    AllReduce,
    Await,
    Instruction,
    ProgramSet,
    ReduceScatter,
    Run,
    Start,
    Update,
)

sys.path.insert(0, str(Path(__file__).parent))
from program_cases import CASES, Job, captured, make_plan, plain_steps
from test_program_tensor import GRIDS, placements, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")
# Graphs of their own: lowered programs are kept by graph, and those of other tests have larger buckets.
KEPT = {
    name: captured(CASES[name], 8) for name in ("mlp", "partly", "batch_norm", "transformer_dropout", "gru", "conv")
}
ONE_STAGE = sorted(name for name, ((_, _, pipeline), _) in GRIDS.items() if pipeline == 1)


@pytest.fixture(autouse=True, scope="module")
def small_buckets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "BUCKET_BYTES", 100)
        yield


def num_updates(programs: ProgramSet, worker: int = 0) -> int:
    return len(programs.programs[worker].updates)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.data(), st.sampled_from(sorted(KEPT)), st.sampled_from(ONE_STAGE))
def test_any_cut_trains_like_plain_pytorch(data: st.DataObject, case: str, grid: str) -> None:
    model, graph, batches = KEPT[case]
    (num_data, num_tensor, _), processes = GRIDS[grid]
    inputs = data.draw(st.composite(placements)(graph, num_data, num_tensor))
    overlap = data.draw(st.sampled_from([0, 1, 100, 300]))
    plan = make_plan(graph, data=num_data, tensor=num_tensor, processes=processes, inputs=inputs, bucket_bytes=overlap)
    try:
        programs = lower(graph, plan)
    except PlanError as error:
        assert "must form one block" in str(error) or "draw random numbers" in str(error)
        return
    check(programs)
    if case != "partly" and overlap < 300:  # its loss reads all parameters
        assert max(num_updates(programs, worker) for worker in range(len(processes))) > 1
    job, plain = Job(graph, programs, model, seed=data.draw(st.integers(0, 99))), copy.deepcopy(model)
    torch.manual_seed(1)
    expected = plain_steps(plain, CASES[case].loss, batches, 0.1)
    torch.manual_seed(1)
    for loss, batch in zip(expected, batches, strict=True):
        for found in job.step(batch, 0.1).values():
            assert abs(found.item() - loss) < 1e-5
    for process in job.memory:
        for name, value in plain.named_parameters():
            torch.testing.assert_close(*weights_of(job, name, process, value.detach()), atol=2e-5, rtol=1e-4)


def lowered(graph: Graph, **options: object) -> ProgramSet:
    return lower(graph, make_plan(graph, **options))  # type: ignore[arg-type]


class Late(nn.Module):
    """Its loss reads `weight` once more, through a view, after everything that leads to the gradient of `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(30, 30))
        self.other = nn.Linear(30, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.other(x)) @ self.weight.t()


def test_no_bucket_is_applied_while_a_view_of_its_parameters_is_still_read() -> None:
    torch.manual_seed(0)
    model, batch = Late(), torch.randn(8, 30)
    graph = capture(model, lambda m, b: m(b).square().mean(), batch)
    programs = lowered(graph, data=2)
    assert num_updates(programs) == 2
    for program in programs.programs:
        shows = {"p:weight"}
        for item in program.instructions:
            if isinstance(item, Run):
                assert not shows & set(item.inputs) or "p:weight" in shows
                memory = programs.segments[item.segment].memory
                for output, place in zip(item.outputs, memory.shown, strict=True):
                    if place < 0 and item.inputs[-1 - place] in shows:
                        shows.add(output)
            elif isinstance(item, Update) and any(part.parameter == "weight" for part in item.slices):
                shows.clear()
    plain = copy.deepcopy(model)
    plain_steps(plain, lambda m, b: m(b).square().mean(), [batch, batch], 0.5)
    job = Job(graph, programs, model)
    job.step(batch, 0.5)
    job.step(batch, 0.5)
    torch.testing.assert_close(job.memory[0]["p:weight"], plain.weight.detach(), atol=1e-5, rtol=1e-4)


def test_the_loss_is_there_before_the_first_update() -> None:
    _, graph, _ = KEPT["mlp"]
    for program in lowered(graph, data=2).programs:
        first = next(place for place, item in enumerate(program.instructions) if isinstance(item, Update))
        sums = [item for item in program.instructions[:first] if isinstance(item, AllReduce)]
        assert any(program.loss in item.registers for item in sums)


def test_every_gradient_is_freed_before_the_next_bucket_is_made() -> None:
    """The most gradients that a worker holds at a time is about a bucket, not all of them."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(8)]), torch.randn(8, 32)
    graph = capture(model, lambda m, b: m(b).square().mean(), batch)
    programs = lowered(graph, data=2)
    assert num_updates(programs) == 8
    for program in programs.programs:
        held: set[str] = set()
        most = 0
        for item in program.instructions:
            if isinstance(item, Run):
                held |= {name for name in item.outputs if name.startswith("n:result")} - {program.loss}
            held -= set(getattr(item, "registers", ())) if type(item).__name__ == "Free" else set()
            most = max(most, len(held))
        assert most <= 2


@pytest.mark.parametrize("options", [{"data": 2, "microbatches": 2}, {"pipeline": 2, "processes": (0, 0)}])
def test_sums_over_microbatches_and_stages_are_reduced_at_the_end(options: dict[str, object]) -> None:
    _, graph, _ = KEPT["mlp"]
    assert all(len(program.updates) <= 1 for program in lowered(graph, **options).programs)


def test_optimizers_that_need_whole_parameters_get_them_together() -> None:
    _, graph, _ = KEPT["mlp"]
    programs = lower(graph, make_plan(graph, data=2), whole_parameters=True)
    assert num_updates(programs) == 1
    assert sum(isinstance(item, ReduceScatter) for item in programs.programs[0].instructions) == 1


# In the background ---------------------------------------------------------------------------------------------------


def overlapped(**options: object) -> ProgramSet:
    return lowered(KEPT["mlp"][1], data=2, processes=(0, 1), bucket_bytes=100, **options)


def test_sums_over_processes_start_before_the_last_segment_and_end_before_their_update() -> None:
    for program in overlapped().programs:
        items = program.instructions
        last_run = max(place for place, item in enumerate(items) if isinstance(item, Run))
        started = {item.key: place for place, item in enumerate(items) if isinstance(item, Start)}
        awaited = {item.key: place for place, item in enumerate(items) if isinstance(item, Await)}
        assert len(started) > 1 and min(started.values()) < last_run
        assert set(started) == set(awaited) and all(awaited[key] > last_run for key in started)
        loss = next(i for i, item in enumerate(items) if isinstance(item, AllReduce) and program.loss in item.registers)
        assert all(place > loss for place, item in enumerate(items) if isinstance(item, Update))


def test_nothing_runs_in_the_background_of_one_process() -> None:
    programs = lowered(KEPT["mlp"][1], data=2, processes=(0, 0), bucket_bytes=100)
    assert not any(isinstance(item, (Start, Await)) for program in programs.programs for item in program.instructions)


def changed(programs: ProgramSet, worker: int, make: Callable[[list[Instruction]], list[Instruction]]) -> ProgramSet:
    every = [
        replace(program, instructions=tuple(make(list(program.instructions)))) if program.worker == worker else program
        for program in programs.programs
    ]
    return replace(programs, programs=tuple(every))


def places(items: list[Instruction], kind: type) -> list[int]:
    return [place for place, item in enumerate(items) if isinstance(item, kind)]


def without(kind: type) -> Callable[[list[Instruction]], list[Instruction]]:
    return lambda items: [item for place, item in enumerate(items) if place != places(items, kind)[0]]


def swapped(kind: type) -> Callable[[list[Instruction]], list[Instruction]]:
    def make(items: list[Instruction]) -> list[Instruction]:
        one, two = places(items, kind)[:2]
        between = items[one:two]
        return [*items[:one], *between[1:], items[two], between[0], *items[two + 1 :]]

    return make


def read_early(items: list[Instruction]) -> list[Instruction]:
    """The first update before its sum is awaited."""
    at = places(items, Await)[0]
    update = next(place for place in places(items, Update) if place > at)
    return [*items[:at], items[update], *items[at:update], *items[update + 1 :]]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (without(Start), "deadlock"),
        (without(Await), "must be written before it is read|must await"),
        (swapped(Start), "in one order"),
        (read_early, "must be written before it is read"),
    ],
)
def test_a_wrong_use_of_the_background_is_found(
    make: Callable[[list[Instruction]], list[Instruction]], text: str
) -> None:
    programs = overlapped()
    check(programs)
    with pytest.raises(ProgramError, match=text):
        check(changed(programs, 1, make))
