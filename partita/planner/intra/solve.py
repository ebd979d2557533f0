"""`solve_intra`: the fastest way to run a stage within its memory, with a proof.

1. Without the limit nothing is recomputed: running ops again never saves time, because h <= 1 and because a value can
   always be saved as it is given (unless ties of saved values forbid it). So the programme without recomputation and
   memory is solved first. If its answer fits, it is the answer.
2. Else the whole programme; memory rows are added for the points in time at which a solution breaks the limit, until
   none does (a cutting plane: each relaxation is a lower bound).

In both, the linear relaxation comes first; if its solution is whole, it is optimal. Else HiGHS branches and bounds.
Every answer is priced by `partita.planner.intra.price`: a mismatch is an error, and what breaks the limit by less than
HiGHS' tolerance is cut off.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from partita.errors import InfeasibleError, SolverError
from partita.planner.intra.linear import INFINITY, Floats, Outcome, Solver
from partita.planner.intra.model import IntraModel
from partita.planner.intra.price import Priced, price
from partita.planner.intra.problem import Assignment, IntraProblem
from partita.planner.intra.timetable import Timetable, make_timetable
from partita.units import GIB, format_bytes, gap_of

WHOLE = 1e-6  # binaries this near to 0 or 1 are whole
TOLERANCE = 1e-5  # relative difference between HiGHS' objective and ours that rounding explains
MAX_NEW_ROWS = 8
LEAST_PEAK_S = 10.0  # at least so long is the smallest limit looked for
TYPICAL = 1000.0  # what the objective is scaled to


@dataclass(frozen=True)
class IntraSolution:
    """The decisions, and how good they are.

    Attributes:
        assignment: choice per op and input, recomputation per block, placement of saved values.
        priced: our own price of it; ``objective_s`` and ``peak_bytes`` are its figures.
        lower_bound_s: no assignment that fits is faster.
        gap: ``(objective - lower bound) / objective``.
        status: "optimal" (gap at most 1e-6), or "limit" (the time was up).
        relaxation_s: optimum of the linear relaxation; ``integral``: whether its solution was whole.
    """

    assignment: Assignment
    priced: Priced
    lower_bound_s: float
    gap: float
    status: str
    relaxation_s: float
    integral: bool

    @property
    def objective_s(self) -> float:
        return self.priced.time_s

    @property
    def peak_bytes(self) -> int:
        return self.priced.peak_bytes


def solve_intra(problem: IntraProblem, *, time_limit_s: float = 60.0) -> IntraSolution:
    """The fastest assignment that fits.

    Raises:
        InfeasibleError: none fits the memory (names the smallest limit that works), or conversions are missing.
        SolverError: HiGHS' answer does not cost what HiGHS says.
    """
    end_s = time.monotonic() + time_limit_s
    table = make_timetable(problem)
    limit = problem.memory_bytes
    if _can_save_as_given(problem, table):
        first = _Search(problem, table, recompute=False, limit=None, end_s=end_s)
        relaxed = first.relax()
        if relaxed is None:
            raise first.failure()
        if limit is None or first.peak_of(relaxed) <= limit * (1 + WHOLE):
            solution = first.finish(relaxed)
            if solution is not None and (limit is None or solution.peak_bytes <= limit):
                return solution
            if limit is None:
                raise first.failure()
    second = _Search(problem, table, recompute=True, limit=limit, end_s=end_s)
    relaxed = second.relax()
    solution = second.finish(relaxed) if relaxed is not None else None
    if solution is None and not second.proven_infeasible:
        solution = second.take_smallest()
    if solution is None:
        raise second.failure()
    return solution


def _can_save_as_given(problem: IntraProblem, table: Timetable) -> bool:
    """Whether inner values that are saved alike are always given alike, so that each can be saved as it is given."""
    first: dict[Hashable, tuple[Hashable, tuple[int, ...]]] = {}
    for value in table.saved:
        tie, block, source = problem.values[value].tie, table.inner[value], table.producer[value]
        if tie is None or block is None or source is None:
            continue
        op = problem.ops[source[0]]
        given = (op.tie or ("op", source[0]), tuple(choice.outputs[source[1]] for choice in op.choices))
        if first.setdefault((tie, table.block_class[block]), given) != given:
            return False
    return True


def smallest_peak(problem: IntraProblem, *, time_limit_s: float = 60.0) -> tuple[int, int]:
    """``(peak bytes that an assignment reaches, proven lower bound)``: the smallest memory limit that works."""
    table = make_timetable(problem)
    return _smallest_peak(problem, table, time.monotonic() + time_limit_s)


def memory_price_s_per_gib(problem: IntraProblem, solution: IntraSolution, *, time_limit_s: float = 60.0) -> float:
    """Seconds that a step would be faster with one GiB more per worker (at least 0), solved anew."""
    if problem.memory_bytes is None:
        return 0.0
    more = replace(problem, memory_bytes=problem.memory_bytes + GIB)
    return max(0.0, solution.objective_s - solve_intra(more, time_limit_s=time_limit_s).objective_s)


class _Search:
    """One programme, with memory rows as they are needed."""

    def __init__(
        self, problem: IntraProblem, table: Timetable, *, recompute: bool, limit: int | None, end_s: float
    ) -> None:
        self.problem, self.table, self.limit, self.end_s = problem, table, limit, end_s
        self.model = IntraModel(problem, table, recompute=recompute)
        self.solver = Solver(self.model.linear, scale=TYPICAL / _typical_s(problem))
        self.proven_infeasible = False
        self._rows: set[int] = set()
        self._bound = -INFINITY
        self._relaxation_s = -INFINITY
        self._best: tuple[Assignment, Priced] | None = None

    def peak_of(self, values: Floats) -> float:
        return float(self.model.memory_of(values).max(initial=0.0))

    def relax(self) -> Floats | None:
        """A solution of the linear relaxation that keeps the limit; None if there is none (or the time is up)."""
        while True:
            outcome = self.solver.run(integer=False, limit_s=self.end_s - time.monotonic())
            if outcome.values is None:
                self.proven_infeasible |= outcome.status == "infeasible"
                return None
            self._bound = self._relaxation_s = max(self._bound, outcome.bound)
            if not self._add_rows(outcome.values):
                return outcome.values

    def failure(self) -> InfeasibleError:
        """Why there is no solution."""
        if not self.proven_infeasible:
            return InfeasibleError("an assignment must be found, but the time limit came first; raise it")
        if self.limit is None:
            return InfeasibleError(
                "every value must be convertible from a placement that its op gives to one that each reader wants, but "
                "no choice of placements is; add conversions or choices"
            )
        return _does_not_fit(self.problem, self.table, self.end_s)

    def _add_rows(self, values: Floats) -> bool:
        """Add memory rows for the points at which `values` break the limit; whether there are new ones."""
        if self.limit is None:
            return False
        memory = self.model.memory_of(values)
        over = [int(step) for step in np.argsort(-memory, kind="stable") if memory[step] > self.limit * (1 + 1e-9)]
        new: list[int] = []
        for step in over:
            if step not in self._rows and all(abs(step - other) > len(memory) // 50 for other in new):
                new.append(step)
        for step in new[:MAX_NEW_ROWS]:
            self._rows.add(step)
            unit = max(self.limit, 1)
            self.model.linear.add_row(-INFINITY, self.limit / unit, self.model.memory_row(step, unit))
        return bool(new)

    def finish(self, relaxed: Floats) -> IntraSolution | None:
        """The best whole solution; None if there is none (or none is known when the time is up)."""
        binaries = relaxed[self.model.linear.integral]
        integral = bool(np.all(np.minimum(binaries, 1 - binaries) < WHOLE))
        if integral and self._take(relaxed, self._bound):
            return self._solution("optimal", integral)
        while True:
            outcome = self.solver.run(integer=True, limit_s=self.end_s - time.monotonic())
            if outcome.status == "infeasible":
                self.proven_infeasible = True
                return None
            self._bound = max(self._bound, outcome.bound)
            if outcome.values is None:
                break
            if self._take(outcome.values, outcome.objective if outcome.status == "optimal" else None):
                if outcome.status == "optimal":
                    return self._solution("optimal", integral)
                break
            if outcome.status == "limit":
                break
            if not self._add_rows(outcome.values):
                low, terms = self.model.exclusion(outcome.values)
                self.model.linear.add_row(low, INFINITY, terms)
        return self._solution("limit", integral) if self._best is not None else None

    def take_smallest(self) -> IntraSolution | None:
        """When the time is up without any solution: the assignment that takes the least memory, if it is found."""
        try:
            assignment, _ = _smallest_assignment(self.problem, self.table, time.monotonic() + LEAST_PEAK_S)
        except InfeasibleError:
            return None
        priced = price(self.problem, assignment, self.table)
        if self.limit is not None and priced.peak_bytes > self.limit:
            return None
        self._best = (assignment, priced)
        return self._solution("limit", False)

    def _take(self, values: Floats, claimed_s: float | None) -> bool:
        """Price a whole solution; whether it fits. Checks HiGHS' claim."""
        assignment = self.model.assignment(values)
        priced = price(self.problem, assignment, self.table)
        if self.limit is not None and priced.peak_bytes > self.limit:
            return False
        allowed_s = TOLERANCE * max(_typical_s(self.problem), claimed_s or 0.0)
        if claimed_s is not None and abs(priced.time_s - claimed_s) > allowed_s:
            raise SolverError(
                f"HiGHS' objective must be our price of its answer, but HiGHS says {claimed_s!r} s and the price is "
                f"{priced.time_s!r} s; please report this problem"
            )
        self._best = (assignment, priced)
        return True

    def _solution(self, status: str, integral: bool) -> IntraSolution:
        assert self._best is not None
        assignment, priced = self._best
        bound = min(self._bound, priced.time_s)
        gap = gap_of(priced.time_s, bound)
        return IntraSolution(assignment, priced, bound, gap, status, self._relaxation_s, integral)


