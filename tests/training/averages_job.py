"""One process of a job of two, started by `test_training_averages.py`: trains with an average of the weights."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

from clipping_job import MEGATRON, batch_of, build, loss_fn

import partita
from partita import Constraints

DECAY = 0.7
BASE: dict[str, Any] = {"compiled": False, "threads_per_worker": 1}
PLANS = {
    "data": Constraints(**BASE, data=2, pipeline=1, num_microbatches=1),
    "pipeline": Constraints(**BASE, data=1, pipeline=2, num_microbatches=2),
    "tensor": Constraints(**BASE, data=1, pipeline=1, tensor=2, inputs=MEGATRON),
    "fully sharded": Constraints(**BASE, data=2, pipeline=1, fully_sharded=True),
}


def main(corner: str, folder: str, rank: int) -> None:
    found = {}
    for name, plan in PLANS.items():
        model, optimizer = build("AdamW")
        average = copy.deepcopy(model)
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan, ema=DECAY, timeout_s=30) as step:
            for index in range(4):
                step(batch_of(index))
            step.ema_to(average)
        found[name] = [value.tolist() for value in average.parameters()]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
