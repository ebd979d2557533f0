"""`partita plan TARGET`: the fastest plan for a model, on this machine or on a described cluster."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from partita.cli.output import is_first
from partita.cli.target import load_cluster, load_target
from partita.plan import Constraints

FIXED = Constraints()


def plan(
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    /,
    *,
    cluster: Annotated[str | None, tyro.conf.arg(metavar="FILE|PRESET")] = None,
    out: str | None = None,
    explain: bool = False,
    constraints: Annotated[Constraints, tyro.conf.arg(name="")] = FIXED,
    json: bool = False,
) -> int:
    """The plan that is predicted to be fastest for a model; nothing is trained.

    Args:
        target: file.py:function that returns (model, loss_fn, batch[, optimizer]).
        cluster: a TOML file or a preset; default: this machine, or all machines of the running job.
        out: save the plan to this file.
        explain: print the long explanation.
        constraints: corners of the plan space to fix.
        json: print the plan as JSON.
    """
    import partita

    where = load_cluster(cluster)
    task = load_target(target)
    found = partita.plan(
        task.model, task.loss_fn, task.batch, optimizer=task.optimizer, cluster=where, constraints=constraints
    )
    if not is_first():
        return 0
    if out is not None:
        found.save(out)
    if json:
        sys.stdout.write(found.to_json().decode() + "\n")
    else:
        print(found.explain() if explain else str(found))
        if out is not None:
            print(f"saved to {out}")
    return 0
