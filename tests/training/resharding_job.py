"""One process of a job of two, started by `test_training_resharding.py`: saves under some plans, or loads all that was
saved. The test does so under the plans of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from plain_training import batch_of, loss_fn
from torch import nn

import partita
from partita import Constraints
from partita.training.checkpoint import folder as folders

BASE: dict[str, Any] = {"compiled": False, "num_microbatches": 1, "threads_per_worker": 1}
MEGATRON = {"0.*": {"tensor": "S(0)"}, "2.weight": {"tensor": "S(1)"}, "4.weight": {"tensor": "S(1)"}}
ALONE = {
    "one worker": Constraints(**BASE, num_workers=1),
    "data": Constraints(**BASE, data=2, num_workers=2),
    "tensor": Constraints(**BASE, data=1, tensor=2, inputs=MEGATRON),
    "pipeline": Constraints(**BASE, data=1, pipeline=2),
}
TOGETHER = {
    "data of processes": Constraints(**BASE, data=2, pipeline=1),
    "pipeline of processes": Constraints(**BASE, data=1, pipeline=2),
    "tensor of processes": Constraints(**BASE, data=1, pipeline=1, tensor=2, inputs=MEGATRON),
    "fully sharded": Constraints(**BASE, data=2, pipeline=1, fully_sharded=True),
}
NOT_SHARED = "a folder that rank 0 alone sees"
WITH_METHOD = "error feedback"
NUM_STEPS = 3


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def save(name: str, plan: Constraints, base: Path, **options: Any) -> dict[str, Any]:
    """Saves after some steps; the losses, and that of the step after."""
    model, optimizer = build(0)
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, timeout_s=30, **options) as step:
        losses = [step(batch_of(index)).loss for index in range(NUM_STEPS)]
        saving = step.save_async(base / name)
        losses.append(step(batch_of(NUM_STEPS)).loss)
        saving.wait()
        later = [step(batch_of(index)).loss for index in range(NUM_STEPS + 1, NUM_STEPS + 4)]
    return {"losses": losses, "later": later}


def load(name: str, plan: Constraints, base: Path, **options: Any) -> dict[str, Any]:
    """Loads everything that was saved; the loss of the step after each, and some more of the last one."""
    model, optimizer = build(5)
    found = {}
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, timeout_s=30, **options) as step:
        for index, folder in enumerate(sorted(path for path in base.iterdir() if not path.name.startswith("of "))):
            if index % 2:  # into a step that has run, or has not
                step(batch_of(9))
            step.load(folder)
            assert step.num_steps == NUM_STEPS
            found[folder.name] = [step(batch_of(number)).loss for number in range(NUM_STEPS, NUM_STEPS + 4)]
    return found


def hide_from(rank: int) -> None:
    """Has processes other than rank 0 not see the checkpoints."""
    if rank == 0:
        return

    def unseen(*arguments: Any) -> Any:
        raise folders.DamagedError("no such folder")

    folders.is_seen = lambda path: False  # type: ignore[assignment]
    folders.read_meta = unseen
    folders.candidates = lambda path: []  # type: ignore[assignment]


def act(corner: str, plans: dict[str, Constraints], base: Path) -> dict[str, Any]:
    call = save if corner == "save" else load
    return {name: call(name, plan, base) for name, plan in plans.items()}


def main(corner: str, folder: str, rank: int) -> None:
    base = Path(folder).parent
    call = save if corner == "save" else load
    found = act(corner, TOGETHER, base)
    found[WITH_METHOD] = call(WITH_METHOD, TOGETHER["data of processes"], base, sync=partita.sync.TopK(density=0.05))
    hide_from(rank)
    found[NOT_SHARED] = call(NOT_SHARED, TOGETHER["fully sharded"], base)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
