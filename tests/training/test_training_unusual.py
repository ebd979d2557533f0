"""Unusual models under plans that cut their batch, their layers, or both: the result of plain PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
import torch

import partita
from partita import Constraints
from partita.graph import capture
from partita.graph.graph import Phase

sys.path.insert(0, str(Path(__file__).parent))
from unusual_models import CASES, Case

NUM_ROWS, NUM_STEPS = 8, 3
PLANS = {
    "uneven data": Constraints(data=3, pipeline=1, num_workers=3, threads_per_worker=1, num_microbatches=1),
    "both": Constraints(data=2, pipeline=2, num_workers=4, threads_per_worker=1, num_microbatches=1),
}
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:enable_nested_tensor")


def build(case: Case) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = case.build().train()
    return model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_unusual_models_equal_plain_pytorch(name: str, plan: str) -> None:
    case, constraints = CASES[name], PLANS[plan]
    torch.manual_seed(7)
    data = [case.batch(NUM_ROWS) for _ in range(NUM_STEPS)]
    plain, reference = build(case)
    torch.manual_seed(3)
    expected = []
    for batch in data:
        reference.zero_grad()
        loss = case.loss_fn(plain, batch)
        loss.backward()
        reference.step()
        expected.append(loss.item())
    model, optimizer = build(case)
    if constraints.pipeline != 1:
        graph = capture(model, case.loss_fn, data[0])
        forward = [node.name for node, info in graph.ops() if info.phase is Phase.FORWARD]
        constraints = msgspec.structs.replace(constraints, stage_starts=(forward[len(forward) // 2],))
    with partita.parallelize(model, optimizer, case.loss_fn, data[0], plan=constraints, compile=False) as step:
        assert step.plan.mode == "graph"
        torch.manual_seed(3)
        losses = [step(batch).loss for batch in data]
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-5)
