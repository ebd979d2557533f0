"""One process of a job of two, started by `test_training_fuzz.py`: trains and saves while strangers talk to it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from clipping_job import DATA, batch_of, build, loss_fn

import partita

NUM_STEPS = 150


def main(corner: str, folder: str, rank: int) -> None:
    model, optimizer = build()
    losses = []
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=DATA, timeout_s=30) as step:
        for number in range(NUM_STEPS):
            losses.append(step(batch_of(number % 5)).loss)
            time.sleep(0.01)
            if number % 50 == 0:
                step.save(f"{folder}/checkpoints")
    (Path(folder) / f"{rank}.json").write_text(json.dumps({"losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
