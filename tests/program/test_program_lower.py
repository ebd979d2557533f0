"""`lower` against plain PyTorch: a plan, executed in any order of its workers, gives the same losses and weights."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.errors import PlanError
from partita.program import check, forget, lower
from partita.program.instructions import Recv, ReduceScatter, Run, Send
from partita.program.order import check_order

sys.path.insert(0, str(Path(__file__).parent))
from program_cases import CASES, Job, captured, make_plan, plain_steps, read_parameters

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


@dataclass(frozen=True)
class Layout:
    rows: int = 8
    options: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "alone": Layout(),
    "alone_4_microbatches": Layout(options={"microbatches": 4}),
    "data2": Layout(options={"data": 2}),
    "data3_uneven": Layout(rows=8, options={"data": 3, "shares": (4, 1, 3)}),
    "data2_3_microbatches": Layout(rows=7, options={"data": 2, "microbatches": 3}),
    "data2_two_processes": Layout(options={"data": 2, "processes": (0, 1)}),
    "data3_two_processes": Layout(options={"data": 3, "processes": (0, 0, 1)}),
    "pipeline2": Layout(options={"pipeline": 2}),
    "pipeline2_gpipe4": Layout(options={"pipeline": 2, "microbatches": 4, "schedule": "gpipe"}),
    "pipeline3_1f1b4": Layout(options={"pipeline": 3, "microbatches": 4}),
    "pipeline2_across": Layout(options={"pipeline": 2, "processes": (0, 1), "microbatches": 2}),
    "grid_across_stages": Layout(options={"data": 2, "pipeline": 2, "processes": (0, 0, 1, 1), "microbatches": 2}),
    "grid_across_data": Layout(options={"data": 2, "pipeline": 2, "processes": (0, 1, 0, 1)}),
}


# Small models meet every layout; the others those that are special for them.
EVERYWHERE = ("mlp", "partly")
ELSEWHERE = {
    "dropout": ("alone_4_microbatches", "data3_uneven", "grid_across_stages"),
    "batch_norm": ("data3_uneven", "data3_two_processes", "grid_across_data"),
    "conv": ("data2_3_microbatches", "pipeline2"),
    "lstm": ("data2_3_microbatches", "grid_across_data"),
    "transformer": ("data2_3_microbatches", "pipeline3_1f1b4", "pipeline2_across", "grid_across_data"),
    "transformer_dropout": ("alone", "grid_across_stages"),
    "denoise": ("data2_3_microbatches", "pipeline2_gpipe4"),
}
PAIRS = [(case, layout) for case in EVERYWHERE for layout in LAYOUTS]
PAIRS += [(case, layout) for case, layouts in ELSEWHERE.items() for layout in layouts]


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_any_plan_trains_like_plain_pytorch(case: str, layout: str) -> None:
    chosen, where = CASES[case], LAYOUTS[layout]
    model, graph, batches = captured(chosen, where.rows)
    programs = lower(graph, make_plan(graph, **where.options))
    check(programs)
    check_order(programs)
    job = Job(graph, programs, model, seed=len(case) + len(layout))
    expected = copy.deepcopy(model)
    torch.manual_seed(11)
    losses = [job.step(batch, 0.1) for batch in batches]
    torch.manual_seed(11)
    plain = plain_steps(expected, chosen.loss, batches, 0.1)
    for found, value in zip(losses, plain, strict=True):
        assert set(found) == set(job.memory), "every process must have the loss"
        for loss in found.values():
            assert loss.item() == pytest.approx(value, rel=1e-4, abs=1e-6)
    wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
    for process, memory in job.memory.items():
        for name in read_parameters(programs, process):
            prefix = "p:" if f"p:{name}" in memory else "b:"
            torch.testing.assert_close(memory[prefix + name], wanted[name].detach(), rtol=1e-4, atol=1e-5)


def test_lowering_is_the_same_on_every_process() -> None:
    _, graph, _ = captured(CASES["transformer"], 8)
    plan = make_plan(graph, data=2, pipeline=2, microbatches=2, processes=(0, 0, 1, 1))
    first, second = lower(graph, plan), lower(graph, plan)
    assert first.programs == second.programs
    assert list(first.segments) == list(second.segments)


def test_whole_parameters_are_never_cut() -> None:
    _, graph, _ = captured(CASES["mlp"], 8)
    programs = lower(graph, make_plan(graph, data=3), whole_parameters=True)
    check(programs)
    sizes = {item.name: torch.Size(item.shape).numel() for item in graph.inputs}
    scatter = next(i for i in programs.programs[0].instructions if isinstance(i, ReduceScatter))
    parts = [part for slices in scatter.slices for part in slices]
    assert all((part.start, part.end) == (0, sizes[part.parameter]) for part in parts)
    assert sorted(part.parameter for part in parts) == sorted(scatter.parameters)
    assert all(scatter.slices), "each of three workers has a share of eight parameters"


def test_equal_microbatches_and_workers_share_segments() -> None:
    _, graph, _ = captured(CASES["mlp"], 8)
    programs = lower(graph, make_plan(graph, data=2, microbatches=4))
    runs = [i for p in programs.programs for i in p.instructions if isinstance(i, Run)]
    assert len(runs) >= 8
    assert len({run.segment for run in runs}) <= 3


def test_a_pipeline_sends_activations_up_and_gradients_down() -> None:
    _, graph, _ = captured(CASES["mlp"], 8)
    first, second = lower(graph, make_plan(graph, pipeline=2)).programs
    assert any(isinstance(i, Send) and i.peer == 1 for i in first.instructions)
    assert any(isinstance(i, Recv) and i.peer == 1 for i in first.instructions)
    assert any(isinstance(i, Send) and i.peer == 0 for i in second.instructions)


def test_microbatches_that_couple_samples_are_refused_with_a_source_line() -> None:
    _, graph, _ = captured(CASES["batch_norm"], 8)
    with pytest.raises(PlanError, match=r"samples are coupled by .*program_cases\.py:\d+"):
        lower(graph, make_plan(graph, microbatches=2))


def test_local_statistics_permit_microbatches_and_average_the_running_statistics() -> None:
    model, graph, batches = captured(CASES["batch_norm"], 8)
    programs = lower(graph, make_plan(graph, microbatches=2, local_statistics=True))
    check(programs)
    job = Job(graph, programs, model)
    job.step(batches[0], 0.0)
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = copy.deepcopy(model)
        part(batches[0][0][rows])
        halves.append(dict(part.named_buffers()))
    name = next(name for name in halves[0] if name.endswith("running_mean"))
    torch.testing.assert_close(job.memory[0][f"b:{name}"], (halves[0][name] + halves[1][name]) / 2)
    count = next(name for name in halves[0] if name.endswith("num_batches_tracked"))
    assert job.memory[0][f"b:{count}"].item() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 2, "shares": (4, 3)}, "shares"),
        ({"pipeline": 2, "starts": ("no_such_op",)}, "no_such_op"),
        ({"data": 3, "microbatches": 4}, "row"),
    ],
)
def test_plans_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    _, graph, _ = captured(CASES["mlp"], 8)
    with pytest.raises(PlanError, match=message):
        lower(graph, make_plan(graph, **options))


def test_what_is_forgotten_is_made_anew() -> None:
    """Programs are kept for plans that are lowered again, until they are forgotten; then all that they hold goes."""
    _, graph, _ = captured(CASES["mlp"], 8)
    plan = make_plan(graph, data=2)
    first = lower(graph, plan)
    forget(graph, keep_programs=True)
    assert lower(graph, plan) is first
    held = weakref.ref(next(iter(first.segments.values())).module)
    forget(graph)
    again = lower(graph, plan)
    assert again is not first and again.programs == first.programs
    del first, again
    forget(graph)
    gc.collect()
    assert held() is None
