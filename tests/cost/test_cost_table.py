"""Cost tables with a fake measurer, the roofline, collectives, and real measurements of small ops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.cluster.model import Cluster, Gpu, Link, Machine, Process
from partita.cost import table as cost_table
from partita.cost.collectives import collective_time_s, link_time_s
from partita.cost.measure_nodes import measure_nodes
from partita.cost.measure_ops import make_arguments, make_tensor, measure_together, op_key, placeholder_bound
from partita.cost.overheads import Overheads
from partita.cost.roofline import rates_of, roofline_s
from partita.cost.sums import SumCost
from partita.cost.table import CostTable
from partita.graph.graph import OpInfo, Phase


@dataclass(frozen=True)
class Place:
    process: int = 0
    machine: int = 0
    cores: tuple[int, ...] = (0,)
    gpu: int | None = None


FREE = Overheads(step_s={1: 0.0}, instruction_s=0.0, meeting_s=0.0, tensor_s=0.0, handover_s=0.0)


def make_cluster(is_here: bool = True) -> Cluster:
    gpu = Gpu(name="g", memory_bytes=2**34, flops_per_s={"float32": 1e13}, memory_bytes_per_s=1e12)
    machines = tuple(
        Machine(
            name=str(i),
            cores=(0, 1),
            memory_bytes=2**34,
            flops_per_s_per_core=1e10,
            memory_bytes_per_s=1e10,
            gpus=(gpu,),
        )
        for i in range(2)
    )
    processes = tuple(Process(rank=r, machine=r // 2, cores=(r % 2,)) for r in range(4))
    return Cluster(
        machines=machines,
        processes=processes,
        network=Link(bytes_per_s=1e8, latency_s=1e-4),
        process_link=Link(bytes_per_s=1e9, latency_s=1e-5),
        is_here=is_here,
    )


def make_module(rows: int = 4) -> fx.GraphModule:
    graph = fx.Graph()
    with FakeTensorMode():
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(rows, 8)
        y = graph.call_function(torch.ops.aten.relu.default, (x,))
        y.meta.update(val=torch.empty(rows, 8), op=OpInfo(32, 256, Phase.FORWARD, "", ""))
        z = graph.call_function(torch.ops.aten.mm.default, (y, y))
        z.args = (y, graph.call_function(torch.ops.aten.t.default, (y,)))
        z.meta.update(val=torch.empty(rows, rows), op=OpInfo(256, 320, Phase.FORWARD, "", ""))
        z.args[1].meta.update(val=torch.empty(8, rows), op=OpInfo(0, 0, Phase.FORWARD, "", ""))  # type: ignore[union-attr]
    graph.output((z,))
    ordered = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in (x, y, z.args[1], z):
        assert isinstance(node, fx.Node)
        env[node] = ordered.node_copy(node, lambda n: env[n])
    ordered.output((env[z],))
    return fx.GraphModule(torch.nn.Module(), ordered)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))


def fake_measurer(nodes: Sequence[fx.Node], cores: tuple[int, ...], *, budget_s: float) -> list[float | None]:
    return [0.5 if "mm" in str(node.target) else None for node in nodes]


def test_measured_times_are_used_kept_and_read_again() -> None:
    module = make_module()
    mm = next(node for node in module.graph.nodes if "mm" in str(node.target))
    table = CostTable(make_cluster())
    assert table.op_time_s(mm, Place()) < 0.01
    assert len(table.missing([module], 1)) == 3
    assert table.measure([module], (0,), budget_s=1.0, measurer=fake_measurer) == 1
    assert table.op_time_s(mm, Place()) == 0.5
    again = CostTable(make_cluster())
    assert again.op_time_s(mm, Place()) == 0.5
    assert len(again.missing([module], 1)) == 2
    assert again.op_time_s(mm, Place(cores=(0, 1))) < 0.01  # other threads, other key


def test_keys_see_shapes_and_arguments() -> None:
    def mm_of(module: fx.GraphModule) -> fx.Node:
        return next(node for node in module.graph.nodes if "mm" in str(node.target))

    assert op_key(mm_of(make_module()), 1) == op_key(mm_of(make_module()), 1)
    assert op_key(mm_of(make_module(4)), 1) != op_key(mm_of(make_module(5)), 1)
    assert op_key(mm_of(make_module()), 1) != op_key(mm_of(make_module()), 2)


def test_a_described_cluster_measures_nothing() -> None:
    def never(*args: Any, **kwargs: Any) -> list[float | None]:
        raise AssertionError

    table = CostTable(make_cluster(is_here=False))
    assert table.measure([make_module()], (0,), budget_s=1.0, measurer=never) == 0
    assert table.segment_time_s(make_module(), "k", Place(gpu=0), compiled=False) > 0


def test_damaged_cache_is_not_there(tmp_path: Path) -> None:
    module = make_module()
    CostTable(make_cluster()).measure([module], (0,), budget_s=1.0, measurer=fake_measurer)
    (file,) = (tmp_path / "cost").iterdir()
    file.write_text("{oops")
    assert CostTable(make_cluster()).num_measured_ops == 0


def test_contention_and_compilation_order_times() -> None:
    table, module = CostTable(make_cluster()), make_module()
    one = table.segment_time_s(module, "k", Place(), compiled=False)
    assert table.segment_time_s(module, "k", Place(), compiled=False, num_active=4) > one
    assert table.segment_time_s(module, "k", Place(), compiled=True) < one


def test_compiled_code_takes_the_time_of_ops_that_it_forms_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()
    (product,) = [node for node in module.graph.nodes if node.target is torch.ops.aten.mm.default]

    def segment_s(in_place_s: float | None, *, compiled: bool, cores: tuple[int, ...] = (0,)) -> float:
        monkeypatch.setattr(
            cost_table,
            "measure_in_place",
            lambda nodes, cores, budget_s: [in_place_s if node is product else None for node in nodes],
        )
        table = CostTable(make_cluster(), read_cache=False)
        table.measure([module], cores, budget_s=5.0)
        return table.segment_time_s(module, "k", Place(cores=cores), compiled=compiled)

    assert segment_s(3.0, compiled=True) - segment_s(1.0, compiled=True) == pytest.approx(2.0, rel=0.05)
    assert max(segment_s(None, compiled=True), segment_s(3.0, compiled=False)) < 0.5


def test_measured_segments_replace_the_sum_and_are_joined_by_lines() -> None:
    table, module = CostTable(make_cluster()), make_module()

    def time_s(num_active: float, **other: Any) -> float:
        options = {"key": "k", "compiled": False, **other}
        return table.segment_time_s(module, place=Place(), num_active=num_active, **options)

    sums = {active: time_s(active) for active in (1, 2, 3)}
    table.keep_segment_time("k", 4.0, num_threads=1, compiled=False, num_active=2)
    assert time_s(2) == 4.0
    assert time_s(1) == pytest.approx(4.0 * sums[1] / sums[2]), "one point is carried on as the sum of ops goes"
    table.keep_segment_time("k", 3.0, num_threads=1, compiled=False)
    assert (time_s(1), time_s(1.5), time_s(2)) == (3.0, 3.5, 4.0)
    assert time_s(3) == pytest.approx(4.0 * sums[3] / sums[2])
    assert time_s(2, compiled=True) != 4.0 and time_s(2, key="other") == sums[2]
    assert table.knows_segment("k", num_threads=1, compiled=False, num_active=2)
    assert not table.knows_segment("k", num_threads=2, compiled=False, num_active=2)


def test_measured_updates_replace_the_formula() -> None:
    table = CostTable(make_cluster())
    few, many = (table.update_time_s(sizes, "AdamW", Place()) for sizes in ((1000,), (10,) * 100))
    assert 0 < few < many, "every tensor has its price"
    assert table.update_time_s((), "AdamW", Place()) == 0.0
    table.keep_update_time((10,) * 100, "AdamW", 2.0, num_threads=1, num_active=2)
    assert table.update_time_s((10,) * 100, "AdamW", Place(), num_active=2) == 2.0
    assert table.update_time_s((10,) * 100, "SGD", Place(), num_active=2) != 2.0


def test_overheads_are_measured_once_and_kept() -> None:
    asked: list[Sequence[int]] = []

    def measurer(cores: Sequence[int]) -> Overheads:
        asked.append(cores)
        return Overheads(step_s={1: 1.0, 4: 7.0}, instruction_s=0.5)

    table = CostTable(make_cluster())
    table.measure_overheads(measurer)
    assert asked == [(0,)]
    assert [table.step_time_s(count) for count in (1, 2, 4, 5)] == [1.0, 3.0, 7.0, 9.0]
    again = CostTable(make_cluster())
    again.measure_overheads(measurer)
    assert again.overheads == table.overheads and len(asked) == 1
    described = CostTable(make_cluster(is_here=False))
    described.measure_overheads(measurer)
    assert described.overheads == Overheads() and len(asked) == 1


def test_sums_in_the_background_take_time_where_no_core_is_left() -> None:
    table = CostTable(make_cluster(), sums=SumCost(sent_share=0.5, compute_s_per_byte=2.0))
    table.measure_overheads(lambda cores: Overheads(courier_s=10.0, courier_s_per_byte=4.0))
    num_cores = len(make_cluster().processes[0].cores)

    def taken_s(num_bytes: int, num_processes: int, num_busy: int = num_cores) -> float:
        return table.interruption_s(num_bytes, Place(), num_processes=num_processes, num_busy=num_busy)

    assert taken_s(100, 2) == 200 + 10 + 50 * 4, "it is computed, and half of it is sent"
    assert taken_s(100, 4) == 200 + 30 + 1.5 * 50 * 4, "a ring of four has three times as many rounds"
    assert taken_s(100, 2, num_cores - 1) == 0.0
    assert Overheads().courier_of(100, 1) == 0.0, "nothing is sent"


def test_real_ops_are_measured_and_torch_threads_restored() -> None:
    before = torch.get_num_threads()
    nodes = [node for node in make_module().graph.nodes if node.op == "call_function"]
    times = measure_nodes(nodes, (0,), budget_s=5.0)
    assert all(time_s is not None and 0 < time_s < 1 for time_s in times)
    assert measure_nodes(nodes, (0,), budget_s=0.0) == [None] * 3
    assert torch.get_num_threads() == before


def test_a_random_op_is_measured_by_the_kernel_that_draws_from_a_given_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def with_generator(target: object) -> Callable[..., object]:
        asked.append(target)
        return lambda generator, *args: generator.initial_seed()

    monkeypatch.setattr("partita.cost.measure_nodes.with_generator", with_generator)
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, device="meta")
    draw = graph.call_function(torch.ops.aten.bernoulli.p, (x, 0.5))
    plain = graph.call_function(torch.ops.aten.neg.default, (x,))
    before = torch.get_rng_state()
    assert all(measure_nodes([draw, plain], (0,), budget_s=5.0))
    assert asked == [torch.ops.aten.bernoulli.p]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failing_call_is_raised_and_does_not_hang() -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        measure_together([[fail], [lambda: None]], [(0,), (0,)], budget_s=0.01)


def test_calls_that_run_together_take_as_long_as_the_slowest() -> None:
    threads = set()

    def call(seconds: float) -> None:
        threads.add(threading.get_ident())
        time.sleep(seconds)

    calls = [[lambda: call(0.001), lambda: call(0.01)], [lambda: call(0.02), lambda: call(0.001)]]
    first_s, second_s = measure_together(calls, [(0,), (0,)], budget_s=0.01)
    assert len(threads) == 2 and first_s >= 0.02 > second_s >= 0.01


def test_parts_run_in_turns_so_that_each_finds_what_the_last_one_left() -> None:
    order: list[str] = []
    measure_together([[lambda: order.append("a"), lambda: order.append("b")]], [(0,)], budget_s=0.0)
    assert order == ["a", "b"] * (len(order) // 2) and len(order) >= 8


@given(st.lists(st.integers(1, 4), max_size=3), st.sampled_from([torch.float32, torch.int64, torch.bool]))
def test_made_tensors_have_shape_strides_and_type(shape: list[int], dtype: torch.dtype) -> None:
    spec = torch.zeros(shape, dtype=dtype)
    spec = spec.transpose(0, -1) if spec.dim() > 1 else spec
    made = make_tensor(spec, 3)
    assert (made.shape, made.stride(), made.dtype) == (spec.shape, spec.stride(), dtype)
    if dtype is torch.int64 and made.numel():
        assert int(made.min()) >= 0 and int(made.max()) < 3


def test_index_inputs_are_valid() -> None:
    graph = fx.Graph()
    weight, index = graph.placeholder("w"), graph.placeholder("i")
    weight.meta["val"], index.meta["val"] = torch.empty(5, 2), torch.zeros(100, dtype=torch.int64)
    args, _ = make_arguments(graph.call_function(torch.ops.aten.embedding.default, (weight, index)))
    assert int(args[1].max()) in range(1, 5)
    assert torch.ops.aten.embedding.default(*args).shape == (100, 2)


def test_the_bound_of_an_index_holds_through_views() -> None:
    graph = fx.Graph()
    weight, index = graph.placeholder("w"), graph.placeholder("i")
    weight.meta["val"], index.meta["val"] = torch.empty(5, 2), torch.zeros(4, 6, dtype=torch.int64)
    part = graph.call_function(torch.ops.aten.slice.Tensor, (index, 1, 0, 3))
    graph.call_function(torch.ops.aten.embedding.default, (weight, part))
    assert placeholder_bound(index) == 5
    graph.call_function(torch.ops.aten.relu.default, (index,))
    assert placeholder_bound(index) == 1, "nothing is known of this reader"


def test_roofline_has_two_slopes() -> None:
    rates = rates_of(make_cluster().machines[0], Place(), launch_s=1e-6)
    assert roofline_s(rates, 0, 0) == 1e-6
    assert roofline_s(rates, 6e9, 0) == pytest.approx(1 + 1e-6)
    assert roofline_s(rates, 0, 1e10, num_active=2) == pytest.approx(2 + 1e-6)


def test_collectives_are_hierarchical() -> None:
    cluster = make_cluster()
    near = collective_time_s(cluster, "all_reduce", 10**6, (Place(0), Place(1, 0, (1,))), overheads=FREE)
    far = collective_time_s(cluster, "all_reduce", 10**6, (Place(0), Place(2, 1)), overheads=FREE)
    inside = collective_time_s(cluster, "all_reduce", 10**6, (Place(), Place(cores=(1,))), overheads=FREE)
    assert inside < near < far
    assert far == pytest.approx(2e-4 + 1e6 / 1e8)
    both = collective_time_s(cluster, "all_reduce", 10**6, (Place(), Place(cores=(1,)), Place(2, 1)), overheads=FREE)
    assert both == pytest.approx(inside + far)


@given(st.sampled_from(["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]), st.integers(1, 8))
def test_collective_times_do_not_fall_with_size(kind: Any, count: int) -> None:
    link = Link(bytes_per_s=1e9, latency_s=1e-5)
    assert link_time_s(link, kind, 100, count) <= link_time_s(link, kind, 200, count)
    assert (link_time_s(link, kind, 100, 1)) == 0
