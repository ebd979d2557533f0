"""One process of a job of two, started by `test_training_balance.py`: process 1 is slow, and later recovers."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
from plain_training import loss_fn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import partita
from partita import Constraints
from partita.program.instructions import Run
from partita.runtime.binding import Binder
from partita.training import balance
from partita.training.dealing import Patience
from partita.training.replica_balance import ReplicaBalance
from partita.training.slow import SlowProcessWarning

ROWS, NUM_BATCHES = 16, 8
ROW_TIME_S = 0.004  # much more than what else happens on a busy machine
SLOWNESS = 3.0
MOST_STEPS = 20_000  # by far more than a race of candidates has: turns of up to 61 steps, more the shorter steps are
COMPILING_STEP_S = 0.02  # a compiler beside the steps needs its time
PLAN = Constraints(data=2, pipeline=1, num_workers=2, num_microbatches=1, threads_per_worker=1, compiled=False)
ALONE = Constraints(data=1, pipeline=1, num_microbatches=1, threads_per_worker=1, compiled=False)


class Speed:
    """What a row takes this process: as it is said, or really, in its first segment."""

    row_s = ROW_TIME_S

    @classmethod
    def is_said(cls) -> None:
        original = ReplicaBalance.made_step

        def made_step(dealt: ReplicaBalance, time_s: float) -> None:
            original(dealt, cls.row_s * dealt.counts[dealt._rank])
            dealt._cost_s = balance.MAKING_TIME_S

        ReplicaBalance.made_step = made_step  # type: ignore[method-assign]
        balance.row_time_s = lambda *_: cls.row_s

    @classmethod
    def is_real(cls) -> None:
        original = Binder._run

        def slowed(binder: Binder, run: Any) -> Callable[[Any], None]:
            op = original(binder, run)
            if run is not next(item for item in binder.program.instructions if isinstance(item, Run)):
                return op

            def slow(registers: Any) -> None:
                rows = max(value.shape[0] for name, value in registers.items() if name.startswith("x:"))
                op(registers)
                time.sleep(cls.row_s * rows)

            return slow

        Binder._run = slowed  # type: ignore[method-assign]


def build(*, coupled: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`coupled`: with statistics of the whole batch, random numbers and a history of gradients."""
    torch.manual_seed(2)
    between = (nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1)) if coupled else (nn.Tanh(),)
    model = nn.Sequential(nn.Linear(6, 16, bias=False), *between, nn.Linear(16, 3))
    return model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.5 if coupled else 0.0)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    num = ROWS * NUM_BATCHES
    x, y = torch.randn(num, 6, generator=generator), torch.randint(0, 3, (num,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=ROWS)


def ahead(batches: Iterator[Any], depth: int) -> Iterator[Any]:
    """Reads some batches before they are wanted."""
    read: deque[Any] = deque()
    for batch in batches:
        read.append(batch)
        if len(read) > depth:
            yield read.popleft()
    yield from read


def plain_losses(num_steps: int, *, coupled: bool = True) -> list[float]:
    model, optimizer = build(coupled=coupled)
    torch.manual_seed(9)
    losses: list[float] = []
    while len(losses) < num_steps:
        for batch in loader():
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    return losses[:num_steps]


class Trainer:
    def __init__(self, step: partita.Step, corner: str) -> None:
        self.step, self.corner = step, corner
        self.losses: list[float] = []
        self.rows: list[int] = []
        self.shares: list[tuple[int, ...]] = []  # after each step

    def now(self) -> tuple[int, ...]:
        """The rows of each process, by the plan or of replicas; () where nobody has said."""
        dealt = getattr(self.step, "_rows", None)
        return dealt.counts if isinstance(dealt, ReplicaBalance) else self.step.plan.shares

    def train(self, until: Callable[[], bool]) -> None:
        """Whole epochs, until it is so; all processes see the same."""
        while not until() and len(self.losses) < MOST_STEPS:
            batches = partita.data.sharded(loader(), self.step)
            for batch in ahead(batches, 3) if self.corner == "ahead" else batches:
                self.losses.append(self.step(batch).loss)
                if self.corner == "compiled":
                    time.sleep(COMPILING_STEP_S)
                self.rows.append(len(getattr(batch, "batch", batch)[0]))
                self.shares.append(self.now())


def main(corner: str, folder: str, rank: int) -> None:
    Speed.is_real() if corner == "real" else Speed.is_said()
    take = Patience.take
    Patience.take = lambda self, counts, cost_s: take(self, counts, balance.MAKING_TIME_S)  # type: ignore[method-assign]
    balance.LOOK_TIME_S = 0.1
    balance.MAKING_TIME_S = balance.COMPILING_TIME_S = 0.2
    events: list[Any] = []
    partita.subscribe(events.append)
    is_replica = corner == "replicas"
    model, optimizer = build(coupled=not is_replica)
    first = next(iter(loader()))
    plan: Any = ALONE if is_replica else PLAN
    if corner == "fully_sharded":
        plan = msgspec.structs.replace(PLAN, fully_sharded=True)
    if corner in ("given", "compiled"):
        plan = partita.plan(model, loss_fn, first, optimizer=optimizer, constraints=PLAN)
        plan = msgspec.structs.replace(plan, compiled=corner == "compiled")
    sync = partita.sync.LocalSGD(every=1) if is_replica else "exact"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with partita.parallelize(model, optimizer, loss_fn, first, plan=plan, sync=sync, timeout_s=120) as step:
            torch.manual_seed(9)
            trainer = Trainer(step, corner)
            if corner == "compiled":  # it was given so that only its own segments are compiled
                step._balance._moves = True  # type: ignore[union-attr]
            Speed.row_s = ROW_TIME_S * (SLOWNESS if rank == 1 else 1.0)
            trainer.train(lambda: bool(trainer.shares) and trainer.shares[-1] not in ((), (8, 8))
                          if corner != "given" else len(trainer.losses) >= 400)  # fmt: skip
            slow = trainer.now()
            num = len(trainer.losses)
            trainer.train(lambda: len(trainer.losses) > num)  # by the new shares
            Speed.row_s = ROW_TIME_S
            if corner in ("real", "steps", "ahead", "replicas"):
                trainer.train(lambda: trainer.now()[0] < slow[0] if corner == "real" else trainer.now() == (8, 8))
            step.sync_to(model)
            held = [runner for runner in step._runners.values() if hasattr(runner, "held")] if not is_replica else []
    found = {
        "losses": trainer.losses,
        "rows": trainer.rows,
        "shares": trainer.shares,
        "slow": slow,
        "end": trainer.now(),
        "compiled": step.plan.compiled,
        "named": [str(one.message) for one in caught if one.category is SlowProcessWarning],
        "changes": [event.shares for event in events if type(event).__name__ == "SharesChanged"],
        "messages": [event.message for event in events if type(event).__name__ == "WarningRaised"],
        "whole": not any(runner.held for runner in held),
        "weights": [value.tolist() for value in model.state_dict().values()],
    }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
