"""Parallelism that people know must come out of captured graphs, and what comes out must fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from partita.errors import InputError
from partita.graph.capture import capture
from partita.planner.intra import (
    Decisions,
    IntraSolution,
    Link,
    Paid,
    Stage,
    StageRates,
    Window,
    price,
    smallest_peak,
    solve_intra,
    stage_from_graph,
)
from partita.sharding.placement import Partial, Replicate, Shard


def rates(mesh: Mapping[str, int], bytes_per_s: float = 2e9) -> StageRates:
    links = {axis: Link(size=size, latency_s=1e-6, bytes_per_s=bytes_per_s) for axis, size in mesh.items()}
    return StageRates(flops_per_s=1e12, memory_bytes_per_s=1e11, links=links, op_latency_s=1e-6)


def stage_of(
    model: nn.Module, loss: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, ...], mesh: Mapping[str, int],
    **options: Any,
) -> Stage:  # fmt: skip
    return stage_from_graph(capture(model, loss, batch), mesh, costs=rates(mesh), **options)


def solved(stage: Stage) -> tuple[IntraSolution, Decisions]:
    solution = solve_intra(stage.problem, time_limit_s=120)
    assert solution.gap <= 1e-6
    return solution, stage.decisions(solution)


def squares(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return model(batch[0]).square().mean()


def mlp(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width), nn.LayerNorm(width))


def is_cut(placement: Any, dim: int) -> bool:
    return isinstance(placement, Shard) and placement.dim == dim


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    def __init__(self, layers: int = 2, vocabulary: int = 64, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(x)))


def token_loss(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def tokens(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.long)


def test_big_weights_and_a_small_batch_are_split_by_column_and_row() -> None:
    stage = stage_of(mlp(512, 2048), squares, (torch.zeros(1, 512),), {"tensor": 2})
    solution, decisions = solved(stage)
    assert is_cut(decisions.inputs["p_0_weight"][0], 0)
    assert is_cut(decisions.inputs["p_2_weight"][0], 1)
    assert "-> P" in decisions.rules["addmm_1"][0]
    sums = [
        paid for paid in solution.priced.conversions
        if paid.window is Window.FORWARD
        and isinstance(stage.placement(paid.value, paid.source)[0], Partial)
        and stage.problem.values[paid.value].num_bytes[paid.source] > 4
    ]  # fmt: skip
    assert len(sums) == 1, "one all-reduce"
    assert solution.integral


def test_a_big_batch_and_small_weights_are_data_parallel() -> None:
    _, decisions = solved(stage_of(mlp(64, 64), squares, (torch.zeros(8192, 64),), {"data": 2}))
    assert is_cut(decisions.inputs["x_batch_0"][0], 0)
    assert str(decisions.inputs["p_0_weight"][0]) == "R"
    assert decisions.rules["addmm"] == ("R S0 R -> S0",)


def test_attention_is_split_by_heads() -> None:
    model = nn.Sequential(Attention(256, 4), nn.LayerNorm(256))
    _, decisions = solved(stage_of(model, squares, (torch.zeros(1, 8, 256),), {"tensor": 2}))
    attention = next(rule for name, rule in decisions.rules.items() if "attention" in name and "backward" not in name)
    assert attention[0].startswith("S1 S1 S1 -> S1")
    assert all(is_cut(decisions.inputs[f"p_0_{name}_weight"][0], 0) for name in "qkv")
    assert isinstance(decisions.inputs["p_0_out_weight"][0], Shard)


def test_a_limit_that_forbids_whole_weights_shards_them_and_gathers() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)), nn.LayerNorm(256))
    stage = stage_of(model, squares, (torch.zeros(1024, 256),), {"data": 2})
    weights = [f"p_{index}_weight" for index in range(4)]
    free, unlimited = solved(stage)
    assert {str(unlimited.inputs[name][0]) for name in weights} == {"R"}
    assert {str(unlimited.updates[name][0])[0] for name in weights} == {"S"}, "the optimizer's state is sharded"
    limit = (free.peak_bytes + smallest_peak(stage.problem)[0]) // 2
    solution = solve_intra(replace(stage.problem, memory_bytes=limit), time_limit_s=120)
    decisions = stage.decisions(solution)
    assert solution.peak_bytes <= limit
    assert solution.objective_s > free.objective_s
    assert is_cut(decisions.inputs["x_batch_0"][0], 0), "still data parallel"
    assert all(isinstance(decisions.inputs[name][0], Shard) for name in weights), "the weights too are sharded"
    gathers = [
        paid.window for paid in solution.priced.conversions
        if is_shard_to_whole(stage, paid) and stage.problem.values[paid.value].num_bytes[paid.target] == 256 * 256 * 4
    ]  # fmt: skip
    assert gathers.count(Window.FORWARD) == 4
    assert gathers.count(Window.BACKWARD) == 3, "the first layer's gradient needs no weight"


def is_shard_to_whole(stage: Stage, paid: Paid) -> bool:
    source, target = (stage.placement(paid.value, place)[0] for place in (paid.source, paid.target))
    return isinstance(source, Shard) and isinstance(target, Replicate)


def test_a_huge_table_is_cut_and_its_gradient_never_exchanged_whole() -> None:
    stage = stage_of(Language(1, vocabulary=20_000), token_loss, tokens(2, 4), {"tensor": 2})
    solution, decisions = solved(stage)
    assert isinstance(decisions.inputs["p_embedding_weight"][0], Shard)
    table = 20_000 * 16 * 4
    for paid in solution.priced.conversions:
        assert stage.problem.values[paid.value].num_bytes[paid.target] < table or paid.time_s == 0


@pytest.mark.slow
def test_two_axes_are_planned_jointly_and_no_worse_than_one() -> None:
    mesh = {"data": 2, "tensor": 2}
    solution, decisions = solved(stage_of(Language(2), token_loss, tokens(4, 8), mesh))
    assert all(len(rule) == 2 for rule in decisions.rules.values())
    assert all(len(placement) == 2 for placement in decisions.inputs.values())
    one, _ = solved(stage_of(Language(2), token_loss, tokens(4, 8), {"data": 2}))
    whole, _ = solved(stage_of(Language(2), token_loss, tokens(4, 8), {"tensor": 1}))
    assert solution.objective_s <= one.objective_s * (1 + 1e-6) <= whole.objective_s * (1 + 2e-6)


def test_repeated_blocks_choose_alike_and_depth_adds_no_columns() -> None:
    from partita.planner.intra.model import IntraModel
    from partita.planner.intra.timetable import make_timetable

    sizes = []
    for layers in (3, 6):
        stage = stage_of(Language(layers), token_loss, tokens(4, 8), {"data": 2})
        model = IntraModel(stage.problem, make_timetable(stage.problem), recompute=True)
        sizes.append(len(model.linear.costs))
    assert sizes[0] == sizes[1]
    _, decisions = solved(stage)
    weights = [decisions.inputs[f"p_layers_{layer}_up_weight"] for layer in range(6)]
    assert len(set(weights)) == 1


def test_memory_is_bought_with_recomputation_in_a_captured_model() -> None:
    stage = stage_of(Language(3), token_loss, tokens(8, 16), {"data": 2}, state_bytes_per_element=0.0)
    free, _ = solved(stage)
    peak, bound = smallest_peak(stage.problem)
    assert bound <= peak < free.peak_bytes
    solution = solve_intra(replace(stage.problem, memory_bytes=peak), time_limit_s=120)
    assert stage.decisions(solution).recompute
    assert solution.objective_s > free.objective_s


def test_accumulation_reduces_gradients_once() -> None:
    stage = stage_of(mlp(64, 64), squares, (torch.zeros(4096, 64),), {"data": 2}, num_microbatches=4)
    solution, _ = solved(stage)
    weights = [i for i, item in enumerate(stage.problem.inputs) if item.name == "0.weight"]
    option = stage.problem.inputs[weights[0]].choices[solution.assignment.inputs[weights[0]]]
    assert option.reduce_s > 0
    assert price(stage.problem, solution.assignment).once_s > 0


def test_random_ops_run_whole() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16))
    _, decisions = solved(stage_of(model, squares, (torch.zeros(8, 16),), {"data": 2}))
    draws = [rule for name, rule in decisions.rules.items() if name.startswith(("bernoulli", "rand", "native_drop"))]
    assert draws
    assert all("S" not in rule[0] for rule in draws)


@pytest.mark.parametrize("mesh", [{}, {"data": 0}])
def test_a_mesh_needs_workers(mesh: dict[str, int]) -> None:
    with pytest.raises(InputError, match="axes"):
        stage_of(mlp(4, 4), squares, (torch.zeros(4, 4),), mesh)