def _typical_s(problem: IntraProblem) -> float:
    """A scale of the objective: the least time that ops and inputs take by themselves, or any time at all."""
    least = sum(min(choice.time_s for choice in op.choices) for op in problem.ops)
    least += sum(min(option.update_s for option in item.choices) for item in problem.inputs)
    conversions = (conversion for value in problem.values for conversion in value.conversions.values())
    most = max((conversion.time_s for conversion in conversions), default=0.0)
    return least * problem.num_microbatches or most or 1.0


def _smallest_peak(problem: IntraProblem, table: Timetable, end_s: float) -> tuple[int, int]:
    assignment, least = _smallest_assignment(problem, table, end_s)
    peak = price(problem, assignment, table).peak_bytes
    return peak, min(int(least), peak)


def _smallest_assignment(problem: IntraProblem, table: Timetable, end_s: float) -> tuple[Assignment, float]:
    """The assignment that takes the least memory, and a proven lower bound of its peak (memory rows as needed)."""
    model = IntraModel(problem, table, recompute=True)
    peak = model.linear.add_column()
    unit = float(max(1, *_peaks(problem)))
    solver = Solver(model.linear, costs={peak: 1.0}, scale=TYPICAL)
    rows: set[int] = set()
    integer, least = False, 0.0
    while True:
        outcome: Outcome = solver.run(integer=integer, limit_s=end_s - time.monotonic())
        least = max(least, outcome.bound if np.isfinite(outcome.bound) else 0.0)
        if outcome.values is None:
            raise InfeasibleError("the smallest memory that works was not found in time; raise the time limit")
        memory = model.memory_of(outcome.values)
        found = float(outcome.values[peak])
        over = [int(s) for s in np.argsort(-memory, kind="stable") if memory[s] > found * unit * (1 + 1e-9) + 0.5]
        new = [step for step in over if step not in rows][:MAX_NEW_ROWS]
        if new and outcome.status == "optimal":
            for step in new:
                rows.add(step)
                model.linear.add_row(-INFINITY, 0, [*model.memory_row(step, unit), (peak, -1.0)])
        elif not integer and outcome.status == "optimal":
            integer = True
        else:
            return model.assignment(outcome.values), least * unit


def _peaks(problem: IntraProblem) -> list[int]:
    sizes = [max(value.num_bytes) for value in problem.values]
    return [*sizes, *(max(option.fixed_bytes for option in item.choices) for item in problem.inputs), 1]


def _does_not_fit(problem: IntraProblem, table: Timetable, end_s: float) -> InfeasibleError:
    assert problem.memory_bytes is not None
    limit = format_bytes(problem.memory_bytes)
    peak, _ = _smallest_peak(problem, table, max(end_s, time.monotonic() + LEAST_PEAK_S))
    return InfeasibleError(
        f"the stage must fit the memory limit of {limit} ({problem.memory_bytes} bytes) per worker, but every "
        f"assignment needs more; the smallest limit that works is {format_bytes(peak)} ({peak} bytes): give the "
        "workers more memory, use more workers, or shrink the microbatch"
    )
