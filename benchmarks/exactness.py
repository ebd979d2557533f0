"""Planner solvers held against exhaustive enumeration, on random small instances.

    python -m benchmarks.exactness --json benchmarks/results/exactness.json --check

Every kind of instance in `KINDS` is drawn ``--num`` times. A row is **equal** if the solver's objective is the best of
all assignments (or both say that none is feasible), **integral** if the linear relaxation was whole already. ``gap`` is
what the solver certifies; ``bound_holds`` says that its lower bound is not above the optimum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks import inter_cases
from benchmarks.common import Report, Row, describe_machine, option_parser, show
from benchmarks.intra_cases import best_by_enumeration, num_assignments, random_problem
from partita.errors import InfeasibleError
from partita.planner.inter import InterProblem, solve_inter
from partita.planner.inter.price import price_inter
from partita.planner.intra import solve_intra

TOLERANCE = 1e-6  # relative
HEALTH = list(HealthCheck)
COLUMNS = ("kind", "num", "equal", "infeasible", "integral", "largest_gap", "largest_difference", "solve_s")


def intra_row(seed: int) -> Row:
    """One instance of the intra-stage solver."""
    problem = random_problem(seed)
    best = best_by_enumeration(problem)
    started_s = time.perf_counter()
    try:
        solution = solve_intra(problem)
    except InfeasibleError:
        solution = None
    row = compare(best, None if solution is None else solution.objective_s, time.perf_counter() - started_s)
    facts = {
        "num_assignments": num_assignments(problem),
        "memory_bytes": problem.memory_bytes,
        "recomputes": solution is not None and any(solution.assignment.recompute),
        "integral": solution is None or solution.integral,
        "gap": 0.0 if solution is None else solution.gap,
        "bound_holds": solution is None or best is None or solution.lower_bound_s <= best * (1 + TOLERANCE),
    }
    return {**row, **facts}


def compare(best: float | None, found: float | None, solve_s: float) -> Row:
    """What every kind of row has: the two objectives (None: infeasible), and whether they are equal."""
    both = best is not None and found is not None
    difference = abs(found - best) / max(abs(best), TOLERANCE) if best is not None and found is not None else None
    equal = difference is not None and difference <= TOLERANCE if both else best is None and found is None
    return {"best": best, "found": found, "equal": equal, "difference": difference, "solve_s": solve_s}


def inter_row(seed: int) -> Row:
    """One instance of the inter-stage solver; its answer is priced anew by `price_inter`."""
    strategy = inter_cases.long_pipelines() if seed % 3 == 0 else inter_cases.problems()
    problem = drawn(strategy, seed)
    best = inter_cases.best_by_enumeration(problem)
    started_s = time.perf_counter()
    try:
        solution = solve_inter(problem, time_limit_s=600)
    except InfeasibleError:
        solution = None
    row = compare(best, None if solution is None else solution.objective_s, time.perf_counter() - started_s)
    priced = None if solution is None else price_inter(problem, solution)
    anew = priced is None or (not priced.broken and priced.objective_s <= row["found"] * (1 + TOLERANCE))
    facts = {
        "num_ops": problem.num_ops,
        "num_devices": len(problem.devices),
        "integral": False,
        "gap": 0.0 if solution is None else solution.gap,
        "bound_holds": solution is None or best is None or solution.lower_bound_s <= best * (1 + TOLERANCE),
    }
    return {**row, **facts, "equal": row["equal"] and anew}


def drawn(strategy: st.SearchStrategy[InterProblem], seed: int) -> InterProblem:
    """The instance of a seed (the second draw: the first one is always the simplest)."""
    found: list[InterProblem] = []

    @hypothesis.seed(seed)
    @settings(max_examples=2, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=HEALTH)
    @given(strategy)
    def collect(problem: InterProblem) -> None:
        found.append(problem)

    collect()
    return found[-1]


KINDS: dict[str, Callable[[int], Row]] = {"intra": intra_row, "inter": inter_row}
"""Kind of instance -> the row of a seed: that of `compare` with ``integral``, ``gap`` and ``bound_holds``."""


def summarise(rows: list[Row]) -> list[Row]:
    """One line for each kind."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        found.append(
            {
                "kind": kind,
                "num": len(mine),
                "equal": sum(row["equal"] for row in mine),
                "infeasible": sum(row["best"] is None for row in mine),
                "integral": sum(row["integral"] for row in mine),
                "largest_gap": max(row["gap"] for row in mine),
                "largest_difference": max((row["difference"] or 0.0) for row in mine),
                "solve_s": sum(row["solve_s"] for row in mine),
                "bounds_hold": all(row["bound_holds"] for row in mine),
            }
        )
    return found


def misses_of(rows: list[Row]) -> list[str]:
    return [
        f"{row['kind']} {row['seed']}: the optimum is {row['best']}, but the solver says {row['found']}"
        for row in rows
        if not row["equal"] or not row["bound_holds"]
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--num", type=int, default=300, help="instances of each kind")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    options = parser.parse_args(arguments)
    facts: dict[str, Any] = {"num": options.num, "first": options.first, "tolerance": TOLERANCE}
    report = Report("exactness", facts, path=options.json, machine=describe_machine())
    for kind, row_of in KINDS.items():
        for seed in range(options.first, options.first + options.num):
            report.rows.append({"kind": kind, "seed": seed, **row_of(seed)})
    lines = summarise(report.rows)
    report.finish({line["kind"]: line for line in lines}, misses_of(report.rows))
    show(Report("exactness", facts, rows=lines, misses=report.misses, machine=report.machine), COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    raise SystemExit(main())
