"""Synchronisation methods on equal samples: loss reached, bytes sent, and time by bandwidth, beside DDP and its hooks.

    python -m benchmarks.methods --json benchmarks/results/methods.json --check

Every row is a method on a task (`benchmarks.method_tasks`): `--processes` real processes train on the same global
batches from the same weights, three seeds. Judged is what comes out (`step.sync_to`) on data that was not learnt from.
Bytes are those that the processes sent, in the mean of a step and process, beside the method's own formula; for peers,
which do not count, those of the formula of what their hook sends.

`steps_factor` says how many times as many steps a method needs for the loss that it has reached as exact training does,
whose loss is judged on the way: the loss in steps by which time-to-loss is to be reckoned.

`--check` fails where bytes differ from their formula by more than 0.1 %, where a method does not train, or where an
outcome that is known of such tasks (`benchmarks.method_outcomes`) does not come out.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, first_line, option_parser, show
from benchmarks.ddp_hooks import register_hook
from benchmarks.method_entries import Entry, entries, formula, parts_of_model, sent_by_replica, sums_of
from benchmarks.method_outcomes import OUTCOMES, steps_factor
from benchmarks.method_tasks import TASKS, Task, loss_of
from benchmarks.processes import ChildError, Group, Message, serve

LARGEST_BYTES_ERROR = 0.001
SEEDS = (0, 1, 2)
MARKS = 20  # of exact training, where its loss is judged on the way
COLUMNS = (
    "task", "method", "loss", "accuracy", "deviation", "steps_factor", "bytes_per_step", "fewer", "bytes_error",
    "step_time_s", "errors",
)  # fmt: skip


# The children --------------------------------------------------------------------------------------------------------


class Worker:
    """One process of a job: trains when it is asked to."""

    def __call__(self, message: Message) -> Message:
        import torch

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        task, entry = TASKS[message["task"]], entries(message["task"])[message["entry"]]
        if entry.make is None:
            return self._peer(task, entry, message)
        return self._partita(task, entry, message)

    def _partita(self, task: Task, entry: Entry, message: Message) -> Message:
        seed, num = message["seed"], message["processes"]
        model, merged = task.model(seed), task.model(seed)
        optimizer = task.optimizer(model, momentum=entry.momentum, name=entry.optimizer, lr=entry.lr)
        assert entry.make is not None
        method = entry.make()
        stream = task.batches(seed, num, by_label=entry.by_label)
        first = next(task.batches(seed, num))
        is_gradients = isinstance(method, partita.sync.GradientMethod)
        plan = partita.Constraints(
            data=num if is_gradients else 1, pipeline=1, threads_per_worker=1, num_microbatches=1, compiled=False
        )
        sent, start_s = [], 0.0
        curve: list[tuple[int, float]] = []
        with partita.parallelize(model, optimizer, loss_of, first, plan=plan, sync=method) as step:
            for number in range(message["steps"]):
                if number == 1:
                    start_s = time.perf_counter()
                sent.append(step(next(stream)).bytes_sent)
                if number + 1 in message["marks"]:
                    step.sync_to(merged)
                    curve.append((number + 1, task.judge(merged)["loss"]))
                    merged.train()
            step_time_s = (time.perf_counter() - start_s) / (message["steps"] - 1)
            step.sync_to(merged)
            total = sent_by_replica(step, merged)
            sums = sums_of(step, model) if is_gradients else [parts_of_model(model)]
        warm = sent[getattr(method, "warm_up_steps", 0) :]  # the formula is that of later steps
        num_bytes = sum(warm) if total is None else total
        return {
            **task.judge(merged),
            "bytes_per_step": num_bytes / len(warm),
            "formula": formula(method, sums, num, int(os.environ["RANK"]), len(warm)),
            "step_time_s": step_time_s,
            "curve": curve,
        }

    def _peer(self, task: Task, entry: Entry, message: Message) -> Message:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        seed, num, rank = message["seed"], message["processes"], int(os.environ["RANK"])
        model = task.model(seed)
        wrapped: Any = model
        own = slice(rank * task.rows // num, (rank + 1) * task.rows // num)
        if entry.name != "one process":
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1000)
            register_hook(wrapped, entry.name.removeprefix("ddp").strip(), rank=2)
        elif rank:
            return {}
        optimizer = task.optimizer(model)
        stream = task.batches(seed, num)
        start_s = time.perf_counter()
        for _ in range(message["steps"]):
            x, y = next(stream)
            optimizer.zero_grad()
            loss_of(wrapped, (x[own], y[own])).backward()
            optimizer.step()
        step_time_s = (time.perf_counter() - start_s) / message["steps"]
        return {**task.judge(model), "step_time_s": step_time_s}


# The parent ----------------------------------------------------------------------------------------------------------


def measure(group: Group, task: Task, entry: Entry, options: Any) -> Row:
    """One row: the mean over seeds."""
    runs: list[list[Row]] = []
    row: Row = {"task": task.name, "method": entry.name}
    steps = options.steps or task.steps
    marks = [steps * share // MARKS for share in range(1, MARKS + 1)] if entry.name == "exact" else []
    for seed in range(options.seeds):
        message = {
            "task": task.name, "entry": entry.name, "seed": seed, "steps": steps, "processes": options.processes,
            "marks": marks,
        }  # fmt: skip
        replies = group.ask(message, options.timeout)
        failed = [reply for reply in replies if "error" in reply]
        if failed:
            return {**row, "errors": f"{failed[0]['error_type']}: {first_line(failed[0]['error'])}"}
        runs.append(replies)
    firsts = [replies[0] for replies in runs]
    row["loss"] = statistics.fmean(one["loss"] for one in firsts)
    if "accuracy" in firsts[0]:
        row["accuracy"] = statistics.fmean(one["accuracy"] for one in firsts)
    row["deviation"] = statistics.pstdev(one.get("accuracy", one["loss"]) for one in firsts)
    row["step_time_s"] = statistics.median(one["step_time_s"] for one in firsts)
    if marks:
        losses = [[loss for _, loss in one["curve"]] for one in firsts]
        row["curve"] = [
            [mark, statistics.fmean(column)] for mark, column in zip(marks, zip(*losses, strict=True), strict=True)
        ]
    row["seeds"] = [{key: one[key] for key in ("loss", "accuracy") if key in one} for one in firsts]
    if "bytes_per_step" in firsts[0]:
        sent = statistics.fmean(reply["bytes_per_step"] for replies in runs for reply in replies)
        wanted = statistics.fmean(reply["formula"] for replies in runs for reply in replies)
        row |= {"bytes_per_step": sent, "formula": wanted, "bytes_error": abs(sent / wanted - 1) if wanted else 0.0}
    return row


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    misses = [f"{row['task']}, {row['method']}: {row['errors']}" for row in rows if row.get("errors")]
    exact = {row["task"]: row for row in rows if row["method"] == "exact"}
    for row in rows:
        base = exact.get(row["task"], {}).get("bytes_per_step")
        if base and row.get("bytes_per_step"):
            row["fewer"] = base / row["bytes_per_step"]
        curve = exact.get(row["task"], {}).get("curve")
        if curve and row.get("loss") is not None:
            row["steps_factor"] = steps_factor(curve, row["loss"])
        if row.get("bytes_error", 0.0) > LARGEST_BYTES_ERROR:
            misses.append(
                f"{row['task']}, {row['method']}: bytes must be those of the formula, {row['formula']:.0f} a step, but "
                f"are {row['bytes_per_step']:.0f}"
            )
    outcomes = {outcome.text: outcome.holds(rows) for outcome in OUTCOMES}
    misses += [f"known, but not seen: {text}" for text, holds in outcomes.items() if holds is False]
    errors = [row["bytes_error"] for row in rows if row.get("bytes_error") is not None]
    return {"num_rows": len(rows), "largest_bytes_error": max(errors, default=0.0), "outcomes": outcomes}, misses


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B")
    parser.add_argument("--methods", default="", metavar="A;B", help="only these, by name")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--steps", type=int, default=0, help="instead of the task's own number")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one training")
    options = parser.parse_args()
    if options.child:
        serve(Worker())
        return 0
    settings = {"processes": options.processes, "seeds": options.seeds, "steps": options.steps or "as the tasks say"}
    report = Report("methods", settings, path=options.json)
    for name in options.tasks.split(","):
        task = TASKS[name.strip()]
        known = entries(task.name)
        chosen = [known[one.strip()] for one in options.methods.split(";")] if options.methods else known.values()
        with Group("benchmarks.methods", "train", num_processes=options.processes) as group:
            for entry in chosen:
                try:
                    report.add(measure(group, task, entry, options))
                except ChildError as error:
                    report.add({"task": task.name, "method": entry.name, "errors": first_line(error)})
                    break
                print(f"{task.name}, {entry.name}: {report.rows[-1]}", file=sys.stderr, flush=True)
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
