"""The methods of `benchmarks.methods` and `benchmarks.time_to_loss` by name, and the bytes that they send by their own
formulas."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.method_tasks import TASKS

LOSS_BYTES = 8 + 4  # the number of classes that count, and the loss: each is summed over all processes in every step


@dataclass(frozen=True)
class Entry:
    """One way to train. `make` gives the method (None: a peer by its name); DGC and DeMo bring the momentum along."""

    name: str
    make: Callable[[], Any] | None
    optimizer: str = ""
    lr: float = 0.0
    momentum: float | None = None
    by_label: bool = False


def entries(task: str) -> dict[str, Entry]:
    from partita import sync

    methods: dict[str, Callable[[], Any]] = {
        "exact": sync.Exact,
        "bf16": lambda: sync.Rounded(to="bf16"),
        "int8": lambda: sync.Rounded(to="int8"),
        "int4": lambda: sync.Rounded(to="int4"),
        "powersgd r1": lambda: sync.PowerSGD(rank=1),
        "powersgd r2": lambda: sync.PowerSGD(rank=2),
        "powersgd r4": lambda: sync.PowerSGD(rank=4),
        "powersgd r8": lambda: sync.PowerSGD(rank=8),
        "powersgd r2 without feedback": lambda: sync.PowerSGD(rank=2, error_feedback=False),
        "topk 1%": lambda: sync.TopK(density=0.01),
        "topk 1% without feedback": lambda: sync.TopK(density=0.01, error_feedback=False),
        "local sgd H=5": lambda: sync.LocalSGD(every=5),
        "local sgd H=21": lambda: sync.LocalSGD(every=21),
        "local sgd H=105": lambda: sync.LocalSGD(every=105),
        "diloco H=10": lambda: sync.DiLoCo(every=10),
        "diloco H=20": lambda: sync.DiLoCo(every=20),
        "diloco H=50": lambda: sync.DiLoCo(every=50),
        "diloco H=50, int4": lambda: sync.DiLoCo(every=50, compress=sync.Rounded(to="int4")),
        "streaming diloco H=50, int4": lambda: sync.StreamingDiLoCo(every=50, fragments=4, delay=2),
        "stale 1": lambda: sync.Stale(staleness=1),
        "stale 4": lambda: sync.Stale(staleness=4),
        "gossip": sync.Gossip,
    }
    found = {name: Entry(name, make) for name, make in methods.items()}
    plain_lr = TASKS["digits"].lr
    for density in ("1%", "0.1%"):
        share = float(density[:-1]) / 100
        found[f"dgc {density}"] = Entry(
            f"dgc {density}", lambda share=share: sync.DGC(density=share, warm_up_steps=90), "SGD", plain_lr, 0.0
        )
    found["demo"] = Entry("demo", lambda: sync.DeMo(components=8, block=16), "SGD", 3e-3, 0.0)
    if task == "digits":
        for every in (5, 21, 105):
            name = f"local sgd H={every}, sorted"
            found[name] = Entry(name, lambda every=every: sync.LocalSGD(every=every), by_label=True)
    found["one process"] = Entry("one process", None)
    for name in ("ddp", "ddp bf16", "ddp powersgd"):
        found[name] = Entry(name, None)
    return found


# Bytes ---------------------------------------------------------------------------------------------------------------


def sent_by_replica(step: Any, merged: Any) -> int | None:
    """What a replica has sent in its steps, those exchanges included that were in the background when the last step was
    over (`sync_to` has waited for them); None for processes that train as one."""
    before = getattr(step, "bytes_sent", None)
    if before is None:
        return None
    step.sync_to(merged)  # once more, to see what that sends itself
    return int(2 * before - step.bytes_sent)


def parts_of_model(model: Any) -> list[Any]:
    from partita.training.sync.method import Part

    return [Part(name, tuple(value.shape)) for name, value in model.named_parameters()]


def sums_of(step: Any, model: Any) -> list[Any]:
    """What each sum of gradients over processes adds up: a step may form several, one of each bucket."""
    from partita.program.instructions import AllReduce, Start
    from partita.training.sync.sums import parts_of

    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    programs = step._current.programs.programs
    own = next(program for program in programs if program.process == int(os.environ["RANK"]))
    found = [item.collective if isinstance(item, Start) else item for item in own.instructions]
    return [parts_of(item, shapes) for item in found if isinstance(item, AllReduce) and item.gradients]


def formula(method: Any, sums: Sequence[Any], num: int, rank: int, steps: int) -> float:
    """The bytes that the method's own formula gives a step, the sum of the loss (`LOSS_BYTES` to each other process)
    or what replicas tell of their speed included; methods that exchange now and then count their whole turns."""
    from partita.training.replica_balance import told_bytes, told_every
    from partita.training.sync.method import Peers

    sent = sum(method.sent_bytes(parts, Peers(tuple(range(num)), rank)) for parts in sums)
    if isinstance(method, partita.sync.GradientMethod):
        return float(sent + LOSS_BYTES * (num - 1))
    every = getattr(method, "every", 1)
    return sent * (steps // every) * every / steps + told_bytes(num) / told_every(method.meets_every)
