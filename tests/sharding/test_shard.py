"""The oracle: all workers' graphs in lockstep give what the whole graph gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from partita.errors import InputError
from partita.sharding import communication
from partita.sharding.lockstep import run_sharded
from partita.sharding.placement import Partial, Replicate, Shard
from partita.sharding.shard import ShardedGraph, shard

sys.path.insert(0, str(Path(__file__).parent))
from captured import joint_graph
from sharding_models import CASES, Case, batch_norm_net, cross_entropy, mlp, squares

# Capture sets oneDNN's flags, at which torch warns once about Intel GPUs.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


def even(extent: int, size: int) -> tuple[int, ...]:
    base, rest = divmod(extent, size)
    return tuple(base + (worker < rest) for worker in range(size))


def split(case: Case, sizes: tuple[int, ...], **options: Any) -> tuple[ShardedGraph, Any, dict[str, torch.Tensor]]:
    module, flat, names = joint_graph(case.model, lambda model, batch: case.loss(model, *batch), case.batch)
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    seeds = {name: Shard(0, sizes) for name in names}
    sharded = shard(module, seeds, size=len(sizes), **{"axis": "data", **options})
    return sharded, module(*flat), dict(zip(placeholders, flat, strict=True))


def agree(sharded: ShardedGraph, expected: Any, inputs: dict[str, torch.Tensor]) -> None:
    got = run_sharded(sharded, inputs)
    assert len(got) == len(expected)
    for whole, parts in zip(expected, got, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_same_result_as_whole(name: str, size: int) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    agree(*split(case, even(case.batch[0].shape[0], size)))


@pytest.mark.parametrize("name", ["mlp", "language_model", "contrastive", "batch_norm_small"])
def test_lopsided_shares(name: str) -> None:
    torch.manual_seed(1)
    agree(*split(CASES[name](), (1, 6)))


@pytest.mark.parametrize("name", ["mlp", "language_model", "lstm", "transformer", "u_net", "conv_1d"])
def test_microbatches_exchange_nothing(name: str) -> None:
    torch.manual_seed(2)
    sharded, expected, inputs = split(CASES[name](), (2, 2, 3), axis="time", hoist=True)
    assert sharded.exchanges == ()
    assert sharded.gathered == ()
    agree(sharded, expected, inputs)


def test_masked_count_is_hoisted() -> None:
    sharded, _, _ = split(CASES["mlp"](), (4, 3), axis="time", hoist=True)
    assert len(sharded.hoisted) == 1 and sharded.prologue is not None
    needs = [n.name for n in sharded.prologue.graph.nodes if n.op == "placeholder"]
    assert len(needs) == 1 and sharded.input_placements[sharded.hoisted[0]] == Replicate()


@pytest.mark.parametrize("name", ["contrastive", "batch_norm_large"])
def test_coupled_samples_cannot_be_microbatched(name: str) -> None:
    case = CASES[name]()
    sharded, _, _ = split(case, even(case.batch[0].shape[0], 2), axis="time", hoist=True)
    assert sharded.exchanges


def test_plain_model_exchanges_only_outputs() -> None:
    sharded, _, _ = split(Case(mlp(), squares, (torch.randn(7, 5),)), (4, 3))
    assert sharded.exchanges == () and set(sharded.output_placements) == {Partial()}


def test_batch_norm_exchanges_statistics() -> None:
    sharded, _, _ = split(CASES["batch_norm_large"](), (17, 16))
    kinds = {(e.kind, e.num_bytes <= 8 * 4) for e in sharded.exchanges if e.node.startswith(("_native", "native"))}
    assert kinds == {("all_reduce", True)}
    assert sharded.gathered == ()


def test_local_statistics_need_no_exchange_and_are_averaged() -> None:
    torch.manual_seed(3)
    case = Case(batch_norm_net(), squares, (torch.randn(7, 3, 8, 8),))
    sharded, _, inputs = split(case, (4, 3), local_statistics=True)
    assert sharded.exchanges == ()
    got = run_sharded(sharded, inputs)
    x = case.batch[0]
    losses, means = [], []
    for part in (x[:4], x[4:]):
        twin = batch_norm_net()
        twin.load_state_dict(case.model.state_dict())
        losses.append(squares(twin, part).detach() * len(part) / 7)
        means.append(twin[1].running_mean * len(part) / 7)
    torch.testing.assert_close(got[0], sum(losses))
    assert any(t.shape == (8,) and torch.allclose(t, sum(means), atol=1e-6) for t in got)


def test_must_replicate_and_must_be_partial() -> None:
    torch.manual_seed(4)
    options = {"must_replicate": frozenset({0, 1}), "must_be_partial": frozenset({2})}
    sharded, expected, inputs = split(CASES["mlp"](), (4, 3), **options)
    assert sharded.output_placements[:3] == (Replicate(), Replicate(), Partial())
    agree(sharded, expected, inputs)


def test_free_inputs_come_in_sliced() -> None:
    torch.manual_seed(5)

    def loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) * (batch[1] > 0).float()).square().sum()

    model, batch = mlp(), (torch.randn(7, 5), torch.randn(7, 3))
    module, flat, names = joint_graph(model, loss, batch)
    sharded = shard(module, {names[0]: Shard(0, (3, 4))}, axis="data", size=2, free_inputs=frozenset({names[1]}))
    assert sharded.input_placements[names[1]] == Shard(0, (3, 4))
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    agree(sharded, module(*flat), dict(zip(placeholders, flat, strict=True)))


def test_sharding_twice_keeps_origins() -> None:
    module, _, names = joint_graph(mlp(), lambda m, b: m(b[0]).square().sum(), (torch.randn(8, 5),))
    captured = {node.name for node in module.graph.nodes}
    once = shard(module, {names[0]: Shard(0, (4, 4))}, axis="time", size=2).local(0)
    twice = shard(once, {names[0]: Shard(0, (2, 2))}, axis="data", size=2)
    for node in twice.local(1).graph.nodes:
        if node.op == "call_function":
            assert node.meta["origin"] in captured
            assert "val" in node.meta


def test_equal_coordinates_share_their_graph() -> None:
    sharded, _, _ = split(Case(mlp(), squares, (torch.randn(8, 5),)), (4, 4))
    assert sharded.local(0) is sharded.local(1)
    with pytest.raises(InputError, match="coordinate"):
        sharded.local(2)


def test_local_flops_add_up() -> None:
    sharded, _, _ = split(Case(nn.Linear(64, 64), squares, (torch.randn(30, 64),)), (10, 20))
    flops = [sum(n.meta["op"].flops for n in sharded.local(c).graph.nodes if "op" in n.meta) for c in range(2)]
    assert flops[1] == 2 * flops[0] > 0


def test_exchanges_are_markers_with_keywords() -> None:
    case = CASES["contrastive"]()
    sharded, _, _ = split(case, (4, 3))
    nodes = [n for n in sharded.local(0).graph.nodes if n.target in communication.COMMUNICATION_OPS]
    assert nodes and all(len(n.args) == 1 and n.kwargs["axis"] == "data" for n in nodes)


@pytest.mark.parametrize("sizes", [(7, 0), (3, 3), (7,)])
def test_wrong_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    module, _, names = joint_graph(mlp(), lambda m, b: cross_entropy(m, *b), CASES["mlp"]().batch)
    with pytest.raises(InputError, match="must be 2 positive numbers"):
        shard(module, {names[0]: Shard(0, sizes)}, axis="data", size=2)


def test_unknown_seed_is_refused() -> None:
    module, _, _ = joint_graph(mlp(), lambda m, b: cross_entropy(m, *b), CASES["mlp"]().batch)
    with pytest.raises(InputError, match="'nonsense'"):
        shard(module, {"nonsense": Shard(0, (4, 3))}, axis="data", size=2)
