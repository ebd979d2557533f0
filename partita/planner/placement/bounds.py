"""A lower bound on the largest load of all assignments, contiguous or not.

For a number B, an assignment with all loads below B would satisfy each of
  (1) nets that must not be cut below B are not: their pins are one item (see `groups`);
  (2) every item fits a device: min(p, q) < B;
  (3) the work fits: sum of p <= K B + R(B), R the most that L CPU cores of B each can take over (fractional knapsack);
  (4) items with q >= B fit K bins of B each, so for every dual feasible function f (f(x_1) + .. + f(x_n) <= 1 wherever
      x_1 + .. + x_n <= 1) the sum of f(p / B) is at most K.
The bound is the largest B, to a tolerance, at which one fails: none of them fails at a larger one that is feasible.
Dual feasible functions: u_k(x) = x where (k + 1) x is whole, else floor((k + 1) x) / k, after the threshold function
U_e(x) = 1 above 1 - e, 0 below e, else x (Fekete and Schepers, New classes of fast lower bounds for bin packing
problems, 2001, theorems 1 and 2).
Memory is not used, nor is the cost of nets that may be cut.
"""

from __future__ import annotations

import numpy as np

from partita.planner.placement.chains import cpu_relief
from partita.planner.placement.groups import Array, Groups, merge_expensive

_TOLERANCE = 1e-9
_LARGEST_K = 24


def lower_bound(groups: Groups, upper: float, num_steps: int = 40) -> float:
    """A bound on all assignments, at most `upper`, the largest load of a known one."""
    low, high = 0.0, upper
    if upper <= 0:
        return 0.0
    if excludes(groups, high):
        return high
    for _ in range(num_steps):
        middle = 0.5 * (low + high) if low > 0 else high * 0.5
        if excludes(groups, middle):
            low = middle
        else:
            high = middle
        if high - low <= 1e-7 * high:
            break
    return low


def excludes(groups: Groups, bound: float) -> bool:
    """Whether some condition of the module's docstring shows that no assignment has all loads below `bound`."""
    groups = merge_expensive(groups, bound)
    problem = groups.problem
    fastest = (
        np.minimum(groups.accelerator_latency, groups.cpu_latency) if problem.num_cpus else (groups.accelerator_latency)
    )
    if problem.num_accelerators == 0:
        fastest = groups.cpu_latency
    if float(fastest.max(initial=0.0)) > bound * (1 + _TOLERANCE):
        return True
    supported = np.isfinite(groups.accelerator_latency)
    if float(groups.cpu_latency[~supported].sum()) > problem.num_cpus * bound * (1 + _TOLERANCE):
        return True
    work = float(groups.accelerator_latency[supported].sum())
    relief = cpu_relief(groups, problem.num_cpus * bound) if problem.num_cpus else 0.0
    if work > (problem.num_accelerators * bound + relief) * (1 + _TOLERANCE):
        return True
    bound_to_accelerators = supported & (groups.cpu_latency >= bound * (1 + _TOLERANCE))
    if problem.num_cpus == 0:
        bound_to_accelerators = supported
    return num_bins(groups.accelerator_latency[bound_to_accelerators] / bound) > problem.num_accelerators


def num_bins(items: Array) -> int:
    """A lower bound on the number of bins of size 1 that hold the items."""
    items = items[items > _TOLERANCE]
    if len(items) == 0:
        return 0
    small = np.unique(items[items <= 0.5])
    thresholds = np.concatenate([[0.0], small[:: max(1, len(small) // 16)]])
    most = 0.0
    for threshold in thresholds:
        kept = items[items >= threshold - _TOLERANCE]
        kept = np.where(kept > 1 - threshold + _TOLERANCE, 1.0, kept)
        most = max(most, float(kept.sum()))
        k = np.arange(1, _LARGEST_K + 1)[:, None]
        scaled = (k + 1) * kept
        whole = np.abs(scaled - np.round(scaled)) < 1e-7
        most = max(most, float(np.where(whole, kept, np.floor(scaled) / k).sum(axis=1).max()))
    return int(np.ceil(most - 1e-6))
