"""One process of a job, started by `test_training_launch.py` through a launcher: trains and writes its losses.

launched.py FOLDER (given | auto)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

import partita

NUM_STEPS = 6
MOST_STEPS = 20_000  # by far more than a race of candidates has: turns of up to 61 steps, more the shorter steps are


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)  # slow: thousands of steps stay comparable


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index % 5)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def main(folder: Path, kind: str) -> None:
    model, optimizer = build()
    given = partita.Constraints(data=2, pipeline=1, compiled=False)
    plan: partita.Constraints | str = given if kind == "given" else "auto"
    step = partita.parallelize(model, optimizer, loss_fn, batch(0), plan=plan, compile=False, timeout_s=60)  # type: ignore[arg-type]
    losses: list[float] = []
    with step:
        while len(losses) < NUM_STEPS or (not step.is_settled and len(losses) < MOST_STEPS):
            losses.append(step(batch(len(losses))).loss)
        settled = step.is_settled
        plan_hash = step.plan.hash
        step.sync_to(model)
    job = partita.cluster.job.current_job()
    seen = {
        "launcher": job.launcher if job else "",
        "rank": job.rank if job else 0,
        "processes": len({worker.process for worker in step.plan.workers}),
        "settled": settled,
        "plan": plan_hash,
        "losses": losses,
        "weights": [float(value.sum()) for value in model.parameters()],
    }
    (folder / f"{seen['rank']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
