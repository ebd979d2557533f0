"""One process of a job, started by `test_training_sync_jobs.py`: trains a replica by every method."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from plain_training import loss_fn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import partita
from partita import Constraints, sync

METHODS: dict[str, Any] = {
    "exact": "exact",
    "local sgd, H=1": sync.LocalSGD(every=1),
    "diloco, H=1": sync.DiLoCo(every=1),
    "streaming, H=1": sync.StreamingDiLoCo(every=1, fragments=1, delay=0, compress=sync.Exact()),
    "stale 0": sync.Stale(staleness=0),
    "gossip with all": sync.Gossip(complete=True),
    "stale 2": sync.Stale(staleness=2),
    "gossip": sync.Gossip(every=2),
    "diloco": sync.DiLoCo(every=3, outer_lr=0.8, outer_momentum=0.3),
    "streaming": sync.StreamingDiLoCo(every=4, fragments=2, delay=1),
    "post-local": sync.LocalSGD(every=3, after=4),
}


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(8 * 24, 10, generator=generator), torch.randint(0, 3, (8 * 24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=24)


def values_of(model: nn.Module) -> list[list[float]]:
    return [value.double().flatten().tolist() for value in model.state_dict().values()]


def main(corner: str, folder: str, rank: int) -> None:
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        model, merged = build(), build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        constraints = Constraints(pipeline=1, threads_per_worker=1, compiled=False, num_microbatches=1)
        first = next(iter(loader()))
        with partita.parallelize(model, optimizer, loss_fn, first, plan=constraints, sync=method, timeout_s=30) as step:
            results = [step(batch) for batch in partita.data.sharded(loader(), step)]
            own = values_of(model)
            step.sync_to(merged)
            kept = values_of(model) == own or name.startswith("stale")
            step.save(f"{folder}/{name}")
            later = [step(batch).loss for batch in loader()]
            step.load(f"{folder}/{name}")
            again = [step(batch).loss for batch in loader()]
            num_steps = step.num_steps
        found[name] = {
            "losses": [result.loss for result in results],
            "bytes": [result.bytes_sent for result in results],
            "merged": values_of(merged),
            "kept": kept,
            "later": later,
            "again": again,
            "num_steps": num_steps,
        }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
