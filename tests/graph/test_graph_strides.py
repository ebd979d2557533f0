"""Ops that address memory give what plain PyTorch gives, however their inputs lie on the workers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import partita
from partita.errors import CaptureError
from partita.graph.capture import capture

ROWS, WIDTH, LENGTH = 4, 8, 6
Read = Callable[[Tensor], Tensor]


def windows(value: Tensor) -> Tensor:
    """Overlapping windows of 4 along the last dim, wherever it lies."""
    rows, width, along = value.stride()
    return value.as_strided((ROWS, WIDTH, 3, 4), (rows, width, along, along), value.storage_offset())


def written(value: Tensor) -> Tensor:
    value = value.clone()
    value.as_strided((ROWS, WIDTH), (WIDTH * LENGTH, LENGTH), 2).mul_(3.0)
    return value


READS: dict[str, Read] = {
    "contiguous": lambda x: windows(x.transpose(1, 2).contiguous()),
    "transposed": lambda x: windows(x.transpose(1, 2)),
    "expanded": lambda x: windows(x.mean(1)[:, :, None].expand(-1, -1, LENGTH)),
    "written": lambda x: written(x.transpose(1, 2).contiguous()),
}


class Model(nn.Module):
    def __init__(self, read: Read) -> None:
        super().__init__()
        self.enter, self.read = nn.Linear(5, WIDTH), read

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.read(self.enter(x))).square().mean()


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2}, {"data": 1, "tensor": 2}], ids=str)
def test_strides_are_those_of_plain_pytorch(name: str, mesh: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Model(READS[name]).double()
    batch = torch.randn(ROWS, LENGTH, 5, dtype=torch.float64)
    reference = copy.deepcopy(model)
    loss = reference(batch)
    loss.backward()
    num_workers = mesh["data"] * mesh.get("tensor", 1)
    constraints = partita.Constraints(**mesh, num_workers=num_workers, threads_per_worker=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    call = lambda model, batch: model(batch)  # noqa: E731
    with partita.parallelize(model, optimizer, call, batch, plan=constraints, compile=False) as step:
        assert step.plan.mode == "graph"
        assert step(batch).loss == pytest.approx(loss.item(), abs=1e-12)
        step.sync_to(model)
    for old, new, wanted in zip(before.parameters(), model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(old - new, wanted.grad, rtol=1e-9, atol=1e-12)


def test_memory_between_entries_is_refused() -> None:
    def gaps(x: Tensor) -> Tensor:
        part = x[:, :, :2]
        return part.as_strided((ROWS, LENGTH, 3), x.stride())

    with pytest.raises(CaptureError, match="nothing but entries"):
        capture(Model(gaps), lambda model, batch: model(batch), torch.randn(ROWS, LENGTH, 5))
