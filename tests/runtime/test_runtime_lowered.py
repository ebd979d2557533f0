"""Captured models, lowered by plans of several shapes, beside plain PyTorch: losses, weights, buffers, random state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partita.graph.capture import capture
from partita.graph.graph import Graph, InputKind
from partita.plan import Plan, Worker
from partita.program import check, lower
from partita.program.instructions import Slice
from partita.runtime.engine import Engine, State


class Net(nn.Module):
    """Couples samples (batch norm), draws random numbers (dropout) and reads one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.norm(self.first(x))), 0.25, self.training)
        return self.last(torch.tanh(self.first(x)))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def noisy_loss(model: nn.Module, batch: Any) -> Tensor:
    """Random numbers whose distribution depends on data stay in the graph."""
    return F.cross_entropy(model(batch[0]) + torch.bernoulli(torch.sigmoid(batch[0][:, :3])), batch[1])


def make_plan(graph: Graph, *, data: int, stages: int, num_microbatches: int = 1) -> Plan:
    forward = [node.name for node, info in graph.ops() if info.phase.value == "forward"]
    return Plan(
        mode="graph",
        graph_fingerprint=graph.fingerprint,
        cluster_fingerprint="",
        axes={"data": data, "pipeline": stages},
        workers=tuple(
            Worker(index=i, process=0, machine=0, cores=(), stage=i // data, data=i % data)
            for i in range(data * stages)
        ),
        threads_per_worker=1,
        num_microbatches=num_microbatches,
        stage_starts=tuple(forward[len(forward) * stage // stages] for stage in range(1, stages)),
    )


SHAPES = [
    {"data": 1, "stages": 1},
    {"data": 2, "stages": 1},
    {"data": 3, "stages": 1},
    {"data": 1, "stages": 2},
    {"data": 2, "stages": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", [loss_fn, noisy_loss])
def test_same_as_plain(shape: dict[str, int], loss: Any) -> None:
    torch.manual_seed(0)
    ours, batch = Net(), (torch.randn(7, 6), torch.randint(0, 3, (7,)))
    plain = copy.deepcopy(ours)
    graph = capture(ours, loss, batch)
    plan = make_plan(graph, **shape)
    programs = lower(graph, plan)
    check(programs)
    parameters = {name: value.detach() for name, value in ours.named_parameters()}

    def update(worker: int, slices: tuple[Slice, ...], gradients: list[Tensor]) -> None:
        for item, gradient in zip(slices, gradients, strict=True):
            parameters[item.parameter].view(-1)[item.start : item.end].sub_(gradient.view(-1), alpha=0.1)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    constants = {item.name: graph.constants[item.name] for item in graph.inputs_of(InputKind.CONSTANT)}
    state = State(parameters=parameters, buffers=dict(ours.named_buffers()), constants=constants)
    with Engine(programs, plan, process=0, state=state, update=update, timeout_s=30) as engine:
        for step in range(4):
            torch.manual_seed(step)
            expected = loss(plain, batch)
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
            after = torch.rand(3)
            torch.manual_seed(step)
            torch.testing.assert_close(engine.step(batch).loss, expected.detach())
            assert torch.equal(torch.rand(3), after)  # as many random numbers as plain PyTorch takes
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
