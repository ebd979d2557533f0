"""One process of a job of two, started by `test_training_clipping.py`: trains with clipped and added-up gradients."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from plain_training import Coupled, loss_fn
from torch import nn

import partita
from partita import Constraints

BASE: dict[str, Any] = {"compiled": False, "threads_per_worker": 1}
MEGATRON = {"0.*": {"tensor": "S(0)"}, "2.weight": {"tensor": "S(1)"}, "4.weight": {"tensor": "S(1)"}}
DATA = Constraints(**BASE, data=2, pipeline=1, num_microbatches=1)
ALL, SOME = [True] * 6, [False, True, True, False, False, True]
CASES: dict[str, tuple[Constraints, float | None, list[bool], Any]] = {
    "data": (DATA, 0.5, ALL, "exact"),
    "data, added up": (DATA, 0.5, SOME, "exact"),
    "only added up": (DATA, None, SOME, "exact"),
    "pipeline": (Constraints(**BASE, data=1, pipeline=2, num_microbatches=2), 0.5, ALL, "exact"),
    "tensor": (Constraints(**BASE, data=1, pipeline=1, tensor=2, inputs=MEGATRON), 0.5, ALL, "exact"),
    "fully sharded": (Constraints(**BASE, data=2, pipeline=1, fully_sharded=True), 0.5, SOME, "exact"),
    "one of them alone": (Constraints(**BASE, num_workers=1), 0.5, SOME, "exact"),
    "all of it sent": (DATA, 0.5, SOME, partita.sync.TopK(density=1.0)),
    "full rank": (DATA, 0.5, SOME, partita.sync.PowerSGD(rank=64)),
}


def build(kind: str = "AdamW") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    if kind == "Muon":
        matrices = [value for value in model.parameters() if value.dim() == 2]
        return model, torch.optim.Muon(matrices, lr=1e-2)
    if kind == "Coupled":
        return model, Coupled(model.parameters(), lr=1e-2)
    made: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, kind)
    return model, made(model.parameters(), lr=1e-2)


def branching_of(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, but it cannot be captured as a graph."""

    def branching(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = function(model, batch)
        return loss * 2 if loss.item() > 1e6 else loss

    return branching


branching = branching_of(loss_fn)


def batch_of(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x_BI = torch.randn(12, 6, generator=generator) * (1.0 + seed)  # norms of gradients grow
    return x_BI, torch.randint(0, 3, (12,), generator=generator)


def plain(
    limit: float | None, *, updates: Sequence[bool] = ALL, optimizer: str = "AdamW"
) -> tuple[list[float], list[float], nn.Module]:
    """Losses, norms of the gradients that are applied, and the model, by plain PyTorch."""
    model, made = build(optimizer)
    losses, norms = [], []
    for index, update in enumerate(updates):
        loss = loss_fn(model, batch_of(index))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if update:
            if limit is not None:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
            made.step()
            made.zero_grad()
    return losses, norms, model


def main(corner: str, folder: str, rank: int) -> None:
    found = {}
    for name, (plan, limit, updates, method) in CASES.items():
        model, optimizer = build()
        with partita.parallelize(
            model, optimizer, loss_fn, batch_of(0), plan=plan, sync=method, clip_grad_norm=limit, timeout_s=30
        ) as step:
            results = [step(batch_of(index), update=update) for index, update in enumerate(updates)]
            step.sync_to(model)
        found[name] = {
            "losses": [result.loss for result in results],
            "norms": [result.grad_norm for result in results],
            "weights": [value.tolist() for value in model.parameters()],
        }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
