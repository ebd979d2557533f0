"""Pipelines of least largest load: the best chain of ideals for K accelerators and L CPU cores.

Variables    ideals {} = I_0 <= I_1 <= ... <= I_n = all groups out of a given family, and which device holds each
             difference S_i = I_i minus I_{i-1}. A device may hold nothing.
Objective    max over i of load(S_i), see `problem`.
Constraints  (1) sizes and (2) supported operators on accelerators; (3) n devices at most, of each kind what there is.

Recurrence   V[a, c, J] = min of V[a-1, c, J], min over I < J of max(V[a-1, c, I], load(J - I)), and the same with
             V[a, c-1, .] and the CPU load. With all ideals in the family this is the optimum over pipelines
             (Tarnawski et al. 2020, section 5.1.1); with some of them, a pipeline and no proof.
Window       only loads below a known bound B matter. With W(I) the accelerator latency in I and R(c) the most of it
             that c CPU cores of budget B can take over, V[a, c, J] < B needs
             total - (K - a) B - R(L - c) <= W(J) <= a B + R(c), and load(J - I) < B needs W(J) - W(I) < B.
Matrix form  for a net with pins P, let n_I be the number of pins in I. Between ideals I <= J it is touched by J - I
             exactly if n_J > n_I, and inside of it exactly if n_J = |P| and n_I = 0. So
             load(J - I) = W(J) - W(I) + sum_P c_P (1 - sum_k [n_J = k][n_I = k] - [n_J = |P|][n_I = 0]),
             one matrix product for all pairs of ideals; I <= J itself is one too (groups in I and not in J: none).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from partita.planner.placement.groups import Array, Groups
from partita.planner.placement.ideals import Ideals

Indices = npt.NDArray[np.int64]
_REFUSED = 2.0**80  # weight of what must not be: far above any latency, and exact in products with 0 and 1
_BLOCK = 256
_DENSE = 2500  # ideals up to which the loads of all pairs are kept


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A pipeline: devices of groups, and the recurrence's own value for it."""

    devices: tuple[int, ...]
    objective: float
    stages: tuple[int, ...]  # of each group, 0 for the first device of the pipeline


