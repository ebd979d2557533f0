"""Whole parameters: every one has one owner, owners are busy equally long, and new values reach every process."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from program_cases import Job, make_plan, plain_steps

from partita.graph import Graph, capture
from partita.program import ProgramSet, check, lower
from partita.program.instructions import Recv, Update
from partita.program.ownership import Deal, UpdateCosts, deal, deal_over_processes

COSTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 10.0), min_size=1)


def loads(found: Deal, costs: dict[str, float], num_processes: int) -> list[float]:
    """By process and column."""
    return [
        sum(costs[name] for name in column if found.process_of[name] in (-1, process))
        for process in range(num_processes)
        for column in found.columns
    ]


@given(COSTS, st.integers(1, 4), st.integers(1, 3), st.floats(0.0, 5.0))
def test_every_parameter_has_one_place_and_loads_are_as_list_scheduling_promises(
    costs: dict[str, float], num_columns: int, num_processes: int, message_s: float
) -> None:
    """Each to the least loaded (Graham 1969): no load above the mean by more than (1 - 1/n) of the largest."""
    links = UpdateCosts(message_s=message_s, bytes_per_s=1e9)
    found = deal_over_processes(costs, dict.fromkeys(costs, 4), num_columns, num_processes, links)
    assert sorted(name for column in found.columns for name in column) == sorted(costs)
    assert all(-1 <= found.process_of[name] < num_processes for name in costs)
    most = max(loads(found, costs, num_processes))
    alone = max(loads(deal(costs, num_columns), costs, 1))
    assert most <= alone + 1e-9
    assert alone * num_columns <= sum(costs.values()) + max(costs.values()) * (num_columns - 1) + 1e-9


def test_what_is_sent_in_less_time_than_it_is_updated_in_has_one_owner() -> None:
    costs = {"large": 1.0, "other": 0.9, "bias": 1e-6}
    num_bytes = {"large": 10**6, "other": 10**6, "bias": 100}
    fast, slow = UpdateCosts(message_s=1e-4, bytes_per_s=1e9), UpdateCosts(message_s=1e-4, bytes_per_s=1e6)
    assert deal_over_processes(costs, num_bytes, 1, 2, fast).process_of == {"large": 0, "other": 1, "bias": -1}
    assert set(deal_over_processes(costs, num_bytes, 1, 2, slow).process_of.values()) == {-1}


def test_costs_count_only_where_all_are_known() -> None:
    costs = UpdateCosts(time_s=(("w", 2.0), ("v", 1.0)))
    assert costs.of({"w": 3, "v": 9}) == {"w": 2.0, "v": 1.0}
    assert costs.of({"w": 3, "b": 9}) == {"w": 3.0, "b": 9.0}


def _model() -> tuple[nn.Module, torch.Tensor, Graph]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = torch.randn(12, 4)
    return model, batch, capture(model, lambda m, b: m(b).square().mean(), batch)


def _costs(graph: Graph, *, bytes_per_s: float = 1e9) -> UpdateCosts:
    names = [item.target for item in graph.outputs if item.kind.value == "gradient"]
    times = tuple((name, 1.0 if "weight" in name else 1e-9) for name in names)
    return UpdateCosts(time_s=times, message_s=1e-6, bytes_per_s=bytes_per_s)


def _updated(programs: ProgramSet) -> Counter[str]:
    return Counter(
        part.parameter
        for program in programs.programs
        for item in program.instructions
        if isinstance(item, Update)
        for part in item.slices
    )


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("processes", [(0, 1), (0, 0, 1, 1), (0, 1, 2), (0, 0, 1)])
def test_owners_update_and_the_others_receive(processes: tuple[int, ...], clips: bool) -> None:
    model, batch, graph = _model()
    plan = make_plan(graph, data=len(processes), processes=processes)
    programs = lower(graph, plan, whole_parameters=True, costs=_costs(graph), clips=clips)
    check(programs)
    num_processes = len(set(processes))
    found = _updated(programs)
    assert found == {name: 1 if "weight" in name else num_processes for name in dict(model.named_parameters())}
    received = [i for p in programs.programs for i in p.instructions if isinstance(i, Recv) and i.register[:2] == "p:"]
    assert len(received) == 3 * (num_processes - 1)
    if clips:
        return
    job = Job(graph, programs, model)
    for _ in range(2):
        job.step(batch, 0.5)
    plain_steps(model, lambda m, b: m(b).square().mean(), [batch, batch], 0.5)
    for memory in job.memory.values():
        for name, value in model.named_parameters():
            torch.testing.assert_close(memory[f"p:{name}"], value.detach(), atol=1e-5, rtol=1e-4)
            assert torch.equal(memory[f"p:{name}"], job.memory[0][f"p:{name}"])


def test_over_a_slow_link_every_process_updates_all() -> None:
    _, _, graph = _model()
    plan = make_plan(graph, data=2, processes=(0, 1))
    programs = lower(graph, plan, whole_parameters=True, costs=_costs(graph, bytes_per_s=1.0))
    assert set(_updated(programs).values()) == {2}


def test_stages_on_other_processes_receive_what_has_one_owner() -> None:
    _, _, graph = _model()
    plan = make_plan(graph, data=2, pipeline=2, processes=(0, 1, 0, 1))
    programs = lower(graph, plan, whole_parameters=True, costs=_costs(graph))
    check(programs)
    assert {1, 2} == set(_updated(programs).values())  # a stage with one matrix has nothing to share out
