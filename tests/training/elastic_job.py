"""One process of an elastic job, started by `test_training_elastic.py`: trains until it is told to end (FOLDER/end has
the number of the last step), and writes what it saw."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from plain_training import loss_fn, train_plain
from torch import nn

import partita
from partita import Constraints, Elastic
from partita.training.quorum_line import QuorumLine

NEVER = 10**9
ROWS = 24
STEP_TIME_S = 0.03
PLAN = Constraints(num_workers=1, compiled=False)
EVERY = 5
METHODS = {
    "exact": partita.sync.Exact(),
    "diloco": partita.sync.DiLoCo(every=EVERY, outer_lr=0.8, outer_momentum=0.5),
    "int8": partita.sync.DiLoCo(
        every=EVERY, outer_lr=0.8, outer_momentum=0.5, compress=partita.sync.Rounded(to="int8")
    ),
    "streaming": partita.sync.StreamingDiLoCo(every=2 * EVERY, fragments=2, delay=0, outer_lr=0.8, outer_momentum=0.5),
}


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch_of(number: int) -> Any:
    generator = torch.Generator().manual_seed(number)
    x_BI = torch.randn(ROWS, 6, generator=generator)
    return x_BI, x_BI[:, :3].argmax(1)


def plain(num_steps: int) -> tuple[list[float], nn.Module]:
    model, optimizer = build()
    return train_plain(model, optimizer, map(batch_of, range(num_steps))), model


def end_of(folder: Path) -> int:
    path = folder / "end"
    text = path.read_text() if path.exists() else ""  # which may be about to be written
    return int(text) if text else NEVER


def digest(step: partita.Step, into: nn.Module) -> str:
    """Of the weights that processes have agreed on, to the last bit."""
    step.sync_to(into)
    content = b"".join(value.detach().numpy().tobytes() for value in into.parameters())
    return hashlib.sha256(content).hexdigest()


def die_within_an_exchange(number: int) -> None:
    """This process ends in the exchange of that number, when the others have what it sent before."""
    exchange, count = QuorumLine.exchange, itertools.count(1)

    def fatal(line: QuorumLine, outgoing: Any, incoming: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return exchange(line, outgoing, incoming)

    QuorumLine.exchange = fatal  # type: ignore[method-assign]


def main(folder: Path, name: str, lighthouse: str, min_replicas: int, method: str) -> None:
    if name == "mortal":
        die_within_an_exchange(6)  # the second turn of the third sum
    looked_at, _ = build()
    model, optimizer = build(7 if name == "late" else 0)  # who is late receives the others' weights
    elastic = Elastic(lighthouse=lighthouse, timeout_s=5.0, wait_s=60.0, min_replicas=min_replicas)
    with (
        (folder / f"{name}.jsonl").open("a") as log,
        partita.parallelize(
            model, optimizer, loss_fn, batch_of(0), plan=PLAN, elastic=elastic, sync=METHODS[method]
        ) as step,
    ):
        while step.num_steps < end_of(folder):
            number = step.num_steps
            time.sleep(STEP_TIME_S)
            start_s = time.time()
            result = step(batch_of(number))
            line = {
                "step": result.step,
                "given": number,
                "loss": result.loss,
                "num": step.num_replicas,  # type: ignore[attr-defined]
                "place": step._round.place,  # type: ignore[attr-defined]
                "sent": result.bytes_sent,
                "sent_to": sum(result.sent_to.values()),
                "agreed": digest(step, looked_at),
                "start_s": start_s,
                "end_s": time.time(),
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
        weights = [value.tolist() for value in model.parameters()]
    (folder / f"{name}.json").write_text(json.dumps({"weights": weights}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
