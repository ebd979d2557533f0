"""One process of a job of two, started by `test_training_processes.py`: trains and writes what it saw as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import partita
from partita import Cluster, Constraints

CORNERS = {
    "data": Constraints(data=2, pipeline=1, compiled=False),
    "pipeline": Constraints(data=1, pipeline=2, compiled=False),
    "tensor": Constraints(
        data=1,
        pipeline=1,
        tensor=2,
        compiled=False,
        inputs={"0.*": {"tensor": "S(0)"}, "2.weight": {"tensor": "S(1)"}, "4.weight": {"tensor": "S(1)"}},
    ),
    "fully sharded": Constraints(data=2, pipeline=1, compiled=False, fully_sharded=True),
    "tensor and fully sharded": Constraints(
        data=2,
        pipeline=1,
        tensor=2,
        compiled=False,
        fully_sharded=True,
        inputs={"0.*": {"tensor": "S(0)"}, "2.weight": {"tensor": "S(1)"}},
    ),
    "block": None,
    "one of them alone": Constraints(num_workers=1, compiled=False),
    "uneven shares": Constraints(data=2, pipeline=1, num_microbatches=1, threads_per_worker=1, compiled=False),
    "second process first": Constraints(
        data=1,
        pipeline=2,
        num_microbatches=2,
        schedule="1f1b",
        threads_per_worker=1,
        compiled=False,
        stage_starts=("addmm_1",),
    ),
}


def as_on_unequal_machines(corner: str, plan: partita.Plan) -> partita.Plan:
    """What the planner chooses where one machine is faster, or has more memory."""
    if corner == "uneven shares":
        return msgspec.structs.replace(plan, shares=(6, 2))
    workers = (plan.workers[1], plan.workers[0])
    swapped = [msgspec.structs.replace(worker, index=i, stage=i) for i, worker in enumerate(workers)]
    return msgspec.structs.replace(plan, workers=tuple(swapped))


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def branching(model: nn.Module, batch: Any) -> torch.Tensor:
    loss = loss_fn(model, batch)
    return loss * 2 if loss.item() > 100 else loss


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(28, 6, generator=generator), torch.randint(0, 3, (28,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)  # the last batch has 4 rows


def main(corner: str, folder: str, rank: int) -> None:
    model, optimizer = build(rank)  # different weights: the job starts from those of rank 0
    batches = loader()
    first = next(iter(batches))
    constraints = CORNERS[corner]
    options: dict[str, Any] = {} if constraints is None else {"plan": constraints}
    if corner in ("uneven shares", "second process first"):
        cluster = Cluster.detect()
        plan = partita.plan(model, loss_fn, first, optimizer=optimizer, cluster=cluster, constraints=constraints)
        options["plan"] = as_on_unequal_machines(corner, plan)
    function = branching if constraints is None else loss_fn
    losses, num_rows = [], []
    with partita.parallelize(model, optimizer, function, first, timeout_s=30, **options) as step:
        for _ in range(2):
            for batch in partita.data.sharded(batches, step):
                losses.append(step(batch).loss)
                num_rows.append(len(getattr(batch, "batch", batch)[0]))
        step.save(f"{folder}/checkpoints")
        step.sync_to(model)
        state = {name: value.tolist() for name, value in model.state_dict().items()}
        moments = [float(optimizer.state[item]["exp_avg"].sum()) for item in model.parameters()]
        step.load(f"{folder}/checkpoints")
        losses.append(step(first).loss)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"losses": losses, "state": state, "moments": moments, "rows": num_rows}, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
