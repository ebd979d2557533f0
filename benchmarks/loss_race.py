"""Ways to train side by side: their held-out losses by steps, and how long their steps take on a network."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Row, median
from benchmarks.loss_curves import mean_of, steps_to, target_of, time_of_first, whole_turns
from benchmarks.slow_field import Field

WARM_UP = 3  # steps at least; DDP's PowerSGD begins with the third
JUDGE_EVERY = 10
MOST_FACTOR = 2  # of a task's steps, for ways that have not reached the target by then
SAME_STEPS = 60  # whose losses must be those of the training that was judged


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        kind: of its trainer.
        role: whose processes it shares; "": those of its kind.
        like: the way whose mathematics it has, and so its losses; "": its own.
        chooses: whether what it does depends on the network, so that it is judged on each.
    """

    name: str
    kind: str
    role: str = ""
    like: str = ""
    chooses: bool = False

    @property
    def exact(self) -> bool:
        return "exact" in (self.name, self.like)

    @property
    def place(self) -> str:
        return self.role or self.kind


AUTO_EXACT, AUTO_LOSS = "auto exact", "auto equivalent-loss"
METHODS = (
    "bf16", "int8", "powersgd r4", "topk 1%", "local sgd H=5", "diloco H=20", "diloco H=50", "diloco H=50, int4",
    "streaming diloco H=50, int4",
)  # fmt: skip
EXACT = Way("exact", "partita")
WAYS = (
    EXACT,
    Way(AUTO_EXACT, "partita", AUTO_EXACT, like="exact"),
    Way(AUTO_LOSS, "partita", AUTO_LOSS, chooses=True),
    Way("plain", "plain", like="exact"),
    Way("ddp", "ddp", like="exact"),
    *(Way(name, "partita") for name in METHODS),
    Way("ddp fp16", "ddp"),
    Way("ddp bf16", "ddp", "ddp bf16"),  # each with processes of its own: the hook may bring them down
    Way("ddp powersgd", "ddp", "ddp powersgd"),
    Way("torchft diloco H=20", "torchft", like="diloco H=20"),
    Way("torchft diloco H=50", "torchft", like="diloco H=50"),
    Way("hivemind H=50", "hivemind"),
)
ROLES = tuple(dict.fromkeys(way.place for way in WAYS))


@dataclass
class Learnt:
    """What came of judging a way: a curve of each seed, and the first seed's training losses."""

    curves: list[list[tuple[float, float]]] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    error: str = ""

    def at(self, steps: int) -> tuple[float, float]:
        """The loss of the last judging within so many steps, its mean over seeds and its deviation."""
        found = [[loss for at, loss in curve if at <= steps][-1] for curve in self.curves]
        return statistics.fmean(found), statistics.pstdev(found)

    def steps_to(self, target: float) -> float | None:
        return steps_to(mean_of(self.curves), target) if self.curves else None


