"""Bounds of pipelines of a chain, one stage on each of S given sub-meshes, without tables over pairs of boundaries.

Legend       stage q holds the ops low .. high - 1 (low = c_q, high = c_{q+1}, c_0 = 0, c_S = n); f, b, t = f + b, end:
             times of its forward and backward tasks and of its end of the step;  k_q: forward tasks before its first
             backward task (m for GPipe, min(m, S - q) for 1F1B).
Bounds       Every makespan is at least, for every stage q,
    (1)  pre(low) + m t_q + end_q            its tasks begin behind one forward pass of the stages before,
    (2)  pre(low) + m t_q + post(low)        and are followed by one backward pass of these;
    (3)  path + (m - 1) b_q + (m - k_q) f_q  its first backward task comes when a microbatch has been everywhere behind,
    (4)  pre(low) + behind(low) + (m - 1) b_q + (m - k_q) f_q + end_q
             where pre, post, path, behind count every op on the fastest stage that it may be on, and every transfer at
             its least. A stage must also fit its memory.
Windows      (1)-(4) grow with high and fall with low. So for a target U the largest boundary c_{q+1} below U follows
             from the largest c_q, the smallest c_q from the smallest c_{q+1}: two sweeps of binary searches give an
             interval for every boundary, outside of which no pipeline has a makespan below U. If an interval is empty,
             U is a lower bound of all of them.
Sources: (1) and (2) are the load bounds of PipeDream (Narayanan et al. 2019, section 3.1); (3) is the steady state of
1F1B behind a full warm-up (DAPPLE, Fan et al. 2021, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from partita.errors import InputError
from partita.planner.inter.problem import Array

PRECISION = 1e-4  # of `Chain.bound_s`, relative
_ROUNDING = 1e-9  # sums in another order differ by rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Times and bytes of n ops on S stages, arrays of S x n, for one microbatch; `limit_bytes` has S entries.

    Attributes:
        forward_s, backward_s, end_s: what an op adds to its stage at least. A stage may take more than their sum (the
            slowest of several workers, a reduction's latency), never less.
        memory_bytes: what it adds to the memory, with all microbatches that its stage has in flight.
        there_s, back_s: of the transfers at a boundary before op c between stage s - 1 and s; row 0 is not read.
        schedule: "1f1b" or "gpipe".
    """

    forward_s: Array
    backward_s: Array
    end_s: Array
    memory_bytes: Array
    limit_bytes: Array
    there_s: Array
    back_s: Array
    schedule: str
    num_microbatches: int

    def __post_init__(self) -> None:
        if self.schedule not in ("1f1b", "gpipe"):
            raise InputError(f"a chain's schedule must be '1f1b' or 'gpipe', but got {self.schedule!r}.")

    @property
    def num_stages(self) -> int:
        return len(self.forward_s)

    @property
    def num_ops(self) -> int:
        return int(self.forward_s.shape[1])

    @cached_property
    def _stages(self) -> list[_Stage]:
        return [_Stage.of(self, q) for q in range(self.num_stages)]

    def windows(self, below_s: float) -> list[tuple[int, int]] | None:
        """For each boundary 1 .. S - 1 the least and the largest op before which it lies in a pipeline of a makespan
        below `below_s` that fits the memory; None where there is no such pipeline.

        Example: two stages of four equal ops of 1 s forward and 1 s backward, 1 microbatch, no transfers: every
        boundary takes 8 s, so ``windows(8.1) == [(1, 3)]`` and ``windows(7.9) is None``.
        """
        count, n = self.num_stages, self.num_ops
        if n < count:
            return None
        highs, lows = [0] * (count + 1), [n] * (count + 1)
        for q, stage in enumerate(self._stages):
            highs[q + 1] = min(stage.furthest(highs[q], below_s), n - (count - 1 - q))
            if highs[q + 1] < q + 1:
                return None
        if highs[count] < n:
            return None
        for q in reversed(range(1, count)):
            lows[q] = max(self._stages[q].earliest(lows[q + 1], below_s), q)
            if lows[q] > highs[q]:
                return None
        return list(zip(lows[1:count], highs[1:count], strict=True))

    def bound_s(self) -> float:
        """No pipeline that fits the memory has a smaller makespan; infinity where none fits."""
        if self.windows(np.inf) is None:
            return float("inf")
        low_s, high_s = 0.0, max(float((self.forward_s + self.backward_s).max(axis=0).sum()), 1e-30)
        while self.windows(high_s) is None:
            low_s, high_s = high_s, 2 * high_s
        while high_s - low_s > PRECISION * high_s:
            middle_s = (low_s + high_s) / 2
            low_s, high_s = (middle_s, high_s) if self.windows(middle_s) is None else (low_s, middle_s)
        return low_s * (1 - _ROUNDING)


