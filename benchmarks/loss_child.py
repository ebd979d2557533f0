"""The processes of `benchmarks.time_to_loss`: each trains by some ways (`benchmarks.loss_trainers`), in turns.

They are asked to *prepare* a way with the weights of a seed, to take a *turn* of so many steps, and to *forget* it. A
turn tells of every step how long it took, what its loss was, what the way itself says it has sent, and what the
emulated machine's interface has sent; every `judge_every` steps, but one before, the processes' weights are merged and
judged, in time and bytes that are no step's. (One before: at round numbers of steps Streaming DiLoCo has an exchange on
its way, which merging would end too early.)

Nothing here imports partita, which the interpreter of a peer need not have.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Row
from benchmarks.loss_trainers import MAKERS, Trainer
from benchmarks.method_tasks import TASKS, Batch, Task
from benchmarks.processes import Message, serve
from benchmarks.slow_machines import INTERFACE, Traffic


@dataclass
class Way:
    """One way to train, and where it stands."""

    task: Task
    trainer: Trainer
    stream: Iterator[Batch]
    num_steps: int = 0
    sent: int | None = None  # by what the way says
    traffic: Traffic | None = None


class Learner:
    """Answers the parent's messages."""

    def __init__(self) -> None:
        self._ways: dict[str, Way] = {}

    def __call__(self, message: Message) -> Row:
        return {"prepare": self._prepare, "turn": self._turn, "forget": self._forget}[message["do"]](message)

    def _prepare(self, message: Message) -> Row:
        import torch

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        self._forget(message)
        task, seed, num = TASKS[message["task"]], message["seed"], message["processes"]
        start_s = time.perf_counter()
        trainer = MAKERS[message["kind"]](task, message["name"], seed, num)
        self._ways[message["way"]] = Way(task, trainer, task.batches(seed, num))
        return {"prepare_time_s": time.perf_counter() - start_s, "every": trainer.every}

    def _turn(self, message: Message) -> Row:
        if message["way"] not in self._ways:
            raise LookupError(f"{message['way']} was lost when another way brought its processes down")
        way = self._ways[message["way"]]
        judge_every = message.get("judge_every", 0)
        times_s, losses, sent, wire, curve = [], [], [], [], []
        way.traffic = traffic()  # of the others' turns nothing counts
        for _ in range(message["steps"]):
            batch = next(way.stream)
            start_s = time.perf_counter()
            losses.append(way.trainer.step(batch))
            times_s.append(time.perf_counter() - start_s)
            way.num_steps += 1
            sent.append(_since(way))
            wire.append(_payload(way))
            if judge_every and (way.num_steps + 1) % judge_every == 0:
                merged = way.trainer.merged()
                if os.environ["RANK"] == "0":
                    curve.append((way.num_steps, way.task.judge(merged)["loss"]))
                way.sent, way.traffic = way.trainer.sent(), traffic()
        return {
            "times_s": times_s,
            "losses": losses,
            "sent": None if None in sent else sent,
            "wire": None if None in wire else wire,
            "curve": curve,
            "every": way.trainer.every,
            "is_settled": way.trainer.is_settled,
            **way.trainer.facts(),
        }

    def _forget(self, message: Message) -> Row:
        way = self._ways.pop(message["way"], None)
        if way is not None:
            way.trainer.close()
        return {}


def _since(way: Way) -> int | None:
    """Bytes that the way says it has sent since it was last asked, those between its turns included."""
    before, way.sent = way.sent or 0, way.trainer.sent()
    return None if way.sent is None else way.sent - before


def _payload(way: Way) -> int | None:
    before, way.traffic = way.traffic, traffic()
    return None if before is None or way.traffic is None else way.traffic.payload_since(before)


def traffic(path: Path = Path("/proc/net/dev")) -> Traffic | None:
    """What the interface of this emulated machine has sent; None where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            values = counters.split()
            return Traffic(int(values[8]), int(values[9]))  # after 8 of what was received
    return None


if __name__ == "__main__":
    assert sys.argv[1] == "--child", "started by benchmarks.time_to_loss alone"
    serve(Learner())
