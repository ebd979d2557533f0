"""The best stage boundaries of a corner, with a proof, by the inter-stage solver over the boundaries that may matter.

A step has hundreds of ops, and the solver's tables are over pairs of boundaries. So the chain's bounds (`inter.chain`)
say first where each boundary of a better pipeline can lie, given one that is known; the ops between are merged. What is
left out cannot be better, so the solver's proof holds for all boundaries. A first pipeline comes from the intervals
themselves, a better one from a thinned selection of boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.errors import InfeasibleError, SolverError
from partita.planner.inter import InterSolution, solve_inter
from partita.planner.inter.chain import Chain
from partita.planner.stage_costs import StageCosts
from partita.units import format_time

TIME_LIMIT_S = 2.0  # of one corner's proof; what is left then is told as the gap
_MOST_AT_ONCE = 48  # boundaries of a first, thinned selection
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """Starts c_1 .. c_{S-1}, their makespan, and the proven least makespan of all starts."""

    starts: tuple[int, ...]
    makespan_s: float
    lower_bound_s: float


def best_boundaries(costs: StageCosts, worth_s: float = np.inf) -> Boundaries:
    """The best starts. Those with a makespan of at least `worth_s` are not told apart.

    Raises:
        InfeasibleError: there are fewer ops than stages, or no starts fit the memory (names the smallest change), or
            none are below `worth_s`.
        SolverError: the solver's answer does not hold when it is priced anew.
    """
    count, n = len(costs.groups), costs.num_ops
    if count > n:
        raise InfeasibleError(f"pipeline must be at most the number of ops, but got {count} stages for {n} ops.")
    if count == 1:
        makespan_s = costs.makespan_s(())
        if makespan_s is None:
            raise _why_not(costs)
        return Boundaries(starts=(), makespan_s=makespan_s, lower_bound_s=makespan_s)
    chain = costs.chain()
    bound_s = chain.bound_s()
    if not np.isfinite(bound_s):
        raise _why_not(costs)
    best = _first(costs, chain, bound_s)
    cuts = _cuts(chain, best, worth_s)
    if len(cuts) > _MOST_AT_ONCE:
        step = -(-len(cuts) // _MOST_AT_ONCE)
        found = _solved(costs, sorted({*cuts[::step], *(best.starts if best else ())}), worth_s)
        if found is not None and (best is None or found.makespan_s < best.makespan_s):
            best = found
        cuts = _cuts(chain, best, worth_s)
    solved = _solved(costs, sorted({*cuts, *(best.starts if best else ())}), worth_s)
    if solved is None:
        if np.isfinite(worth_s):
            raise InfeasibleError(f"No stage boundaries that fit take less than {format_time(worth_s)}.")
        raise _why_not(costs)
    if best is not None and best.makespan_s < solved.makespan_s:  # the solver came to its limit
        solved = Boundaries(starts=best.starts, makespan_s=best.makespan_s, lower_bound_s=solved.lower_bound_s)
    lower_s = max(min(solved.lower_bound_s, solved.makespan_s), bound_s)
    return Boundaries(starts=solved.starts, makespan_s=solved.makespan_s, lower_bound_s=lower_s)


def _first(costs: StageCosts, chain: Chain, bound_s: float) -> Boundaries | None:
    """The better of the two pipelines at the ends of the narrowest intervals; None where neither fits."""
    windows = None
    while windows is None:
        bound_s *= 1 + 1e-3
        windows = chain.windows(bound_s)
    found = []
    for starts in ([low for low, _ in windows], [high for _, high in windows]):
        makespan_s = costs.makespan_s(starts)
        if makespan_s is not None:
            found.append(Boundaries(starts=tuple(starts), makespan_s=makespan_s, lower_bound_s=0.0))
    return min(found, key=lambda one: one.makespan_s, default=None)


def _cuts(chain: Chain, best: Boundaries | None, worth_s: float) -> list[int]:
    """The boundaries of all pipelines that are better."""
    windows = chain.windows(min(best.makespan_s, worth_s) if best is not None else worth_s)
    return sorted({cut for low, high in windows or () for cut in range(low, high + 1)})


def _solved(costs: StageCosts, cuts: Sequence[int], worth_s: float) -> Boundaries | None:
    """The best starts among `cuts`; None where none fit, or are found below `worth_s`."""
    try:
        solution = solve_inter(costs.problem(cuts), time_limit_s=TIME_LIMIT_S, worth_s=worth_s)
    except InfeasibleError:
        return None
    starts = _starts(solution, cuts)
    makespan_s = costs.makespan_s(starts)
    if makespan_s is None or abs(makespan_s - solution.objective_s) > 1e-6 * solution.objective_s:
        raise SolverError(
            f"the stage boundaries {starts} must take what the solver says, {solution.objective_s:g} s, but take "
            f"{makespan_s} s when priced anew. Report this with the model."
        )
    return Boundaries(starts=starts, makespan_s=makespan_s, lower_bound_s=solution.lower_bound_s * (1 - _ROUNDING))


def _starts(solution: InterSolution, cuts: Sequence[int]) -> tuple[int, ...]:
    return tuple(cuts[stage.ops[0] - 1] for stage in solution.stages[1:])


def _why_not(costs: StageCosts) -> InfeasibleError:
    """What the solver says of all boundaries."""
    try:
        solve_inter(costs.problem(range(1, costs.num_ops)), time_limit_s=TIME_LIMIT_S)
    except InfeasibleError as error:
        return error
    raise SolverError("the solver found stages that fit where the chain's bounds say that none do")
