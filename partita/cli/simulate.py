"""`partita simulate TARGET`: one training step in virtual time, worker by worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import tyro

from partita.cli.output import print_json, table
from partita.cli.target import load_cluster, load_target
from partita.errors import InputError
from partita.plan import Plan
from partita.units import format_bytes, format_time

if TYPE_CHECKING:
    from partita.program.timeline import Timeline


def simulate(
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    /,
    *,
    plan: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    cluster: Annotated[str | None, tyro.conf.arg(metavar="FILE|PRESET")] = None,
    json: bool = False,
) -> int:
    """One training step in virtual time: per worker, how long it computes, exchanges and waits, and its memory.

    Args:
        target: file.py:function that returns (model, loss_fn, batch[, optimizer]).
        plan: a plan file; default: the plan predicted to be fastest.
        cluster: a TOML file or a preset; default: this machine, or all machines of the running job.
        json: print the timeline, every instruction of it, as JSON.
    """
    if target.endswith(".json"):
        raise InputError(
            f"simulate needs the model, which a plan does not hold, but got only {target!r}. "
            f"Use `partita simulate file.py:function --plan {target}`."
        )
    where = load_cluster(cluster)
    task = load_target(target)
    chosen, timeline = _simulate(task, Plan.load(plan) if plan is not None else None, where)
    if json:
        print_json({"plan": chosen.hash, "timeline": timeline})
        return 0
    print(chosen)
    print()
    print(report(chosen, timeline))
    return 0


def _simulate(task: Any, plan: Plan | None, cluster: Any) -> tuple[Plan, Timeline]:
    from partita.cost.table import CostTable
    from partita.graph import capture
    from partita.plan import Constraints
    from partita.training.optimizers import OptimizerFacts
    from partita.training.planning import Evaluator, best_plan

    graph = capture(task.model, task.loss_fn, task.batch)
    if plan is None:
        plan = best_plan(graph, cluster, Constraints(), task.optimizer)
    plan.validate(graph, cluster)
    if plan.layout is not None:
        raise InputError(
            "simulate runs the programs of single workers, but a plan for described GPUs has stages of blocks only. "
            "`partita show` prints its prediction."
        )
    if plan.mode != "graph":
        raise InputError(
            'simulate needs a plan of mode "graph", but this one runs plain PyTorch as one block, whose only '
            "prediction is its step time. `partita show` prints it; constraints of `partita plan` force a graph plan."
        )
    evaluate = Evaluator(graph, cluster, CostTable(cluster), OptimizerFacts.of(task.optimizer))
    return plan, evaluate(plan)


def report(plan: Plan, timeline: Timeline) -> str:
    """Per worker: time in ops, in exchanges and idle, and the peak of its values; per process: its shared memory."""
    rows: list[tuple[object, ...]] = []
    for worker in plan.workers:
        busy_s = timeline.busy_time_s(worker.index)
        events = timeline.of_worker(worker.index)
        exchange_s = timeline.exposed_time_s(worker.index)
        idle_s = max(0.0, timeline.step_time_s - busy_s - exchange_s)
        peak = timeline.peak_memory_bytes.get(worker.index)
        share = f"{busy_s / timeline.step_time_s:.0%}" if timeline.step_time_s > 0 else "-"
        rows.append(
            (
                f"worker {worker.index}",
                format_time(busy_s),
                share,
                format_time(exchange_s),
                format_time(idle_s),
                "-" if peak is None else format_bytes(peak),
                len(events),
            )
        )
    titles = ("", "computes", "busy", "exchanges", "idle", "peak values", "instructions")
    lines = [table(rows, titles=titles), "", f"step {format_time(timeline.step_time_s)}, "
             f"{format_bytes(timeline.bytes_sent)} sent between processes"]  # fmt: skip
    for process, num_bytes in sorted(timeline.shared_memory_bytes.items()):
        lines.append(
            f"process {process}: {format_bytes(num_bytes)} of weights, batch and optimizer state, "
            f"{format_bytes(timeline.step_memory_bytes.get(process, 0))} more at the peak of a step"
        )
    return "\n".join(lines)
