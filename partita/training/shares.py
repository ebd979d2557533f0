"""How a plan shares the rows of a batch over its data coordinates, and the same plan with other shares."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from partita.plan import Plan
from partita.units import proportional, split_evenly


def columns_of(plan: Plan) -> list[tuple[int, ...]]:
    """The processes of each data coordinate."""
    found: list[set[int]] = [set() for _ in range(plan.axes.get("data", 1))]
    for worker in plan.workers:
        found[worker.data].add(worker.process)
    return [tuple(sorted(ranks)) for ranks in found]


def can_move(plan: Plan) -> bool:
    """Whether other shares could relieve a process: not if all coordinates have the same ones."""
    return plan.mode == "graph" and len(set(columns_of(plan))) > 1


def shares_of(plan: Plan, num_rows: int) -> tuple[int, ...]:
    """The rows of each data coordinate."""
    return plan.shares or split_evenly(num_rows, plan.axes.get("data", 1))


def unit_of(plan: Plan, num_rows: int) -> int:
    """Rows that are dealt together: one of every microbatch, where these are equal."""
    equal = all(rows % plan.num_microbatches == 0 for rows in shares_of(plan, num_rows))
    return plan.num_microbatches if equal else 1


def with_shares(plan: Plan, shares: Sequence[int]) -> Plan:
    """The plan with other shares, or ones in their proportion where it is for another number of rows. What was
    predicted and measured of it holds no longer."""
    num_rows = sum(plan.shares) or sum(shares)
    exact = tuple(shares) if num_rows == sum(shares) else proportional(num_rows, tuple(shares))
    head = "rows are dealt by the measured speeds of the processes"
    reasons = [reason for reason in plan.reasons if not reason.startswith(head)]
    told = f"{head}: {', '.join(map(str, exact))}"
    return msgspec.structs.replace(
        plan, shares=exact, prediction=None, measured_step_time_s=None, reasons=(*reasons, told)
    )