@dataclass
class ChainSearch:
    """The recurrence over one family of ideals, which must hold the empty one and the full one."""

    groups: Groups
    ideals: Ideals
    deadline: float = np.inf  # of time.monotonic; past it a search ends without result
    expired: bool = False  # whether the last search ended so
    work: Array = field(init=False)
    _cpu_work: Array = field(init=False)
    _size: Array = field(init=False)
    _counts: npt.NDArray[np.int16] = field(init=False)
    _accelerator_pairs: Array | None = field(init=False, default=None)
    _cpu_pairs: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._unsupported = np.isinf(self.groups.accelerator_latency)
        work = _exact_in_sums(np.where(self._unsupported, 0.0, self.groups.accelerator_latency))
        by_work = np.lexsort((self.ideals.sum(axis=1), self.ideals @ work))
        self.ideals = self.ideals[by_work]
        self.work = self.ideals @ work
        self._cpu_work = self.ideals @ self.groups.cpu_latency
        self._size = self.ideals @ self.groups.size_bytes
        pins = np.zeros((self.groups.num_groups, len(self.groups.pins)))
        for net, groups in enumerate(self.groups.pins):
            pins[list(groups), net] = 1.0
        self._counts = (self.ideals.astype(np.float32) @ pins.astype(np.float32)).astype(np.int16)
        self._full = pins.sum(axis=0).astype(np.int64)
        self._limited = float(self.groups.size_bytes.sum()) > self.groups.problem.limit_bytes
        if len(self.ideals) <= _DENSE:
            every = np.arange(len(self.ideals))
            self._accelerator_pairs = self._accelerator_loads(every, every)
            if self.groups.problem.num_cpus:
                self._cpu_pairs = self._cpu_loads(every, every)

    def solve(self, bound: float) -> Chain | None:
        """The best chain if its largest load is below `bound`, else None."""
        self.expired = False
        bound = min(bound, _REFUSED / 2)
        problem, count = self.groups.problem, len(self.ideals)
        num_accelerators, num_cpus = problem.num_accelerators, problem.num_cpus
        start = np.full(count, np.inf)
        start[0] = 0.0
        values: dict[tuple[int, int], Array] = {(0, 0): start}
        source: dict[tuple[int, int, int], Indices] = {}
        for a in range(num_accelerators + 1):
            for c in range(num_cpus + 1):
                if (a, c) == (0, 0):
                    continue
                best = np.full(count, np.inf)
                low, high = self._window(a, c, bound)
                for kind, before in enumerate(((a - 1, c), (a, c - 1))):
                    if min(before) < 0:
                        continue
                    if time.monotonic() > self.deadline:
                        self.expired = True
                        return None
                    source[a, c, kind] = self._step(values[before], best, slice(low, high), bound, kind == 1)
                best[best >= bound] = np.inf
                values[a, c] = best
        if not np.isfinite(values[num_accelerators, num_cpus][-1]):
            return None
        return self._chain(source, float(values[num_accelerators, num_cpus][-1]))

    def _window(self, a: int, c: int, bound: float) -> tuple[int, int]:
        problem = self.groups.problem
        room = 1e-9 * (float(self.work[-1]) + bound)  # for the rounding of sums
        low = self.work[-1] - (problem.num_accelerators - a) * bound - self._relief(problem.num_cpus - c, bound)
        high = a * bound + self._relief(c, bound)
        return int(np.searchsorted(self.work, low - room)), int(np.searchsorted(self.work, high + room, side="right"))

    def _relief(self, num_cpus: int, bound: float) -> float:
        return cpu_relief(self.groups, num_cpus * bound, all_cpus=num_cpus == self.groups.problem.num_cpus)

    def _step(self, values: Array, best: Array, targets: slice, bound: float, on_cpu: bool) -> Indices:
        """Improve `best` by one more device behind `values`; the index of the ideal before, -1 where none is better."""
        origin = np.full(len(best), -1, dtype=np.int64)
        kept = np.flatnonzero(values[targets] < best[targets]) + targets.start  # the device holds nothing
        best[kept], origin[kept] = values[kept], kept
        sources = np.flatnonzero(values < bound)
        pairs = self._cpu_pairs if on_cpu else self._accelerator_pairs
        for begin in range(0, len(sources), _BLOCK):
            rows = sources[begin : begin + _BLOCK]
            first = max(targets.start, int(rows[0]) + 1)
            reach = self.work[rows[-1]] + bound if not on_cpu else np.inf
            last = min(targets.stop, int(np.searchsorted(self.work, reach, side="right")))
            if first >= last:
                continue
            if pairs is not None:
                loads = pairs[rows, first:last]
            else:
                compute = self._cpu_loads if on_cpu else self._accelerator_loads
                loads = compute(rows, np.arange(first, last))
                if time.monotonic() > self.deadline:
                    break
            np.maximum(loads, values[rows, None], out=loads)
            chosen = loads.argmin(axis=0)
            value = loads[chosen, np.arange(last - first)]
            better = np.flatnonzero(value < best[first:last])
            best[first + better], origin[first + better] = value[better], rows[chosen[better]]
        return origin

    def _accelerator_loads(self, rows: Indices, columns: Indices) -> Array:
        """load(J - I) for ideals I of `rows` and J of `columns`; huge where it is not allowed."""
        inner, outer = self.ideals[rows], self.ideals[columns]
        moving = np.flatnonzero(self._counts[columns].max(axis=0, initial=0) > self._counts[rows].min(axis=0))
        costs, full = self.groups.costs[moving], self._full[moving]
        in_counts, out_counts = self._counts[np.ix_(rows, moving)], self._counts[np.ix_(columns, moving)]
        first: list[npt.NDArray[Any]] = [
            inner * _REFUSED,
            (~inner[:, self._unsupported]) * _REFUSED,
            (in_counts == 0) * -costs,
        ]
        second: list[npt.NDArray[Any]] = [~outer, outer[:, self._unsupported], out_counts == full]
        for k in range(int(full.max(initial=0)) + 1):
            with_k = np.flatnonzero(full >= k)
            first.append((in_counts[:, with_k] == k) * -costs[with_k])
            second.append(out_counts[:, with_k] == k)
        loads: Array = np.hstack(first) @ np.hstack(second).astype(np.float64).T
        loads += self.work[columns] - self.work[rows, None] + costs.sum()
        if self._limited:
            moved = self._size[columns] - self._size[rows, None]
            loads[moved > self.groups.problem.limit_bytes] = np.inf
        return loads

    def _cpu_loads(self, rows: Indices, columns: Indices) -> Array:
        outside: Array = (self.ideals[rows] * _REFUSED) @ (~self.ideals[columns]).astype(np.float64).T
        return outside + (self._cpu_work[columns] - self._cpu_work[rows, None])

    def _chain(self, source: dict[tuple[int, int, int], Indices], objective: float) -> Chain:
        problem = self.groups.problem
        devices, stages = np.zeros((2, self.groups.num_groups), dtype=np.int64)
        a, c, end = problem.num_accelerators, problem.num_cpus, len(self.ideals) - 1
        while (a, c) != (0, 0):
            kind = 1 if c and source[a, c, 1][end] >= 0 else 0  # a later kind overwrote the earlier where it is better
            start = int(source[a, c, kind][end])
            held = self.ideals[end] & ~self.ideals[start]
            devices[held] = a - 1 if kind == 0 else problem.num_accelerators + c - 1
            stages[held] = a + c - 1
            a, c, end = (a - 1, c, start) if kind == 0 else (a, c - 1, start)
        return Chain(devices=tuple(devices.tolist()), objective=objective, stages=tuple(stages.tolist()))


def _exact_in_sums(values: Array) -> Array:
    """Rounded to multiples of a power of two, so that sums have no error and a larger ideal never has less work."""
    total = float(values.sum())
    unit = 2.0 ** (np.ceil(np.log2(total)) - 50) if total > 0 else 1.0
    rounded: Array = np.round(values / unit) * unit
    return rounded


def cpu_relief(groups: Groups, budget: float, *, all_cpus: bool = True) -> float:
    """R: the most accelerator latency that CPU cores can take over with `budget` of CPU latency in all (fractional).

    Operators that accelerators do not support use the budget of `all_cpus` first; some of the cores may be spared them.
    """
    supported = np.isfinite(groups.accelerator_latency)
    budget -= float(groups.cpu_latency[~supported].sum()) if all_cpus else 0.0
    if budget < 0:
        return 0.0
    gain, price = groups.accelerator_latency[supported], groups.cpu_latency[supported]
    free = price <= 0
    taken = float(gain[free].sum())
    gain, price = gain[~free], price[~free]
    for i in np.argsort(-gain / price):
        if price[i] >= budget:
            return taken + float(gain[i] * budget / price[i])
        taken, budget = taken + float(gain[i]), budget - float(price[i])
    return taken
