"""How many model families are captured as a graph, and whether all of them train.

    python -m benchmarks.coverage --json benchmarks/results/coverage.json --check

For every family: the seconds and ops of its capture, or the reason why it falls back to one block; then three steps
with one uncompiled worker. A family trains if all three losses are finite and equal those of plain PyTorch.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks import families
from benchmarks.common import Report, Row, describe_machine, first_line, option_parser, show
from benchmarks.families import Family
from benchmarks.processes import Child, ChildError, Message, serve
from partita.errors import CaptureError, PartitaError
from partita.graph import capture

LEAST_CAPTURED_SHARE, LEAST_FAMILIES, LEAST_TRANSFORMERS = 0.95, 30, 20
NUM_STEPS = 3
LOSS_TOLERANCE = 1e-4
COLUMNS = ("family", "kind", "captured", "capture_time_s", "num_ops", "trains", "loss_difference", "reason")


def examine(name: str) -> Row:
    """One row of the table: capture and training of the family `name`, on one thread."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    family = families.get(name)
    return {"family": name, "kind": family.kind, "source": family.source, **_capture(family), **_train(family)}


def _capture(family: Family) -> Row:
    import torch

    task = family.task()
    torch.manual_seed(0)
    start_s = time.perf_counter()
    try:
        graph = capture(task.model, task.loss_fn, task.batches(0))
    except CaptureError as error:
        return {"captured": False, "reason": first_line(error), "op": error.op, "line": error.source}
    capture_time_s = time.perf_counter() - start_s
    return {"captured": True, "capture_time_s": capture_time_s, "num_ops": sum(1 for _ in graph.ops())}


def _train(family: Family) -> Row:
    import torch

    expected = plain_losses(family, "SGD", NUM_STEPS)
    task = family.task()
    batches = [task.batches(index) for index in range(NUM_STEPS)]
    constraints = partita.Constraints(num_workers=1, compiled=False)
    optimizer = families.make_optimizer("SGD", task)
    losses = []
    try:
        with partita.parallelize(task.model, optimizer, task.loss_fn, batches[0], plan=constraints) as step:
            for index, batch in enumerate(batches):
                torch.manual_seed(index)
                losses.append(float(step(batch).loss))
            mode = step.plan.mode
    except PartitaError as error:
        return {"trains": False, "training_error": f"{type(error).__name__}: {first_line(error)}"}
    difference = largest_difference(losses, expected)
    trains = all(math.isfinite(loss) for loss in losses) and difference <= LOSS_TOLERANCE
    return {"trains": trains, "mode": mode, "losses": losses, "loss_difference": difference}


def plain_losses(family: Family, optimizer_name: str, num_steps: int) -> list[float]:
    """Losses of the ordinary training loop, seeded before every step with its index."""
    import torch

    task = family.task()
    optimizer = families.make_optimizer(optimizer_name, task)
    losses = []
    for index in range(num_steps):
        torch.manual_seed(index)
        optimizer.zero_grad()
        loss = task.loss_fn(task.model, task.batches(index))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference of two courses of losses; infinite where one is not finite."""
    pairs = list(zip(losses, expected, strict=True))
    if not all(math.isfinite(one) and math.isfinite(two) for one, two in pairs):
        return math.inf
    return max(abs(one - two) / max(abs(two), 1e-3) for one, two in pairs)


def summarise(rows: list[Row]) -> tuple[dict[str, Any], list[str]]:
    """Counts and shares, and the limits that are missed."""
    captured = sum(bool(row.get("captured")) for row in rows)
    summary = {
        "num_families": len(rows),
        "num_transformers": sum(row.get("source") == "transformers" for row in rows),
        "num_captured": captured,
        "captured_share": captured / len(rows) if rows else 0.0,
        "num_training": sum(bool(row.get("trains")) for row in rows),
    }
    misses = [
        f"{row['family']} does not train: {row.get('training_error', '')}" for row in rows if not row.get("trains")
    ]
    for name, least in (
        ("captured_share", LEAST_CAPTURED_SHARE),
        ("num_families", LEAST_FAMILIES),
        ("num_transformers", LEAST_TRANSFORMERS),
    ):
        if summary[name] < least:
            misses.append(f"{name} must be at least {least}, but is {summary[name]}")
    return summary, misses


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for one family")
    options = parser.parse_args()
    if options.child:
        serve(lambda message: examine(message["family"]))
        return 0
    settings = {"num_steps": NUM_STEPS, "scale": "tiny", "loss_tolerance": LOSS_TOLERANCE}
    report = Report("coverage", settings, path=options.json, machine=describe_machine())
    child: Child | None = None
    for family in families.select(options.families):
        child = child or Child("benchmarks.coverage", "family")
        row: Message
        try:
            row = child.ask({"family": family.name}, options.timeout)
        except ChildError as error:
            row = {"error": str(error), "error_type": "ChildError"}
            child.close()
            child = None
        if "error" in row:
            reason = f"{row['error_type']}: {first_line(row['error'])}"
            row = {"family": family.name, "kind": family.kind, "source": family.source, "reason": reason, **row}
        report.add(row)
        print(f"{family.name}: captured {row.get('captured')}, trains {row.get('trains')}", file=sys.stderr, flush=True)
    if child is not None:
        child.close()
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
