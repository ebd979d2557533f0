"""One process of an elastic job, started by `benchmarks.faults`: trains until it is told to end, and logs every step.

    python -m benchmarks.fault_job FOLDER NAME LIGHTHOUSE SLOWNESS METHOD

The file FOLDER/end has the number of the step after which all end. With METHOD "exact" losses of every step are those
of plain PyTorch (`plain_losses`), whoever made it; with "diloco" processes agree every `EVERY` steps, and what they
agree on at the end goes to FOLDER/NAME.pt. SLOWNESS is added to the time of every piece of a batch, in seconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = 24
STEP_TIME_S = 0.02
NEVER = 10**9
EVERY = 20
NUM_JUDGED = 50


def build() -> tuple[Any, Any]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_fn(model: Any, batch: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(number: int) -> Any:
    """Learnable: labels follow from the inputs."""
    import torch

    generator = torch.Generator().manual_seed(number)
    x_BI = torch.randn(ROWS, 64, generator=generator)
    return x_BI, x_BI[:, :10].argmax(1)


def plain_losses(num_steps: int) -> list[float]:
    """By plain PyTorch, undisturbed."""
    model, optimizer = build()
    losses = []
    for number in range(num_steps):
        loss = loss_fn(model, batch_of(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def end_of(folder: Path) -> int:
    path = folder / "end"
    return int(path.read_text()) if path.exists() else NEVER


def judge(weights: Sequence[Any]) -> float:
    """The loss of weights on batches that no training sees."""
    import torch

    model, _ = build()
    with torch.no_grad():
        for value, found in zip(model.parameters(), weights, strict=True):
            value.copy_(found)
        return statistics.fmean(loss_fn(model, batch_of(NEVER + number)).item() for number in range(NUM_JUDGED))


def main(folder: Path, name: str, lighthouse: str, slowness: float, method: str) -> None:
    import torch

    import partita

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, optimizer = build()
    elastic = partita.Elastic(lighthouse=lighthouse, timeout_s=5.0, wait_s=120.0)

    def slow_loss(model: Any, batch: Any) -> Any:
        time.sleep(slowness)
        loss = loss_fn(model, batch)
        return loss * 2 if loss.item() > 1e6 else loss  # not to be captured: a graph would not sleep

    sync: Any = partita.sync.DiLoCo(every=EVERY) if method == "diloco" else "exact"
    plan: Any = "auto" if slowness else partita.Constraints(num_workers=1, compiled=False)
    function = slow_loss if slowness else loss_fn
    with (
        (folder / f"{name}.jsonl").open("a") as log,
        partita.parallelize(model, optimizer, function, batch_of(0), plan=plan, elastic=elastic, sync=sync) as step,
    ):
        while step.num_steps < end_of(folder):
            time.sleep(STEP_TIME_S)
            result = step(batch_of(step.num_steps))
            line = {"step": result.step, "loss": result.loss, "num": step.num_replicas, "end_s": time.time(),
                    "time_s": result.step_time_s}  # fmt: skip
            log.write(json.dumps(line) + "\n")
            log.flush()
        step.sync_to(model)
        torch.save([value.detach() for value in model.parameters()], folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
