"""`partita show plan.json`: what a plan does, and how two plans differ."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from partita.cli.output import print_json
from partita.plan import Plan


def show(
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")],
    /,
    *,
    explain: bool = False,
    diff: Annotated[str | None, tyro.conf.arg(metavar="PLAN")] = None,
    json: bool = False,
) -> int:
    """What a saved plan does: its split, workers, prediction; with --explain also why, and what else was considered.

    Args:
        path: the plan file.
        explain: print the long explanation.
        diff: another plan file: print only what differs.
        json: print JSON.
    """
    plan = Plan.load(path)
    if diff is not None:
        text = plan.diff(Plan.load(diff))
        if json:
            print_json({"same": not text, "differences": text.splitlines()})
        else:
            print(text or "the plans are equal")
        return 0
    if json:
        sys.stdout.write(plan.to_json().decode() + "\n")
    else:
        print(plan.explain() if explain else str(plan))
    return 0
