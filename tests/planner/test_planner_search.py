"""Search on a hand-made graph with a simple cost model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.cluster.model import Cluster, Link, Machine, Process
from partita.errors import InfeasibleError, PlanError, ProgramError
from partita.graph.graph import Graph, Input, InputKind, OpInfo, Output, OutputKind, Phase
from partita.plan import Constraints, Plan
from partita.planner import search
from partita.planner.work import measure_work

LAYERS, BATCH, WIDTH = 4, 8, 16


def make_graph() -> Graph:
    """Four square layers without bias; loss is the sum; gradients by hand."""
    graph = fx.Graph()
    mode = FakeTensorMode()

    def fake(*shape: int) -> torch.Tensor:
        with mode:
            return torch.empty(shape)

    def op(
        target: Callable[..., Any], args: tuple[Any, ...], shape: tuple[int, ...], phase: Phase, flops: int
    ) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = fake(*shape)
        node.meta["op"] = OpInfo(flops=flops, num_bytes=4 * BATCH * WIDTH * 3, phase=phase, module="", source="")
        return node

    weights = [graph.placeholder(f"w{i}") for i in range(LAYERS)]
    batch = graph.placeholder("x")
    for weight in weights:
        weight.meta["val"] = fake(WIDTH, WIDTH)
    batch.meta["val"] = fake(BATCH, WIDTH)
    mm, t, flops = torch.ops.aten.mm.default, torch.ops.aten.t.default, 2 * BATCH * WIDTH * WIDTH
    values = [batch]
    for weight in weights:
        values.append(op(mm, (values[-1], weight), (BATCH, WIDTH), Phase.FORWARD, flops))
    loss = op(torch.ops.aten.sum.default, (values[-1],), (), Phase.FORWARD, 1)
    gradient = op(torch.ops.aten.ones_like.default, (values[-1],), (BATCH, WIDTH), Phase.BACKWARD, 1)
    gradients = []
    for index in reversed(range(LAYERS)):
        left = op(t, (values[index],), (WIDTH, BATCH), Phase.BACKWARD, 0)
        gradients.append(op(mm, (left, gradient), (WIDTH, WIDTH), Phase.BACKWARD, flops))
        gradient = op(mm, (gradient, weights[index]), (BATCH, WIDTH), Phase.BACKWARD, flops)
    graph.output((loss, *gradients))
    inputs = [
        Input(kind=InputKind.PARAMETER, name=f"p{i}", node=w.name, shape=(WIDTH, WIDTH), dtype=torch.float32)
        for i, w in enumerate(weights)
    ]
    inputs.append(
        Input(kind=InputKind.BATCH, name="x", node=batch.name, shape=(BATCH, WIDTH), dtype=torch.float32, leaf=0)
    )
    outputs = [Output(kind=OutputKind.LOSS, target="", node=loss.name)]
    outputs += [
        Output(kind=OutputKind.GRADIENT, target=f"p{LAYERS - 1 - i}", node=g.name) for i, g in enumerate(gradients)
    ]
    return Graph(
        module=fx.GraphModule(torch.nn.Module(), graph),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants={},
        aliases={},
        without_gradient=(),
        batch_spec=pytree.tree_flatten(torch.ones(1))[1],
        batch_size=BATCH,
        fingerprint="graph",
    )


class SimpleCost:
    """Op times are FLOPs at 1 MFLOP/s a core, communication by constants."""

    refined_uncertainty = 0.05

    def __init__(self, *, link_s: float = 0.0, compiled: float = 0.5, collective_s: float = 0.0) -> None:
        self.link_s, self.compiled, self.collective_s = link_s, compiled, collective_s

    def uncertainty(self, *, compiled: bool) -> float:
        return 0.1

    def op_time_s(self, node: fx.Node, place: Any, *, num_active: float = 1) -> float:
        return 1e-6 + float(node.meta["op"].flops) * 1e-6 / len(place.cores)

    def segment_time_s(
        self, module: fx.GraphModule, key: str, place: Any, *, compiled: bool, num_active: float = 1
    ) -> float:
        nodes = [node for node in module.graph.nodes if "op" in node.meta]
        return sum(self.op_time_s(node, place) for node in nodes) * (self.compiled if compiled else 1.0)

    def update_time_s(self, sizes: tuple[int, ...], optimizer: str, place: Any, *, num_active: float = 1) -> float:
        return sum(sizes) * 1e-9

    def transfer_time_s(self, num_bytes: int, source: Any, target: Any) -> float:
        return 0.0 if source.process == target.process else self.link_s

    def collective_time_s(self, kind: Any, num_bytes: int, group: tuple[Any, ...], *, num_tensors: int = 1) -> float:
        return self.collective_s

    def gradient_sum_time_s(self, num_bytes: int, group: tuple[Any, ...], *, num_tensors: int = 1) -> float:
        return self.collective_time_s("all_reduce", num_bytes, group, num_tensors=num_tensors)

    def interruption_s(self, num_bytes: int, place: Any, *, num_processes: int, num_busy: int) -> float:
        return 0.0

    @property
    def sent_share(self) -> float:
        return 1.0

    def instruction_time_s(self) -> float:
        return 0.0

    def step_time_s(self, num_workers: int) -> float:
        return 0.0


def make_cluster(processes: int = 1, cores: int = 2, memory_bytes: int = 0) -> Cluster:
    machine = Machine(name="m", cores=tuple(range(processes * cores)), memory_bytes=2**30)
    link = Link(bytes_per_s=1e9)
    return Cluster(
        machines=(machine,),
        network=link,
        process_link=link,
        processes=tuple(
            Process(rank=r, machine=0, cores=tuple(range(r * cores, r * cores + cores)), memory_bytes=memory_bytes)
            for r in range(processes)
        ),
    )


def test_backward_ops_follow_their_forward_ops() -> None:
    work = measure_work(make_graph())
    forward = [
        work.position[name] for name in ("mm_default", "mm_default_1", "mm_default_2", "mm_default_3", "sum_default")
    ]
    assert forward == [0, 1, 2, 3, 4]
    assert work.position["mm_default_4"] <= 3 and work.position["mm_default_11"] == 0
    assert work.parameter_elements.tolist() == [WIDTH**2] * LAYERS + [0]
    assert work.there_bytes[0] == work.back_bytes[0] == 0
    assert (work.there_bytes[1:] > 0).all() and (work.back_bytes[1:] > 0).all()


def test_the_best_plan_uses_both_cores_and_is_ranked_with_plain_pytorch() -> None:
    plans = search(make_graph(), make_cluster(), SimpleCost(), microbatches=True)
    surest = [plan for plan in plans if plan.num_microbatches == 1]
    times = [plan.prediction.step_time_s for plan in surest if plan.prediction]
    assert times == sorted(times)
    assert plans[0].compiled and len({core for worker in plans[0].workers for core in worker.cores}) == 2
    assert {plan.compiled for plan in plans if plan.mode == "block"} == {False, True}
    for plan in plans:
        assert plan.prediction is not None and plan.prediction.lower_bound_s <= times[0]
        assert Plan.from_json(plan.to_json()) == plan
    assert any("ties with" in reason or "bounded" in reason for reason in plans[0].reasons)


def test_the_bound_prunes_nothing_that_is_better() -> None:
    few = search(make_graph(), make_cluster(cores=4), SimpleCost(), microbatches=True, limit=1)
    many = search(make_graph(), make_cluster(cores=4), SimpleCost(), microbatches=True, limit=10_000)
    assert few[0].prediction is not None and many[0].prediction is not None
    assert few[0].prediction.step_time_s == pytest.approx(many[0].prediction.step_time_s)
    assert few[0].hash == many[0].hash


def test_constraints_force_a_corner() -> None:
    wanted = Constraints(data=2, pipeline=2, num_microbatches=4, schedule="gpipe", compiled=False)
    plans = search(make_graph(), make_cluster(), SimpleCost(), constraints=wanted, microbatches=True)
    assert len(plans) == 1
    plan = plans[0]
    assert (plan.axes, plan.num_microbatches, plan.schedule) == ({"pipeline": 2, "data": 2}, 4, "gpipe")
    assert plan.shares == (4, 4) and any("share 2 cores" in reason for reason in plan.reasons)


def test_forced_stage_starts() -> None:
    plans = search(
        make_graph(),
        make_cluster(),
        SimpleCost(),
        constraints=Constraints(pipeline=2, data=1, stage_starts=("mm_default_1",)),
    )
    assert plans[0].stage_starts == ("mm_default_1",)
    with pytest.raises(PlanError, match="mm_default_1"):
        search(
            make_graph(),
            make_cluster(),
            SimpleCost(),
            constraints=Constraints(pipeline=2, stage_starts=("mm_default1",)),
        )


def test_a_slow_link_puts_no_price_inside_a_process() -> None:
    slow = search(make_graph(), make_cluster(processes=2, cores=1), SimpleCost(link_s=10.0))
    graph_plans = [plan for plan in slow if plan.mode == "graph"]
    assert graph_plans[0].axes["pipeline"] == 1


def test_too_little_memory_names_the_change() -> None:
    with pytest.raises(InfeasibleError, match="smallest change"):
        search(make_graph(), make_cluster(memory_bytes=1000), SimpleCost())


def test_memory_makes_the_pipeline_necessary() -> None:
    static = 2 * 4 * LAYERS * WIDTH**2
    plans = search(make_graph(), make_cluster(processes=2, cores=1, memory_bytes=static), SimpleCost(link_s=1.0))
    assert {plan.axes["pipeline"] for plan in plans} == {2}


def test_a_batch_smaller_than_the_data_axis() -> None:
    with pytest.raises(InfeasibleError, match="8 rows"):
        search(make_graph(), make_cluster(), SimpleCost(), constraints=Constraints(data=9))


def test_evaluation_replaces_the_formula_and_drops_what_fails() -> None:
    def evaluate(plan: Plan) -> Any:
        if plan.compiled:
            raise ProgramError("no")
        return SimpleNamespace(step_time_s=1e-9, step_memory_bytes={0: 5}, shared_memory_bytes={0: 7}, bytes_sent=3)

    plans = search(make_graph(), make_cluster(), SimpleCost(), evaluate=evaluate)
    assert plans[0].prediction is not None
    assert plans[0].prediction.step_time_s == 1e-9 and plans[0].prediction.memory_bytes == {"0": 12}
    assert plans[0].prediction.lower_bound_s <= 1e-9
    assert not [plan for plan in plans if plan.mode == "graph" and plan.compiled]


def test_more_microbatches_must_be_better_by_more_than_their_prediction_may_be_wrong() -> None:
    """The sums of ops say that every further microbatch saves a tenth; in truth each costs a tenth."""
    refined: list[int] = []

    def outcome(plan: Plan, factor: float) -> Any:
        step_time_s = plan.num_microbatches**factor * 1e-3 * (2 if plan.compiled else 1) / plan.num_workers
        return SimpleNamespace(
            step_time_s=step_time_s, step_memory_bytes={0: 5}, shared_memory_bytes={0: 7}, bytes_sent=3
        )

    def refine(plan: Plan) -> Any:
        refined.append(plan.num_microbatches)
        return outcome(plan, 0.1)

    plans = search(
        make_graph(), make_cluster(), SimpleCost(), microbatches=True, constraints=Constraints(pipeline=1, data=2),
        evaluate=lambda plan: outcome(plan, -0.02), refine=refine,
    )  # fmt: skip
    assert {plan.num_microbatches for plan in plans} > {1}
    assert refined == [1] and plans[0].num_microbatches == 1

    refined.clear()
    plans = search(
        make_graph(), make_cluster(), SimpleCost(), microbatches=True, constraints=Constraints(pipeline=1, data=2),
        evaluate=lambda plan: outcome(plan, -0.5), refine=lambda plan: outcome(plan, -0.5),
    )  # fmt: skip
    assert plans[0].num_microbatches > 1  # where they do save, by far
