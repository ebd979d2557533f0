"""Proven lower bounds on the step time under the cost model.

For one corner of the space (S stages, m microbatches, op times t_i of one microbatch on the fastest device of the
corner)
every choice of stage boundaries has

    sum_s t_s + (m - 1) max_s t_s + transfers  >=  T + (m - 1) max(T / S, max_i t_i),     T = sum_i t_i,

because the stages hold all ops (sum_s t_s >= T), the largest of S numbers is at least their mean, some stage holds the
largest op, and transfers are not negative. The update adds at least the mean over the stages: max_s u_s >= U / S. The
bound of the whole space is the smallest bound of its corners, as every plan lies in one of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from partita.planner.stages import Array


def pipeline_bound_s(time_s: Array, num_stages: int, num_microbatches: int) -> float:
    """Lower bound of the pipeline's time; `time_s` is S x n or n (one microbatch)."""
    fastest = np.atleast_2d(time_s).min(axis=0)
    total = float(fastest.sum())
    largest = float(fastest.max(initial=0.0))
    # 1e-12: sums in another order differ by rounding
    return (total + (num_microbatches - 1) * max(total / num_stages, largest)) * (1 - 1e-12)


def space_bound_s(bounds_s: Iterable[float]) -> float:
    """Bound of a space from the bounds of corners that cover it; 0 for an empty one."""
    return min(bounds_s, default=0.0)
