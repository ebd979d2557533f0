"""`partita show plan.json`: what a plan does and why, how two plans differ, and what would help most."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from partita.cli.output import print_json
from partita.cli.plan import task_of
from partita.cli.target import Target, load_cluster
from partita.errors import InputError
from partita.plan import Constraints, Plan
from partita.units import format_time


def show(
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")],
    /,
    *,
    explain: bool = False,
    diff: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None,
    why: Annotated[str | None, tyro.conf.arg(metavar="MODULE")] = None,
    what_helps: bool = False,
    target: Annotated[str | None, tyro.conf.arg(metavar="TARGET")] = None,
    config: Path | None = None,
    global_batch: int | None = None,
    seq: int | None = None,
    cluster: Annotated[str | None, tyro.conf.arg(metavar="FILE|PRESET")] = None,
    json: bool = False,
) -> int:
    """What a saved plan does: its split, workers, prediction; with --explain also why, and what else was considered.

    Args:
        path: the plan file.
        explain: print the long explanation.
        diff: another plan file: print only what differs.
        why: a module, parameter or op: how it is placed, the exchanges that this causes and, with the model (--target
            or --config, and --cluster), what every other placement would cost.
        what_helps: seconds that more memory, bandwidth or devices would save; needs the model and --cluster.
        target: file.py:function of the model that the plan was made for.
        config: or its config.json, with --global-batch and --seq.
        global_batch: with --config, sequences of one step.
        seq: with --config, tokens of a sequence.
        cluster: the cluster that the plan was made for; default: this machine.
        json: print JSON.
    """
    plan = Plan.load(path)
    if (diff is not None) + (why is not None) + what_helps > 1:
        raise InputError("give one of --diff, --why and --what-helps, but got several.")
    task = task_of(target, config, global_batch, seq) if target is not None or config is not None else None
    if diff is not None:
        text = plan.diff(Plan.load(diff))
        if json:
            print_json({"same": not text, "differences": text.splitlines()})
        else:
            print(text or "the plans are equal")
    elif why is not None:
        found = _why(plan, task, cluster, why)
        print_json(found) if json else print(found)
    elif what_helps:
        helps = _what_helps(plan, task, cluster)
        if json:
            print_json(helps)
        else:
            for one in helps:
                print(f"{one.change}: saves {format_time(one.saved_s)} a step "
                      f"(at most {format_time(one.saved_at_most_s)}): {one.way}")  # fmt: skip
    elif json:
        sys.stdout.write(plan.to_json().decode() + "\n")
    else:
        print(plan.explain() if explain else str(plan))
    return 0


def _why(plan: Plan, task: Target | None, cluster: str | None, name: str) -> Any:
    if task is None:
        from partita.planner.why import why_in_plan

        return why_in_plan(plan, name)
    where = load_cluster(cluster)
    if plan.layout is not None:
        from partita.cost.networks import Fabric
        from partita.planner.scale.why import why_at_scale
        from partita.training.described import described_planner

        plan.validate(None, where)
        planner = described_planner(task.model, task.loss_fn, task.batch, task.optimizer)
        return why_at_scale(plan, planner, Fabric.of_cluster(where), name)
    from partita.graph import capture
    from partita.training.why import why_here

    return why_here(plan, capture(task.model, task.loss_fn, task.batch), where, task.optimizer, name)


def _what_helps(plan: Plan, task: Target | None, cluster: str | None) -> Any:
    if task is None:
        raise InputError(
            "--what-helps plans again, which needs the model: add --target file.py:function (or --config FILE "
            "--global-batch N), and --cluster as the plan was made with."
        )
    where = load_cluster(cluster)
    if plan.layout is not None:
        from partita.cost.networks import Fabric
        from partita.planner.scale.helps import what_helps
        from partita.training.described import described_planner

        plan.validate(None, where)
        planner = described_planner(task.model, task.loss_fn, task.batch, task.optimizer)
        if planner.fingerprint != plan.graph_fingerprint:
            raise InputError("the plan must be of the given model and batch, but is of another. Give its own target.")
        assert plan.prediction is not None
        return what_helps(planner, Fabric.of_cluster(where), plan.prediction.step_time_s)
    from partita.graph import capture
    from partita.training.why import what_helps_here

    graph = capture(task.model, task.loss_fn, task.batch)
    return what_helps_here(plan, graph, where, task.optimizer, Constraints())
