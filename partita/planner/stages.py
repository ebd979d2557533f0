"""Exact stage boundaries on a linear order of ops.

Variables    starts 0 = c_0 < c_1 < ... < c_{S-1} < n: stage s holds the ops c_s .. c_{s+1} - 1.
Given        time_s[s, i]      forward and backward time of op i on the device of stage s, for one microbatch
             transfer_s[s, c]  time to move what crosses a cut before op c between stage s - 1 and s, there and back
             memory_bytes[s, i]  what op i adds to the memory of stage s (weights, and activations of all
                               microbatches in flight)
Objective    sum_s t_s + (m - 1) max_s t_s + sum_{s>0} transfer_s[s, c_s],
             t_s = sum of time_s[s, i] over the ops of stage s
Constraints  (1) every stage holds at least one op;  (2) the memory of stage s is at most limit_bytes[s].

Method: fix an upper bound B on max_s t_s. What is left, C(B) = min of the first and third term with t_s <= B, is a
shortest path: F[s, j] = P_s[j] + min over i of (F[s-1, i] - P_s[i] + transfer_s[s, i]), P_s the prefix sums of time;
the i allowed by B and (2) form an interval [low(j), j), because times and bytes are not negative. B starts at infinity;
a solution with max below B that beats the best objective v must satisfy C(B) + (m - 1) max < v, so B falls to the
smaller of the last maximum (exclusive) and (v - C(B)) / (m - 1), until the path does not exist. Every skipped B is
excluded by that inequality: the result is exact.
Source: the bottleneck enumeration of Alpa (Zheng et al. 2022, section 5.2) and Piper (Tarnawski et al. 2021) over the
linear partitioning of PipeDream (Narayanan et al. 2019, section 3.1), with interval minima in place of pair
enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from partita.errors import InfeasibleError
from partita.units import format_bytes

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StageProblem:
    """See the module's docstring; all arrays are S x n, `limit_bytes` has S entries (infinity: no limit)."""

    time_s: Array
    transfer_s: Array
    memory_bytes: Array
    limit_bytes: Array
    num_microbatches: int


@dataclass(frozen=True, kw_only=True)
class StageSolution:
    starts: tuple[int, ...]  # c_1 .. c_{S-1}
    stage_time_s: tuple[float, ...]  # of one microbatch
    objective_s: float


def evaluate_starts(problem: StageProblem, starts: tuple[int, ...]) -> StageSolution | None:
    """The objective of given starts; None where they break constraint (1) or (2)."""
    num_stages, num_ops = problem.time_s.shape
    edges = (0, *starts, num_ops)
    if len(edges) != num_stages + 1 or any(a >= b for a, b in pairwise(edges)):
        return None
    times = []
    for stage in range(num_stages):
        ops = slice(edges[stage], edges[stage + 1])
        if problem.memory_bytes[stage, ops].sum() > problem.limit_bytes[stage]:
            return None
        times.append(float(problem.time_s[stage, ops].sum()))
    moved = sum(float(problem.transfer_s[stage, edges[stage]]) for stage in range(1, num_stages))
    objective = sum(times) + (problem.num_microbatches - 1) * max(times) + moved
    return StageSolution(starts=tuple(starts), stage_time_s=tuple(times), objective_s=objective)


def solve_stages(problem: StageProblem) -> StageSolution:
    """The best starts. Raises `InfeasibleError` where there are fewer ops than stages or no split fits the memory."""
    num_stages, num_ops = problem.time_s.shape
    if num_stages > num_ops:
        raise InfeasibleError(
            f"pipeline must be at most the number of ops, but got {num_stages} stages for {num_ops} ops."
        )
    best: StageSolution | None = None
    bound_s = np.inf
    while True:
        found = _shortest(problem, bound_s)
        if found is None:
            break
        cost_s, starts = found
        solution = evaluate_starts(problem, starts)
        assert solution is not None
        if best is None or solution.objective_s < best.objective_s:
            best = solution
        if problem.num_microbatches == 1:
            break
        largest_s = max(solution.stage_time_s)
        if largest_s <= 0.0:
            break  # no smaller maximum exists
        below_s = largest_s * (1 - 1e-9)  # "exclusive" with room for the rounding of prefix sums
        bound_s = min(below_s, (best.objective_s - cost_s) / (problem.num_microbatches - 1))
    if best is None:
        raise InfeasibleError(_why_not(problem))
    return best


def _shortest(problem: StageProblem, bound_s: float) -> tuple[float, tuple[int, ...]] | None:
    """C(bound_s) and its starts, or None."""
    num_stages, num_ops = problem.time_s.shape
    cost = np.full(num_ops + 1, np.inf)  # F[s, j]: stages 0..s hold the ops before j
    cost[0] = 0.0
    choices = []
    for stage in range(num_stages):
        times = np.concatenate([[0.0], np.cumsum(problem.time_s[stage])])
        memory = np.concatenate([[0.0], np.cumsum(problem.memory_bytes[stage])])
        low = (
            np.searchsorted(times, times - bound_s * (1 + 1e-15), side="left")
            if np.isfinite(bound_s)
            else np.zeros(num_ops + 1, dtype=np.int64)
        )
        if np.isfinite(problem.limit_bytes[stage]):
            low = np.maximum(low, np.searchsorted(memory, memory - problem.limit_bytes[stage], side="left"))
        entry = cost[:-1] - times[:-1]
        if stage:
            entry = entry + problem.transfer_s[stage]
        value, choice = _interval_minima(entry, low)
        cost = value + times
        choices.append(choice)
    if not np.isfinite(cost[num_ops]):
        return None
    starts, end = [], num_ops
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    return float(cost[num_ops]), tuple(reversed(starts[:-1]))


def _interval_minima(values: Array, low: npt.NDArray[np.int64]) -> tuple[Array, npt.NDArray[np.int64]]:
    """For each j the minimum of values[low[j]:j] and where it is (a monotone queue); infinity where the interval is
    empty."""
    result = np.full(len(values) + 1, np.inf)
    where = np.zeros(len(values) + 1, dtype=np.int64)
    queue: list[int] = []
    head = 0
    for j in range(1, len(values) + 1):
        new = values[j - 1]
        while len(queue) > head and values[queue[-1]] >= new:
            queue.pop()
        queue.append(j - 1)
        while head < len(queue) and queue[head] < low[j]:
            head += 1
        if head < len(queue):
            result[j], where[j] = values[queue[head]], queue[head]
    return result, where


def _why_not(problem: StageProblem) -> str:
    smallest = float(problem.memory_bytes.min(axis=0).sum())
    room = float(problem.limit_bytes.sum())
    largest = float(problem.memory_bytes.min(axis=0).max())
    need = max(smallest / problem.memory_bytes.shape[0], largest)
    return (
        f"The stages must fit the memory: all ops together need at least {format_bytes(smallest)} and one op alone "
        f"{format_bytes(largest)}, but the {len(problem.limit_bytes)} stage(s) have {format_bytes(room)}. The "
        f"smallest change: "
        f"at least {format_bytes(need)} for each stage, more stages, or a smaller batch."
    )
