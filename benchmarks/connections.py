"""Learning connections: what each method reaches, beside dense networks, and that plans change nothing of it.

    python -m benchmarks.connections --json benchmarks/results/connections.json --check

Every row is a method on a task (`benchmarks.connection_tasks`), trained by one worker from several seeds: the mean and
the deviation of percent right, or the precision and recall of the connections that are known to be true. "dense" has
all connections ("teacher": its largest weights are taken), "small dense" is a dense network with as many parameters as
the sparse ones have connections and biases.

Rows with `workers` and `processes` train one seed once more by one worker and by several. In float64 sums in another
order do not decide what is chosen: masks must be those of one worker bit by bit, and scores equal. In float32 they may.

`--check` fails where a figure misses its limit.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, first_line, option_parser, show
from benchmarks.connection_tasks import EVERY, FRACTION, STEPS, TASKS, UNTIL, Task, loss_of
from benchmarks.processes import Child, ChildError, Group, Message, serve

METHODS = ("static", "set", "rigl", "magnitude", "dense", "small dense")
REPEATED_TASK = "digits, 90 %"
REPEATED = (("set", "float64"), ("rigl", "float64"), ("magnitude", "float64"), ("rigl", "float32"))
FIGURES = ("score", "precision", "recall", "real_inputs")
COLUMNS = (
    "task", "method", "dtype", "workers", "processes", "num_parameters", "score", "deviation", "precision", "recall",
    "real_inputs", "same_masks", "step_time_s", "errors",
)  # fmt: skip


# The children --------------------------------------------------------------------------------------------------------


class Worker:
    """One process of a job: trains when it is asked to. What has been planned once is not planned again."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], Any] = {}

    def __call__(self, message: Message) -> Message:
        import torch

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        task, seed, dtype = TASKS[message["task"]], message["seed"], getattr(torch, message["dtype"])
        method = method_of(message["method"], task, seed)
        model = _model(task, message["method"], seed).to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=task.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, message["steps"])
        stream = ((x.to(dtype), y.to(dtype) if y.is_floating_point() else y) for x, y in task.batches(seed))
        num = message["workers"] * message["processes"]
        first = partita.Constraints(
            num_workers=num, data=num, pipeline=1, threads_per_worker=1, num_microbatches=1, compiled=False
        )
        key = (task.name, message["method"] == "small dense", task.density, message["dtype"], num)
        plan = self._plans.get(key, first)
        with partita.parallelize(model, optimizer, loss_of, next(stream), plan=plan, connections=method) as step:
            self._plans[key] = step.plan
            start_s = time.perf_counter()
            for _ in range(message["steps"]):
                step(next(stream))
                schedule.step()
            step_time_s = (time.perf_counter() - start_s) / message["steps"]
            step.sync_to(model)
            masks = dict(step.connections)
        there = b"".join(mask.numpy().tobytes() for mask in masks.values())
        outside = sum(item.numel() - int(masks[key].sum()) for key, item in model.named_parameters() if key in masks)
        return {
            **task.judge(model, masks, seed),
            "num_parameters": sum(item.numel() for item in model.parameters()) - outside,
            "masks": hashlib.sha256(there).hexdigest(),
            "step_time_s": step_time_s,
        }


def method_of(name: str, task: Task, seed: int) -> Any:
    """What learns connections; None: all are there."""
    from partita.connections import SET, Magnitude, RigL, Static

    common: dict[str, Any] = {"density": task.density, "seed": seed}
    changing = {**common, "until": UNTIL, "every": EVERY}
    makers = {
        "static": lambda: Static(**common),
        "set": lambda: SET(**changing, fraction=FRACTION),
        "rigl": lambda: RigL(**changing, fraction=FRACTION),
        "magnitude": lambda: Magnitude(**changing),
    }
    return makers[name]() if name in makers else None


def _model(task: Task, method: str, seed: int) -> Any:
    model = task.model(seed)
    if method != "small dense":
        return model
    biases = sum(item.numel() for item in model.parameters() if item.dim() == 1)
    connections = task.density * sum(item.numel() for item in model.parameters() if item.dim() > 1)
    return task.model(seed, task.small_widths(round(connections) + biases))


# The parent ----------------------------------------------------------------------------------------------------------


def measure(asked: Child | Group, task: str, method: str, options: Any, **how: Any) -> Row:
    """One row: the mean over seeds."""
    row: Row = {"task": task, "method": method, **how}
    runs: list[Row] = []
    for seed in range(how.get("seeds", options.seeds)):
        message = {"task": task, "method": method, "seed": seed, "steps": options.steps, "dtype": "float32",
                   "workers": 1, "processes": 1, **how}  # fmt: skip
        reply = asked.ask(message, options.timeout)
        found = reply if isinstance(reply, list) else [reply]
        failed = [one for one in found if "error" in one]
        if failed:
            return {**row, "errors": f"{failed[0]['error_type']}: {first_line(failed[0]['error'])}"}
        if any(one["masks"] != found[0]["masks"] for one in found):
            return {**row, "errors": "processes have different masks"}
        runs.append(found[0])
    for name in FIGURES:
        values = [run[name] for run in runs if name in run]
        if values:
            row[name] = statistics.fmean(values)
            row[f"{name}_by_seed"] = values
    row["deviation"] = statistics.pstdev(run.get("score", run.get("recall")) for run in runs)
    row["num_parameters"] = round(statistics.fmean(run["num_parameters"] for run in runs))
    row["step_time_s"] = statistics.median(run["step_time_s"] for run in runs)
    row["masks"] = [run["masks"] for run in runs]
    return row