def learn(field: Field, way: Way, task: str, steps: int, seeds: int, target: float | None) -> Learnt:
    """Trains from each seed's weights for so many steps, and on until the target is reached, `MOST_FACTOR` times as
    many at most."""
    learnt = Learnt(curves=[[] for _ in range(seeds)])
    keys = [f"{way.name}/{seed}" for seed in range(seeds)]
    try:
        for seed, key in enumerate(keys):
            _ask(field, way, {"do": "prepare", "way": key, "seed": seed}, task)
        done, more = 0, steps
        while more:
            for seed, key in enumerate(keys):
                turn = {"do": "turn", "way": key, "steps": more, "judge_every": JUDGE_EVERY}
                replies = _ask(field, way, turn, task)
                learnt.curves[seed] += [(int(at), loss) for at, loss in replies[0]["curve"]]
                if seed == 0:
                    learnt.losses += losses_of(way, replies)
            done += more
            short = target is not None and learnt.steps_to(target) is None
            more = min(-(-steps // 8), MOST_FACTOR * steps - done) if short else 0
    except _Failed as failed:
        return Learnt(error=str(failed))
    for key in keys:
        field.ask(way.place, {"do": "forget", "way": key})
    return learnt


class Curves:
    """Judged trainings by task, number of processes and way; kept in a file, so that they need not be made again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def of(self, field: Field, way: Way, task: str, steps: int, seeds: int) -> Learnt:
        target = self.target(field, task, steps, seeds) if way is not EXACT else None
        key = f"{task}, {field.num} processes, {way.name}, {steps} steps, {seeds} seeds"
        if key not in self._known:
            learnt = learn(field, way, task, steps, seeds, target)
            if learnt.error:
                return learnt
            self._known[key] = {"curves": learnt.curves, "losses": learnt.losses}
            if self._path is not None:
                self._path.write_text(json.dumps(self._known))
        return Learnt(**self._known[key])

    def target(self, field: Field, task: str, steps: int, seeds: int) -> float | None:
        """The loss to reach; None if exact training fails."""
        learnt = self.of(field, EXACT, task, steps, seeds)
        return None if learnt.error else target_of(mean_of(learnt.curves))


# On a network --------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """What steps of a way were like."""

    prepare_time_s: float
    first_s: list[float]  # times of the first steps, until it had settled
    every: int = 1
    is_settled: bool = False
    losses: list[float] = dataclasses.field(default_factory=list)  # of all steps
    rounds_s: list[float] = dataclasses.field(default_factory=list)  # the mean step of a round
    num_steps: int = 0  # of these rounds
    sent: list[list[int]] = dataclasses.field(default_factory=list)  # of each process, by step
    wire: list[list[int]] = dataclasses.field(default_factory=list)
    facts: list[Row] = dataclasses.field(default_factory=list)  # of each process

    @property
    def method(self) -> str:
        """With its settings; "" of peers."""
        return str(self.facts[0].get("method", "")) if self.facts else ""

    def row(self) -> Row:
        """What does not depend on how many steps are needed."""
        bytes_by_process = self.sent or self.wire
        row: Row = {
            "prepare_time_s": self.prepare_time_s,
            "settled_after_s": sum(self.first_s),
            "is_settled": self.is_settled,
            "step_time_s": median(self.rounds_s),
            "rounds_s": self.rounds_s,
            "num_timed_steps": self.num_steps,
        }
        if bytes_by_process:
            row["bytes_per_step"] = statistics.fmean(statistics.fmean(one) for one in bytes_by_process)
            row["peak_bytes"] = max(max(one) for one in bytes_by_process)
        if self.wire:
            row["wire_per_step"] = statistics.fmean(statistics.fmean(one) for one in self.wire)
        if "formula" in self.facts[0]:
            wanted = statistics.fmean(one["formula"] for one in self.facts)
            row["formula"], row["peak_formula"] = wanted, max(one["peak_formula"] for one in self.facts)
            row["bytes_error"] = abs(row["bytes_per_step"] / wanted - 1) if wanted else float(row["bytes_per_step"] > 0)
        return row | {key: value for key, value in self.facts[0].items() if "formula" not in key}


def race(
    field: Field, ways: Sequence[Way], task: str, rounds: int, round_s: float, settle_s: float
) -> dict[str, Timed | str]:
    """Prepares all ways with the weights of the first seed, then lets them step in turns, in an order that rotates."""
    found: dict[str, Timed | str] = {}
    for place, way in enumerate(ways):
        found[way.name] = _attempt(lambda way=way: _prepared(field, way, task, settle_s))
        if not isinstance(found[way.name], Timed):  # those that shared its processes are lost with them
            for other in ways[:place]:
                if other.place == way.place and isinstance(found[other.name], Timed):
                    found[other.name] = _attempt(lambda other=other: _prepared(field, other, task, settle_s))
    for index in range(rounds):
        order = [way for way in ways if isinstance(found[way.name], Timed)]
        turn = index % len(order) if order else 0
        for way in order[turn:] + order[:turn]:
            timed = found[way.name]
            found[way.name] = _attempt(lambda way=way, timed=timed: _one_round(field, way, task, timed, round_s))
    for way in ways:
        if isinstance(found[way.name], Timed):
            field.ask(way.place, {"do": "forget", "way": way.name})
    return found


def _attempt(call: Any) -> Timed | str:
    try:
        timed = call()
        assert isinstance(timed, Timed)
        return timed
    except _Failed as failed:
        return str(failed)


def _prepared(field: Field, way: Way, task: str, settle_s: float) -> Timed:
    replies = _ask(field, way, {"do": "prepare", "way": way.name, "seed": 0}, task)
    timed = Timed(max(reply["prepare_time_s"] for reply in replies), [])
    until_s, num_steps = time.monotonic() + settle_s, WARM_UP
    while True:
        replies = _ask(field, way, {"do": "turn", "way": way.name, "steps": num_steps}, task)
        timed.first_s += step_times(replies)
        timed.losses += losses_of(way, replies)
        timed.is_settled = all(reply["is_settled"] for reply in replies)
        timed.every = max(reply["every"] for reply in replies)
        if timed.is_settled or time.monotonic() > until_s:
            return timed
        num_steps = whole_turns(0.5, median(step_times(replies)), 1)


def _one_round(field: Field, way: Way, task: str, timed: Timed, round_s: float) -> Timed:
    step_time_s = median(timed.rounds_s or timed.first_s[-WARM_UP:])
    num_steps = whole_turns(round_s, step_time_s, timed.every)
    replies = _ask(field, way, {"do": "turn", "way": way.name, "steps": num_steps}, task)
    timed.rounds_s.append(max(sum(reply["times_s"]) for reply in replies) / num_steps)
    timed.num_steps += num_steps
    timed.losses += losses_of(way, replies)
    for kept, name in ((timed.sent, "sent"), (timed.wire, "wire")):
        if all(reply[name] is not None for reply in replies):
            kept.extend([] for _ in range(len(replies) - len(kept)))
            for own, reply in zip(kept, replies, strict=True):
                own.extend(reply[name])
    known = ("times_s", "losses", "sent", "wire", "curve", "every", "is_settled")
    timed.facts = [{key: value for key, value in reply.items() if key not in known} for reply in replies]
    return timed


def outcome(way: Way, task_steps: int, target: float | None, learnt: Learnt, timed: Timed | str) -> Row:
    """One row: time, steps and bytes to the target, from losses by steps and times of steps."""
    if learnt.error or isinstance(timed, str):
        return {"entry": way.name, "exact": way.exact, "errors": learnt.error or timed}
    loss, deviation = learnt.at(task_steps)
    row: Row = {"entry": way.name, "exact": way.exact, "target": target, "loss": loss, "deviation": deviation}
    row |= timed.row()
    steps = None if target is None else learnt.steps_to(target)
    row["steps_to_loss"] = steps
    row["loss_error"] = loss_error(timed.losses, learnt.losses)
    if steps is not None:
        row["time_to_loss_s"] = steps * row["step_time_s"]
        row["first_time_to_loss_s"] = time_of_first(timed.first_s, row["step_time_s"], steps)
        if "bytes_per_step" in row:
            row["bytes_to_loss"] = steps * row["bytes_per_step"]
    return row


def loss_error(timed: Sequence[float], judged: Sequence[float]) -> float:
    """The largest relative difference of the first steps' losses in the training that was timed and in the one that
    was judged."""
    pairs = list(zip(timed, judged, strict=False))[:SAME_STEPS]
    return max((abs(a / b - 1) for a, b in pairs), default=0.0)


def step_times(replies: Sequence[Row]) -> list[float]:
    """Of each step the time on the slowest machine."""
    return [max(times) for times in zip(*(reply["times_s"] for reply in replies), strict=True)]


def losses_of(way: Way, replies: Sequence[Row]) -> list[float]:
    """Of each step the loss of the batch: the mean over processes, unless one of them has the whole batch."""
    own = [reply["losses"] for reply in (replies[:1] if way.kind == "plain" else replies)]
    return [statistics.fmean(losses) for losses in zip(*own, strict=True)]


class _Failed(Exception):
    """A way does not run; says why."""


def _ask(field: Field, way: Way, message: Row, task: str) -> list[Row]:
    replies = field.ask(
        way.place, {"kind": way.kind, "name": way.name, "task": task, "processes": field.num, **message}
    )
    if isinstance(replies, str):
        raise _Failed(replies)
    return replies
