"""One process of a job of two that goes wrong, started by `test_training_processes.py`: prints the error it gets."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from two_processes import build, loader, loss_fn

import partita
from partita import Constraints
from partita.errors import PartitaError
from partita.training import parallelize as module
from partita.training import shared_plans

LIMITS_S = {"alone": 3.0, "fewer": 12.0, "rows": 12.0, "slow": 5.0}  # starts of two processes may be seconds apart


def main(corner: str, rank: int) -> None:
    model, optimizer = build(0)
    if rank == 1 and corner == "widths":
        model[2] = torch.nn.Linear(12, 12, bias=False)  # type: ignore[operator]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if rank == 1 and corner == "optimizer":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if rank == 1 and corner == "killed":
        module._decide = lambda *_: os.kill(os.getpid(), 9)  # type: ignore[assignment]
    if rank == 0 and corner in ("slow", "planner killed", "planner raises"):
        shared_plans.ranked_plans = functools.partial(_planned, corner, shared_plans.ranked_plans)
    batches: list[Any] = list(loader())
    options = {
        "plan": Constraints(data=2, pipeline=1, compiled=False),
        "timeout_s": LIMITS_S.get(corner, 40.0),
    }
    step = partita.parallelize(model, optimizer, loss_fn, batches[0], **options)
    for number in range(3):
        if rank == 1 and corner == "fewer" and number == 2:
            step.sync_to(model)
        step(batches[-1] if rank == 1 and corner == "rows" and number == 2 else batches[0])


def _planned(corner: str, plan: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if corner == "slow":
        time.sleep(2.5 * LIMITS_S[corner])
    if corner == "planner killed":
        time.sleep(2.0)  # the other waits by now
        os.kill(os.getpid(), 9)
    if corner == "planner raises":
        raise ZeroDivisionError("no rows at all")
    return plan(*args, **options)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[3]))
    except (PartitaError, ZeroDivisionError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(3)  # the other process must not depend on a goodbye
