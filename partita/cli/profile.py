"""`partita profile`: measure this machine (and a model's ops on it) once, for all plans that follow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from partita.cli.output import is_first, print_json, table
from partita.units import format_bytes, format_time

if TYPE_CHECKING:
    from partita.cluster.measure import Profile
    from partita.cluster.model import Link


def profile(
    target: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TARGET]")] = None,
    /,
    *,
    again: bool = False,
    budget_s: float = 60.0,
    from_runs: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Measure this machine: arithmetic, memory, threads, links. Kept in the cache; under ten seconds. Under torchrun,
    mpirun or srun the network between the machines is measured as well.

    Args:
        target: also measure the ops of this model (file.py:function).
        again: measure even if the cache has it.
        budget_s: limit for measuring the target's ops, in seconds.
        from_runs: measure nothing; fit the constants of described GPUs to the measured training runs in this JSON file.
        out: write those constants here instead of the cache.
        json: print the figures as JSON.
    """
    if from_runs is not None:
        from partita.cli.from_runs import calibrate

        return calibrate(from_runs, out, json=json)
    from partita.cluster.measure import profile as measure

    found = measure(again=again)
    ops = _measure_target(target, budget_s) if target is not None else None
    if not is_first():
        return 0
    if found.is_disturbed:
        print(
            f"partita: warning: other programs kept {found.busy_cores:.1f} of {found.num_cores} cores busy while this "
            "was measured, so the rates are too low. Measure again when they have ended: partita profile --again.",
            file=sys.stderr,
        )
    if json:
        print_json({"machine": found} if ops is None else {"machine": found, "target": ops})
        return 0
    rows = _rows(found)
    if ops is not None:
        rows.append(("ops measured now", f"{ops['num_measured']} of {ops['num_ops']} ({target}); the others are known "
                                         "or repeat"))  # fmt: skip
    print(table(rows))
    return 0


def _rows(found: Profile) -> list[tuple[str, str]]:
    rows = [
        ("float32, one core", f"{found.flops_per_s_one_core / 1e9:.1f} GFLOP/s"),
        ("float32, per core with all busy", f"{found.flops_per_s_per_core / 1e9:.1f} GFLOP/s"),
        ("memory, one core", f"{found.memory_bytes_per_s_one_core / 1e9:.1f} GB/s"),
        ("memory, all cores", f"{found.memory_bytes_per_s / 1e9:.1f} GB/s"),
        ("thread hand-over", format_time(found.handover_s)),
    ]
    for entry in found.all_reduce:
        name = f"sum of {entry.num_workers} x {format_bytes(entry.num_bytes)} by threads"
        rows.append((name, format_time(entry.time_s)))
    rows.append(("between processes", _link(found.process_link)))
    rows.append(("between machines", _link(found.network)))
    rows.append(("measured in", format_time(found.time_s)))
    return rows


def _link(link: Link | None) -> str:
    if link is None:
        return "not measured: run this verb with the job's launcher on two machines"
    return f"{link.bytes_per_s / 1e9:.2f} GB/s, latency {format_time(link.latency_s)}"


def _measure_target(target: str, budget_s: float) -> dict[str, Any]:
    from partita.cli.target import load_target
    from partita.cluster import Cluster
    from partita.cost.table import CostTable
    from partita.graph import capture

    task = load_target(target)
    graph = capture(task.model, task.loss_fn, task.batch)
    cluster = Cluster.detect()
    cost = CostTable(cluster)
    cores = cluster.processes[0].cores
    counts = sorted({1, len(cores)})
    measured = sum(cost.measure([graph.module], cores[:count], budget_s=budget_s / len(counts)) for count in counts)
    return {"target": target, "num_ops": len(graph.nodes) * len(counts), "num_measured": measured}