def repeated(child: Child, options: Any) -> list[Row]:
    """One seed by one worker, by two, and by two processes."""
    rows = []
    with Group("benchmarks.connections", "train", num_processes=2) as group:
        for method, dtype in REPEATED:
            how: dict[str, Any] = {"dtype": dtype, "seeds": 1}
            found = [
                measure(child, REPEATED_TASK, method, options, **how, workers=1, processes=1),
                measure(child, REPEATED_TASK, method, options, **how, workers=2, processes=1),
                measure(group, REPEATED_TASK, method, options, **how, workers=1, processes=2),
            ]
            for row in found[1:]:
                row["same_masks"] = not row.get("errors") and row["masks"] == found[0].get("masks")
                row["same_score"] = row.get("score") == found[0].get("score")
            rows += found
    return rows


# Judgement -----------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """What must hold, and what of it does."""
    misses = [f"{row['task']}, {row['method']}: {row['errors']}" for row in rows if row.get("errors")]
    sound = [row for row in rows if not row.get("errors")]
    by_name = {(row["task"], row["method"]): row for row in sound if "workers" not in row}
    limits = {text: holds for text, holds in _limits(by_name).items() if holds is not None}
    misses += [f"must hold, but does not: {text}" for text, holds in limits.items() if not holds]
    for row in sound:
        is_same = row.get("same_masks", True) and row.get("same_score", True)
        if not is_same and row["dtype"] == "float64":
            misses.append(
                f"{row['task']}, {row['method']}, workers {row['workers']}, processes {row['processes']}: masks and "
                "score must be those of one worker, but are not"
            )
    return {"num_rows": len(rows), "holds": limits}, misses


def _limits(rows: Mapping[tuple[str, str], Row]) -> dict[str, bool | None]:
    """By what must hold, whether it does; None where rows for it are missing."""

    def of(task: str, method: str, figure: str = "score") -> float:
        return float(rows[task, method][figure])

    few, fewer, noisy = "digits, 90 %", "digits, 97 %", "noisy digits, 98 %"
    claims = {
        "digits, 90 %: RigL >= 96.5": lambda: of(few, "rigl") >= 96.5,
        "digits, 90 %: static <= RigL - 0.7": lambda: of(few, "static") <= of(few, "rigl") - 0.7,
        "digits, 97 %: RigL >= 89": lambda: of(fewer, "rigl") >= 89,
        "digits, 97 %: SET >= 70": lambda: of(fewer, "set") >= 70,
        "digits, 97 %: static <= 60": lambda: of(fewer, "static") <= 60,
        "teacher: precision and recall of RigL >= 0.97": lambda: (
            min(of("teacher", "rigl", "precision"), of("teacher", "rigl", "recall")) >= 0.97
        ),
        "teacher: precision of static <= 0.05": lambda: of("teacher", "static", "precision") <= 0.05,
        "noisy digits: RigL >= dense + 10": lambda: of(noisy, "rigl") >= of(noisy, "dense") + 10,
        "noisy digits: RigL's inputs are pixels more often than static ones": lambda: (
            of(noisy, "rigl", "real_inputs") > of(noisy, "static", "real_inputs")
        ),
    }
    found: dict[str, bool | None] = {}
    for text, holds in claims.items():
        try:
            found[text] = holds()
        except KeyError:
            found[text] = None
    return found


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--tasks", default=";".join(TASKS), metavar="A;B", help="only these, by name")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="A,B", help="only these, by name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-repeats", action="store_true", help="without the rows of several workers and processes")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one training")
    options = parser.parse_args()
    if options.child:
        serve(Worker())
        return 0
    settings = {
        "seeds": options.seeds, "steps": options.steps, "optimizer": "Adam", "until": UNTIL, "every": EVERY,
        "fraction": FRACTION, "distribution": "erk", "lr": {name: task.lr for name, task in TASKS.items()},
    }  # fmt: skip
    report = Report("connections", settings, path=options.json)
    with Child("benchmarks.connections", "train") as child:
        for task in options.tasks.split(";"):
            for method in options.methods.split(","):
                if method == "small dense" and task == "teacher":
                    continue  # it has no hidden layers to be smaller
                report.add(measure(child, task, method, options))
                print(f"{task}, {method}: {report.rows[-1]}", file=sys.stderr, flush=True)
        if not options.no_repeats:
            try:
                for row in repeated(child, options):
                    report.add(row)
            except ChildError as error:
                report.add({"task": REPEATED_TASK, "method": "repeated", "errors": first_line(error)})
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
