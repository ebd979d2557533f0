"""Promise 2: the step time of partita's automatic plan beside its peers.

    python -m benchmarks.step_time --json benchmarks/results/step_time.json --check

Peers: plain PyTorch eager and compiled, on one thread and on all, and DistributedDataParallel with one process a
core. Every peer has processes of its own, started once; all prepare a family, then step in turns, round by round,
in an order that rotates. Only one peer runs at a time. Judged is the median over rounds of the median step of a
round.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks import families
from benchmarks.common import Report, Row, first_line, median, option_parser, show
from benchmarks.families import Batch, Task
from benchmarks.processes import Child, ChildError, Group, Message, serve

LARGEST_RATIO = 1.03
FAMILIES = "gpt2,bert,t5,vit,convnext,resnet,unet,lstm,conv1d,masked_tokens"
PARTITA = "partita"
PEERS = ("eager 1", "eager all", "compiled 1", "compiled all", "ddp", PARTITA)
COLUMNS = ("family", *PEERS, "best_peer", "ratio", "ratio_of_fastest", "plan", "errors")
StepFn = Callable[[Batch], float]


@dataclass
class Prepared:
    """A family that is ready to step in this process."""

    step: StepFn
    stream: Iterator[Batch]
    plan: str
    close: Callable[[], None]


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plain_step(task: Task, optimizer: Any, loss_fn: Any, model: Any) -> StepFn:
    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def prepare_plain(peer: str, task: Task, batches: list[Batch]) -> Prepared:
    import torch

    optimizer = families.make_optimizer("AdamW", task)
    loss_fn = task.loss_fn
    if peer.startswith("compiled"):
        torch.compiler.reset()
        loss_fn = torch.compile(task.loss_fn)
    step = plain_step(task, optimizer, loss_fn, task.model)
    return Prepared(step, itertools.cycle(batches), peer, lambda: None)


def prepare_ddp(task: Task, batches: list[Batch]) -> Prepared:
    """Every process steps on its own rows; their mean loss is the batch's where all rows weigh the same."""
    import torch.distributed as dist
    import torch.utils._pytree as pytree
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(task.model, gradient_as_bucket_view=True)
    optimizer = families.make_optimizer("AdamW", task)
    mine = [pytree.tree_map(lambda leaf: leaf.tensor_split(size)[rank], batch) for batch in batches]
    return Prepared(
        plain_step(task, optimizer, task.loss_fn, model), itertools.cycle(mine), f"ddp x{size}", lambda: None
    )


def prepare_partita(task: Task, batches: list[Batch]) -> Prepared:
    step = partita.parallelize(task.model, families.make_optimizer("AdamW", task), task.loss_fn, batches[0])
    plan = step.plan
    compiled = " compiled" if plan.compiled else ""
    text = f"{plan.mode}{compiled} {plan.axes} x{plan.num_microbatches}, {plan.threads_per_worker} thread(s) a worker"
    return Prepared(lambda batch: float(step(batch).loss), itertools.cycle(batches), text, step.close)


