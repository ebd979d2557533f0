"""One process of a job, started by `test_training_sync_choice.py`: lets partita choose the method for some networks."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
import torch
from plain_training import loss_fn
from torch import nn

import partita
from partita.cluster.model import Link

CASES: dict[str, tuple[float, str | None, dict[str, Any]]] = {  # bytes a second, tolerance, more arguments
    "slow": (2e6, "equivalent-loss", {}),
    "slow, exact": (2e6, "exact", {}),
    "slow, by default": (2e6, None, {}),
    "slow, one plan": (2e4, "equivalent-loss", {"plan": partita.Constraints(data=2, threads_per_worker=1)}),
}


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def main(corner: str, folder: str, rank: int) -> None:
    torch.manual_seed(3)
    batch = torch.randn(8192, 64), torch.randint(0, 4, (8192,))
    found: dict[str, Any] = {}
    for name, (bytes_per_s, tolerance, more) in CASES.items():
        cluster = partita.Cluster.detect()
        cluster = msgspec.structs.replace(cluster, process_link=Link(bytes_per_s=bytes_per_s, latency_s=1e-4))
        model = build()
        optimizer = torch.optim.AdamW(model.parameters())
        with partita.parallelize(
            model, optimizer, loss_fn, batch, sync="auto", tolerance=tolerance, cluster=cluster, compile=False, **more
        ) as step:
            losses = [step(batch).loss for _ in range(3)]
            assert step.choice is not None
            found[name] = {
                "method": repr(step.choice.method),
                "why": step.choice.explain(),
                "estimates": [[repr(one.method), one.time_to_loss_s] for one in step.choice.estimates],
                "losses": losses,
            }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
