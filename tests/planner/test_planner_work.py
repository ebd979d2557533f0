"""The positions of ops against what lowering does with them, and what crosses a cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partita.graph.capture import capture
from partita.graph.graph import Graph, InputKind, OutputKind
from partita.planner.work import measure_work
from partita.program.stages import StageCuts, assign_stages
from tests.planner.models import MODELS


def graph_of(name: str) -> Graph:
    torch.manual_seed(0)
    return capture(*MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_every_op_is_on_the_stage_that_its_position_says(name: str) -> None:
    graph = graph_of(name)
    work = measure_work(graph)
    inputs = {item.node: item for item in graph.inputs}
    nodes = {item.name: item.node for item in graph.inputs_of(InputKind.PARAMETER)}
    gradients = {output.node: nodes[output.target] for output in graph.outputs_of(OutputKind.GRADIENT)}
    checked = 0
    for cut, start in enumerate(work.names[1:], start=1):
        staging = assign_stages(graph.module, StageCuts(graph, (start,)), inputs, gradients)
        placed = [node for node in work.nodes if node.name in staging.stage]
        wrong = [n.name for n in placed if int(work.position[n.name] >= cut) != staging.stage[n.name]]
        assert not wrong, f"with a stage from {start}"
        checked += len(placed)
    assert checked > 100


def test_a_shared_parameter_is_sent_to_its_second_reader_and_nothing_else() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.first(self.first(x).tanh())
            return self.second(out.tanh())

    graph = capture(Tied(), lambda model, batch: model(batch).sum(), torch.randn(4, 8))
    work = measure_work(graph)
    reads = [place for place, name in enumerate(work.names) if name.startswith("mm")]
    assert len(reads) == 3
    assert work.shared_bytes[: reads[0] + 1].max() == 0
    assert (work.shared_bytes[reads[0] + 1 : reads[1] + 1] == 8 * 8 * 4).all()
    assert work.there_bytes[reads[1]] == 4 * 8 * 4  # the activation, not the weight nor its transpose