class Peer:
    """The child's side: prepares a family, then steps when it is its turn."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._prepared: Prepared | None = None

    def __call__(self, message: Message) -> Row:
        if message["do"] == "prepare":
            return self._prepare(message["family"])
        if message["do"] == "forget":
            self._forget()
            return {}
        return self._turn(message)

    def _prepare(self, name: str) -> Row:
        import torch

        warnings.simplefilter("ignore")
        self._forget()
        torch.set_num_threads(num_cores() if self.peer.endswith("all") or self.peer == PARTITA else 1)
        task = families.get(name).task("small")
        batches = [task.batches(seed) for seed in range(4)]
        if self.peer == PARTITA:
            self._prepared = prepare_partita(task, batches)
        elif self.peer == "ddp":
            self._prepared = prepare_ddp(task, batches)
        else:
            self._prepared = prepare_plain(self.peer, task, batches)
        for _ in range(3):
            loss = self._prepared.step(next(self._prepared.stream))
        return {"loss": loss, "plan": self._prepared.plan}

    def _turn(self, message: Message) -> Row:
        assert self._prepared is not None, "a family must be prepared before its turn"
        times_s: list[float] = []
        for _ in range(message["num_steps"] + 1):
            batch = next(self._prepared.stream)
            start_s = time.perf_counter()
            self._prepared.step(batch)
            times_s.append(time.perf_counter() - start_s)
        return {"times_s": times_s[1:]}  # the first one finds the caches filled by another peer

    def _forget(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None


class Field:
    """All peers' processes, from the parent's side."""

    def __init__(self, names: tuple[str, ...], timeout_s: float) -> None:
        self.names, self.timeout_s = names, timeout_s
        self._members: dict[str, Child | Group] = {}

    def ask(self, name: str, message: Message) -> Row:
        """The reply of the peer (of its first process); an error of any of its processes is in `error`."""
        if name not in self._members:
            self._members[name] = self._start(name)
        try:
            replies = self._members[name].ask(message, self.timeout_s)
        except ChildError as error:
            self._members.pop(name).close()
            return {"error": str(error), "error_type": "ChildError"}
        if isinstance(replies, dict):
            return replies
        failed = [reply for reply in replies if "error" in reply]
        if failed:
            self._members.pop(name).close()
        return (failed or replies)[0]

    def _start(self, name: str) -> Child | Group:
        module, role = "benchmarks.step_time", name
        if name == "ddp":
            return Group(module, role, num_processes=max(2, num_cores()))
        return Child(module, role, num_threads=num_cores() if name.endswith("all") or name == PARTITA else 1)

    def close(self) -> None:
        for member in self._members.values():
            member.close()


def compare(field: Field, family: str, *, num_rounds: int, round_s: float) -> Row:
    """One row: medians and minima of all peers over interleaved rounds."""
    errors: dict[str, str] = {}
    plans: dict[str, str] = {}
    num_steps: dict[str, int] = {}
    for name in field.names:
        reply = field.ask(name, {"do": "prepare", "family": family})
        if "error" not in reply:
            plans[name] = reply["plan"]
            reply = field.ask(name, {"do": "turn", "num_steps": 3})
        if "error" in reply:
            errors[name] = f"{reply['error_type']}: {first_line(reply['error'])}"
        else:
            num_steps[name] = min(200, max(3, round(round_s / median(reply["times_s"]))))
    rounds: dict[str, list[list[float]]] = {name: [] for name in num_steps}
    for index in range(num_rounds):
        order = list(rounds)
        turn = index % len(order) if order else 0
        for name in order[turn:] + order[:turn]:
            reply = field.ask(name, {"do": "turn", "num_steps": num_steps[name]})
            if "error" in reply:
                errors[name] = f"{reply['error_type']}: {first_line(reply['error'])}"
                rounds.pop(name)
            else:
                rounds[name].append(reply["times_s"])
    for name in rounds:
        field.ask(name, {"do": "forget"})
    return {"family": family, **judge(rounds), "plan": plans.get(PARTITA), "plans": plans, "errors": errors or None}


def judge(rounds: dict[str, list[list[float]]]) -> Row:
    """Medians and minima by peer, and partita's ratio to the best of the others."""
    medians = {name: median([median(times) for times in turns]) for name, turns in rounds.items() if turns}
    fastest = {name: min(min(times) for times in turns) for name, turns in rounds.items() if turns}
    row: Row = {**medians, "fastest_time_s": fastest, "rounds": {n: [median(t) for t in v] for n, v in rounds.items()}}
    others = [name for name in medians if name != PARTITA]
    if PARTITA in medians and others:
        row["best_peer"] = min(others, key=medians.__getitem__)
        row["ratio"] = medians[PARTITA] / medians[row["best_peer"]]
        row["ratio_of_fastest"] = fastest[PARTITA] / min(fastest[name] for name in others)
    return row


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    ratios = [row["ratio"] for row in rows if row.get("ratio") is not None]
    summary = {
        "num_families": len(ratios),
        "median_ratio": median(ratios),
        "largest_ratio": max(ratios, default=float("nan")),
    }
    misses = [
        f"{row['family']}: partita / {row['best_peer']} must be at most {LARGEST_RATIO}, but is {row['ratio']:.3f}"
        for row in rows
        if row.get("ratio") is not None and row["ratio"] > LARGEST_RATIO
    ]
    misses += [
        f"{row['family']}: not compared; {row.get('errors')}" for row in rows if row.get("ratio") is None
    ]  # fmt: skip
    if len(rows) < 8:
        misses.append(f"at least 8 families must be compared, but there are {len(rows)}")
    return summary, misses


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-seconds", type=float, default=1.0, help="of steps of one peer in one round")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B")
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds for one preparation or turn")
    options = parser.parse_args()
    if options.child:
        serve(Peer(options.child))
        return 0
    names = tuple(name.strip() for name in options.peers.split(","))
    if not set(names) <= set(PEERS):
        parser.error(f"--peers must name some of {PEERS}, but got {names}")
    settings = {"num_rounds": options.rounds, "round_s": options.round_seconds, "scale": "small", "optimizer": "AdamW"}
    report = Report("step_time", settings, path=options.json)
    field = Field(names, options.timeout)
    try:
        for family in families.select(options.families or FAMILIES):
            row = compare(field, family.name, num_rounds=options.rounds, round_s=options.round_seconds)
            report.add(row)
            print(f"{family.name}: ratio {row.get('ratio')} {row.get('errors') or ''}", file=sys.stderr, flush=True)
    finally:
        field.close()
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