@dataclass(frozen=True, eq=False)
class _Stage:
    """The bounds of one stage as `rise[j][high] - rise[j][low] + base[j][low]`, arrays of n + 1 that do not fall; those
    of `rise - base` do not either. The last is its memory, whose limit does not depend on the target."""

    rise: Array
    base: Array
    limit_bytes: float

    @staticmethod
    def of(chain: Chain, q: int) -> _Stage:
        m, schedule = chain.num_microbatches, chain.schedule
        f, b, e = chain.forward_s[q], chain.backward_s[q], chain.end_s[q]
        ahead = m if schedule == "gpipe" else min(m, chain.num_stages - q)
        there = chain.there_s[1:].min(axis=1, initial=np.inf) if chain.num_stages > 1 else np.zeros(0)
        back = chain.back_s[1:].min(axis=1, initial=np.inf) if chain.num_stages > 1 else np.zeros(0)
        before_f = prefix_sums(chain.forward_s[: q + 1].min(axis=0)) + there[:q].sum()
        before_t = (
            prefix_sums((chain.forward_s + chain.backward_s)[: q + 1].min(axis=0)) + there[:q].sum() + back[:q].sum()
        )
        any_f = prefix_sums(chain.forward_s.min(axis=0))
        any_t = prefix_sums((chain.forward_s + chain.backward_s).min(axis=0))
        path = np.full_like(any_t, any_t[-1] + there.sum() + back.sum())
        behind = any_f + (any_t[-1] - any_t) + there.sum() + back[q:].sum()
        steady = prefix_sums((m - 1) * b + (m - ahead) * f)
        load, end = prefix_sums(m * (f + b)), prefix_sums(e)
        memory = prefix_sums(chain.memory_bytes[q])
        return _Stage(
            rise=np.stack([load + end, load, steady, steady + end, memory]),
            base=np.stack([before_f, before_t, path, behind, np.zeros_like(path)]),
            limit_bytes=float(chain.limit_bytes[q]),
        )

    def _targets(self, below_s: float) -> tuple[float, ...]:
        return (*(below_s * (1 + _ROUNDING),) * 4, self.limit_bytes * (1 + _ROUNDING))

    def furthest(self, low: int, below_s: float) -> int:
        """The largest high with everything at most its target; below `low` where even no op is too much."""
        targets = zip(self.rise, self.base, self._targets(below_s), strict=True)
        return min(int(np.searchsorted(r, target - a[low] + r[low], side="right")) - 1 for r, a, target in targets)

    def earliest(self, high: int, below_s: float) -> int:
        """The smallest low with everything at most its target."""
        targets = zip(self.rise, self.rise - self.base, self._targets(below_s), strict=True)
        return max(int(np.searchsorted(fall, r[high] - target, side="left")) for r, fall, target in targets)


def prefix_sums(figures: Array) -> Array:
    """[n + 1]: what lies before each boundary."""
    return np.concatenate([[0.0], np.cumsum(figures)])
