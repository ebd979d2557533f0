"""Graphs split over the tensor and data axes, with parameters cut anyhow, against plain PyTorch: the same losses and
weights, whatever is cut, on every grid of workers and processes, in any order of the workers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.graph.graph import Graph, InputKind
from partita.program import check, lower
from partita.program.instructions import AllGather, AllToAll, ReduceScatter, Run
from partita.program.order import check_order

sys.path.insert(0, str(Path(__file__).parent))
from program_cases import CASES, Job, captured, make_plan, plain_steps

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")
ROWS = 8
KEPT = {name: captured(CASES[name], ROWS) for name in ("mlp", "partly", "batch_norm", "transformer_dropout", "gru")}

# (data, tensor, pipeline), and the process of every worker.
GRIDS = {
    "tensor2": ((1, 2, 1), (0, 0)),
    "tensor3": ((1, 3, 1), (0, 0, 0)),
    "tensor2_across": ((1, 2, 1), (0, 1)),
    "data2_tensor2": ((2, 2, 1), (0, 0, 0, 0)),
    "data2_tensor2_by_data": ((2, 2, 1), (0, 0, 1, 1)),
    "data2_tensor2_by_tensor": ((2, 2, 1), (0, 1, 0, 1)),
    "data2_tensor2_all_apart": ((2, 2, 1), (0, 1, 2, 3)),
    "data2": ((2, 1, 1), (0, 0)),
    "data2_across": ((2, 1, 1), (0, 1)),
    "data3_across": ((3, 1, 1), (0, 0, 1)),
    "pipeline2_tensor2": ((1, 2, 2), (0, 0, 0, 0)),
    "pipeline2_tensor2_across": ((1, 2, 2), (0, 0, 1, 1)),
    "pipeline2_tensor2_all_apart": ((1, 2, 2), (0, 1, 2, 3)),
}


def placements(draw: st.DrawFn, graph: Graph, data: int, tensor: int) -> dict[str, dict[str, str]]:
    """Any parameter cut along any dim of any axis; along the data axis in a dim that the tensor axis leaves alone."""
    found: dict[str, dict[str, str]] = {}
    for item in graph.inputs_of(InputKind.PARAMETER):
        dims = {axis: [d for d, n in enumerate(item.shape) if n >= size] for axis, size in
                (("tensor", tensor), ("data", data)) if size > 1}  # fmt: skip
        taken: int | None = None
        for axis, possible in dims.items():
            dim = draw(st.sampled_from([None, *possible]))
            if dim is not None and dim != taken:
                found.setdefault(item.name, {})[axis] = f"S({dim})"
                taken = dim
    return found


def weights_of(job: Job, name: str, process: int, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a process stores of a parameter, and what it should be."""
    box = job.programs.held.get(process, {}).get(name)
    value = job.memory[process][f"p:{name}"]
    return value, expected if box is None else box.of(expected)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.data(), st.sampled_from(sorted(KEPT)), st.sampled_from(sorted(GRIDS)))
def test_any_cut_trains_like_plain_pytorch(data: st.DataObject, case: str, grid: str) -> None:
    model, graph, batches = KEPT[case]
    (num_data, num_tensor, num_stages), processes = GRIDS[grid]
    microbatches = 1 if case == "batch_norm" else data.draw(st.sampled_from([1, 2]))
    inputs = data.draw(st.composite(placements)(graph, num_data, num_tensor))
    options = {"data": num_data, "tensor": num_tensor, "pipeline": num_stages, "processes": processes}
    try:
        programs = lower(graph, make_plan(graph, **options, inputs=inputs, microbatches=microbatches))
    except PlanError as error:
        assert "must form one block" in str(error) or "draw random numbers" in str(error)
        return
    check(programs)
    check_order(programs)
    job, plain = Job(graph, programs, model, seed=len(case)), copy.deepcopy(model)
    torch.manual_seed(1)
    expected = plain_steps(plain, CASES[case].loss, batches, 0.1)
    torch.manual_seed(1)
    for loss, batch in zip(expected, batches, strict=True):
        for found in job.step(batch, 0.1).values():
            assert abs(found.item() - loss) < 1e-5
    read = {
        (program.process, register[2:])
        for program in programs.programs
        for item in program.instructions
        if isinstance(item, Run)
        for register in item.inputs
        if register.startswith("p:")
    }
    for process in job.memory:
        for name, value in plain.named_parameters():
            if (process, name) in read:
                torch.testing.assert_close(*weights_of(job, name, process, value.detach()), atol=2e-5, rtol=1e-4)


def test_columns_then_rows_cost_one_sum_a_pass() -> None:
    """The split of Megatron-LM (Shoeybi et al. 2019, section 3): first weight by rows of its matrix, second by columns;
    one all-reduce of the result forwards, none backwards, since the input needs no gradient."""
    _, graph, _ = KEPT["mlp"]
    cut = {"0.weight": {"tensor": "S(0)"}, "0.bias": {"tensor": "S(0)"}, "2.weight": {"tensor": "S(1)"}}
    programs = lower(graph, make_plan(graph, tensor=2, inputs=cut))
    kinds = [type(item).__name__ for item in programs.programs[0].instructions if hasattr(item, "key")]
    assert kinds.count("AllReduce") == 1 and kinds.count("ReduceScatter") == 1
    assert not {AllGather, AllToAll} & {type(item) for item in programs.programs[0].instructions}
    assert programs.programs[1].views["2.weight"].starts == (0, 3)
    assert not programs.held


def test_a_process_stores_only_what_its_workers_read() -> None:
    _, graph, _ = KEPT["mlp"]
    programs = lower(graph, make_plan(graph, tensor=2, processes=(0, 1), inputs={"2.weight": {"tensor": "S(1)"}}))
    assert {process: held["2.weight"].starts for process, held in programs.held.items()} == {0: (0, 0), 1: (0, 3)}
    assert programs.held[1]["2.weight"].lengths == (6, 3)
    sums = [item for item in programs.programs[1].instructions if isinstance(item, ReduceScatter)][-1]
    assert sums.storages[sums.parameters.index("2.weight")] == (6, 3)


def test_a_cut_that_a_parameter_does_not_have_is_refused() -> None:
    _, graph, _ = KEPT["mlp"]
    with pytest.raises(PlanError, match=r"'0.bias' has shape \(6,\) and is to be cut along dim 1"):
        lower(graph, make_plan(graph, tensor=2, inputs={"0.bias": {"tensor": "S(1)"}}))
    with pytest.raises(PlanError, match="Did you mean '0.weight'"):
        lower(graph, make_plan(graph, tensor=2, inputs={"0.weigth": {"tensor": "S(1)"}}))


def test_processes_that_fill_no_grid_are_refused() -> None:
    _, graph, _ = KEPT["mlp"]
    plan = make_plan(graph, data=2, tensor=3, processes=(0, 0, 1, 1, 2, 2), inputs={"0.weight": {"tensor": "S(0)"}})
    with pytest.raises(PlanError, match="one block|fill a grid"):
        lower(graph, plan)
