"""`partita diff A B`: how two plans differ, with their predicted times."""

from __future__ import annotations

from typing import Annotated

import tyro

from partita.cli.output import print_json
from partita.plan import Plan


def diff(
    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")],
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")],
    /,
    *,
    json: bool = False,
) -> int:
    """What differs between two saved plans: split, predicted time and memory, and what decides what runs.

    Args:
        first: a plan file.
        second: another plan file.
        json: print JSON.
    """
    from partita.planner.describe import comparison

    one, two = Plan.load(first), Plan.load(second)
    text = comparison(one, two)
    if not json:
        print(text or "the plans are equal")
        return 0
    times = [plan.prediction.step_time_s if plan.prediction is not None else None for plan in (one, two)]
    print_json(
        {
            "same": one == two,
            "same_run": one.hash == two.hash,
            "predicted_step_time_s": times,
            "differences": text.splitlines(),
            "fields": one.diff(two).splitlines(),
        }
    )
    return 0
