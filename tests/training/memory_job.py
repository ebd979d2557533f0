"""One process of a job of two whose machines have no memory in common, started by `test_training_memory.py`.

memory_job.py (crash | again) FOLDER [RANK]: the first has process 1 killed after some copies, unless a launcher has
started the job again after that.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from plain_training import batch_of, loss_fn, train_plain
from torch import nn

import partita
from partita import Checkpoints, Constraints, InMemory

LAST_COPY, END, ON_DISK = 8, 12, 5
PLAN = Constraints(data=2, pipeline=1, num_microbatches=1, threads_per_worker=1, compiled=False, fully_sharded=True)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def plain_losses() -> list[float]:
    model, optimizer = build()
    torch.manual_seed(6)
    return train_plain(model, optimizer, map(batch_of, range(END)))


def main(corner: str, folder: Path, rank: int) -> None:
    model, optimizer = build()
    torch.manual_seed(6)
    told: list[Any] = []
    partita.subscribe(told.append)
    settings = Checkpoints(folder / "disk", every_steps=ON_DISK, memory=InMemory(2, folder / f"machine-{rank}"))
    step = partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=PLAN, checkpoints=settings, timeout_s=30)
    with step:
        begun, losses = step.num_steps, {}
        while step.num_steps < END:
            result = step(batch_of(step.num_steps))
            losses[result.step] = result.loss
            is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            if corner == "crash" and is_first and result.step == LAST_COPY:
                step._keeper._saver.settle()
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    messages = [event.message for event in told if type(event).__name__ == "WarningRaised"]
    actions = [(event.action, event.step) for event in told if type(event).__name__ == "Checkpointed"]
    found = {"begun": begun, "losses": losses, "messages": messages, "actions": actions}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int([*sys.argv, os.environ.get("RANK", "0")][3]))
