"""One process of a job, started by `test_training_sync_jobs.py`: trains by every method and writes what it saw."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from plain_training import loss_fn
from torch import nn

import partita
from partita import Constraints, sync

METHODS: dict[str, Any] = {
    "exact": "exact",
    "fp32": sync.Rounded(to="fp32"),
    "full rank": sync.PowerSGD(rank=64),
    "all elements": sync.TopK(density=1.0),
    "no momentum": sync.DGC(density=1.0, momentum=0.0),
    "all components": sync.DeMo(components=4096, momentum=0.0, sign=False),
    "no masks": sync.Masked(),
    "bf16": "bf16",
    "int8": "int8",
    "powersgd": sync.PowerSGD(rank=2),
    "topk": sync.TopK(density=0.1),
    "dgc": sync.DGC(density=0.1, momentum=0.5),
    "demo": sync.DeMo(components=8, block=8, momentum=0.5),
}


def build() -> nn.Module:
    torch.manual_seed(1)
    first, second = nn.Linear(10, 32), nn.Linear(32, 24)
    return nn.Sequential(first, nn.BatchNorm1d(32), nn.ReLU(), second, nn.Tanh(), nn.Linear(24, 3))


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(24, 10, generator=generator), torch.randint(0, 3, (24,), generator=generator)) for _ in range(6)
    ]


def main(corner: str, folder: str, rank: int) -> None:
    found: dict[str, Any] = {}
    constraints = Constraints(data=int(corner), pipeline=1, threads_per_worker=1, compiled=False, num_microbatches=1)
    for name, method in METHODS.items():
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01 if name == "demo" else 0.1)
        with partita.parallelize(
            model, optimizer, loss_fn, batches()[0], plan=constraints, sync=method, timeout_s=30
        ) as step:
            results = [step(batch) for batch in batches()]
            step.sync_to(model)
            assert step.plan.prediction is not None
            predicted = step.plan.prediction.bytes_sent
        found[name] = {
            "losses": [result.loss for result in results],
            "bytes": [result.bytes_sent for result in results],
            "predicted": predicted,
            "sent_to": [{str(process): num for process, num in result.sent_to.items()} for result in results],
            "weights": [value.double().flatten().tolist() for value in model.state_dict().values()],
        }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
