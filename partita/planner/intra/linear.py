"""A linear or integer programme as it grows, and HiGHS, which solves it. The only file that knows HiGHS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import highspy
import numpy as np
import numpy.typing as npt

from partita.errors import SolverError
from partita.planner.highs import SilentHighs

Floats = npt.NDArray[np.float64]
INFINITY = float("inf")
FEASIBILITY = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What HiGHS found.

    Attributes:
        status: "optimal", "infeasible" or "limit" (the time was up).
        values: of all columns; None if no solution is known.
        objective: of `values`; ``bound``: proven lower bound (-inf if none is known).
    """

    status: str
    values: Floats | None
    objective: float
    bound: float


@dataclass
class LinearModel:
    """Minimise ``cost . x`` subject to rows and bounds; ``integral`` columns are whole numbers in the integer form."""

    costs: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integral: list[int] = field(default_factory=list)
    rows: list[tuple[float, float, list[int], list[float]]] = field(default_factory=list)

    def add_column(self, *, upper: float = INFINITY, integral: bool = False) -> int:
        """A new column in [0, upper]; its index."""
        self.costs.append(0.0)
        self.upper.append(upper)
        if integral:
            self.integral.append(len(self.costs) - 1)
        return len(self.costs) - 1

    def add_row(self, low: float, high: float, terms: Iterable[tuple[int, float]]) -> None:
        """``low <= sum(factor * column) <= high``; terms of one column are added up."""
        summed: dict[int, float] = {}
        for column, factor in terms:
            summed[column] = summed.get(column, 0.0) + factor
        self.rows.append((low, high, list(summed), list(summed.values())))


class Solver:
    """HiGHS on a `LinearModel`; rows may be added between runs.

    The relaxation keeps its HiGHS instance, and so its basis, between runs. Every integer run gets a new instance: one
    that solved a relaxation before reports a wrong objective and bound of the integer programme (seen in 1.16.0: below
    the relaxation's optimum, for a solution that was right).

    Args:
        costs: column -> cost, instead of the model's own.
        scale: the objective is multiplied by it, so that HiGHS' absolute tolerances mean something.
    """

    def __init__(self, model: LinearModel, *, costs: Mapping[int, float] | None = None, scale: float = 1.0) -> None:
        self.model = model
        self.scale = scale
        self._costs = dict(enumerate(model.costs)) if costs is None else dict(costs)
        self._relaxation: highspy.Highs | None = None
        self._num_rows = 0  # of the relaxation's instance

    def run(self, *, integer: bool, limit_s: float) -> Outcome:
        """Solve the programme, or its linear relaxation, within `limit_s` seconds."""
        highs = self._new(integer=True) if integer else self._kept_relaxation()
        highs.setOptionValue("time_limit", highs.getRunTime() + max(limit_s, 0.01))
        highs.run()
        return self._outcome(highs, integer)

    def _new(self, *, integer: bool) -> highspy.Highs:
        highs = SilentHighs()
        for name, value in (
            ("threads", 1), ("mip_rel_gap", 1e-9), ("mip_abs_gap", 1e-7), ("primal_feasibility_tolerance", FEASIBILITY),
            ("mip_feasibility_tolerance", 1e-7), ("random_seed", 1),
        ):  # fmt: skip
            highs.setOptionValue(name, value)
        highs.passModel(self._lp(integer))
        return highs

    def _kept_relaxation(self) -> highspy.Highs:
        if self._relaxation is None:
            self._relaxation = self._new(integer=False)
        else:
            for low, high, columns, factors in self.model.rows[self._num_rows :]:
                self._relaxation.addRow(low, high, len(columns), np.array(columns, dtype=np.int32), np.array(factors))
        self._num_rows = len(self.model.rows)
        return self._relaxation

    def _lp(self, integer: bool) -> highspy.HighsLp:
        lp = highspy.HighsLp()
        num_columns = len(self.model.costs)
        lp.num_col_, lp.num_row_ = num_columns, len(self.model.rows)
        lp.col_cost_ = np.array([self._costs.get(column, 0.0) * self.scale for column in range(num_columns)])
        lp.col_lower_ = np.zeros(num_columns)
        lp.col_upper_ = np.array(self.model.upper)
        lp.row_lower_ = np.array([row[0] for row in self.model.rows])
        lp.row_upper_ = np.array([row[1] for row in self.model.rows])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *(len(row[2]) for row in self.model.rows)]).astype(np.int32)
        lp.a_matrix_.index_ = np.array([column for row in self.model.rows for column in row[2]], dtype=np.int32)
        lp.a_matrix_.value_ = np.array([factor for row in self.model.rows for factor in row[3]])
        if integer:
            kinds = [highspy.HighsVarType.kContinuous] * num_columns
            for column in self.model.integral:
                kinds[column] = highspy.HighsVarType.kInteger
            lp.integrality_ = kinds
        return lp

    def _outcome(self, highs: highspy.Highs, integer: bool) -> Outcome:
        status, info = highs.getModelStatus(), highs.getInfo()
        known = info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
        values = np.array(highs.getSolution().col_value) if known else None
        objective = info.objective_function_value / self.scale if known else INFINITY
        bound = info.mip_dual_bound / self.scale if integer else -INFINITY
        if status == highspy.HighsModelStatus.kOptimal:
            return Outcome("optimal", values, objective, min(bound, objective) if integer else objective)
        if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
            return Outcome("infeasible", None, INFINITY, INFINITY)
        if status != highspy.HighsModelStatus.kTimeLimit:
            raise SolverError(f"HiGHS must end with a solution, a proof or at its time limit, but ended with {status}")
        return Outcome("limit", values, objective, bound) if integer else Outcome("limit", None, INFINITY, bound)
