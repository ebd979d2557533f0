"""From Piper's problem to the best pipeline found, with a proof of how good it is.

Feasibility  For a bound B on stage times, with the options (I, J, d, t, T, cap) of T <= B, `piper_options`: let
             G[I, k] be the least s = sum of d over stages that hold what is not in I, with sum of d t at most k. Then
             G[all, k] = 0,  G[I, k] = min over options of G[J, k - d t] + d where that is at most cap and at most N.
             A smaller s and a smaller k never hurt, so a pipeline with all stage times at most B exists exactly if
             G[{}, K] is finite. This replaces the table dp[ideal][k][s] of Piper, section 4, by one dimension less.
Window       with P[I] the fewest devices for what is in I, and Q[I] for what is not, cap ignored (shortest paths), only
             Q[I] <= k <= K - P[I] matter.
Search       the optimum is one of the option times: bisection over those between the largest B known to be infeasible
             and the best pipeline's objective, until none is between.
With all ideals in the family and no thinned frontier the result is the optimum. Elsewhere the bound is that of the
search with optimistic frontiers, or only the simple one: K T >= sum over layers of the least t tau.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from partita.errors import InfeasibleError
from partita.planner.placement.groups import Array
from partita.planner.placement.ideals import Ideals, all_ideals, distinct, first_orders, prefixes
from partita.planner.placement.piper_frontier import Thinning
from partita.planner.placement.piper_options import Indices, OptionBuilder, Options
from partita.planner.placement.piper_price import PricedPipeline, price_pipeline
from partita.planner.placement.piper_problem import PiperProblem, Stage, least_device_time_s
from partita.planner.placement.piper_ways import best_ways
from partita.units import format_bytes

_ROUNDING = 1e-9
_MAX_IDEALS = 1200
_POINTS = (32, 96, 400, 1600)  # of a frontier, in searches that may prove the optimum
_COARSE = ((12, 8), (40, 24))  # ideals and points of a frontier, in searches that only find a first bound


@dataclass(frozen=True, kw_only=True)
class PiperSolution:
    stages: tuple[Stage, ...]
    priced: PricedPipeline
    lower_bound_s: float  # over all pipelines
    exact: bool  # whether the pipeline is proven optimal (to rounding)
    time_s: float

    @property
    def objective_s(self) -> float:
        return self.priced.objective_s


@dataclass
class _Best:
    problem: PiperProblem
    stages: tuple[Stage, ...] = ()
    priced: PricedPipeline | None = None

    @property
    def objective_s(self) -> float:
        return self.priced.objective_s if self.priced else np.inf

    def offer(self, stages: tuple[Stage, ...]) -> None:
        priced = price_pipeline(self.problem, stages)
        if not priced.broken and priced.objective_s < self.objective_s:
            self.stages, self.priced = stages, priced


def solve_piper(problem: PiperProblem, *, time_limit_s: float = 4.0) -> PiperSolution:
    """The best pipeline found within about `time_limit_s` (up to four times that for the largest).

    Raises `InfeasibleError` where no pipeline fits the memory and the devices.
    """
    begin = time.monotonic()
    ideals, all_listed = _family(problem)
    best = _Best(problem)
    for count, points in _COARSE:
        if len(ideals) > count:
            coarse = OptionBuilder(problem=problem, ideals=ideals, thinning=Thinning(limit=points))
            options = coarse.build(best.objective_s, begin + time_limit_s, _some_ends(ideals, count))
            _Programme(problem, options).search(best, 0.0, begin + time_limit_s, patience=8)
    low, whole = simple_bound(problem), False
    for points in _POINTS:
        thinning = Thinning(limit=points)
        builder = OptionBuilder(problem=problem, ideals=ideals, thinning=thinning)
        options = builder.build(best.objective_s * (1 + _ROUNDING), begin + 2.5 * time_limit_s)
        proven = _Programme(problem, options).search(best, low, begin + 2.8 * time_limit_s)
        whole = all_listed and options.complete and not thinning.happened
        if not thinning.happened or time.monotonic() - begin > 0.4 * time_limit_s:
            break
    if best.priced is None:
        raise InfeasibleError(_why_not(problem, whole))
    if whole:
        low = max(low, min(proven, best.objective_s))
    elif all_listed:
        builder = OptionBuilder(problem=problem, ideals=ideals, thinning=Thinning(limit=points, optimistic=True))
        options = builder.build(best.objective_s * (1 + _ROUNDING), begin + 3.5 * time_limit_s)
        if options.complete:
            low = max(low, _Programme(problem, options).prove(best.objective_s, low, begin + 3.7 * time_limit_s))
    return PiperSolution(
        stages=best.stages,
        priced=best.priced,
        lower_bound_s=max(0.0, min(low, best.objective_s)),
        exact=low >= best.objective_s * (1 - 2 * _ROUNDING),
        time_s=time.monotonic() - begin,
    )


def _family(problem: PiperProblem) -> tuple[Ideals, bool]:
    """Ideals in ascending size, and whether they are all."""
    before = sorted({(tail, head) for tail, head, _ in problem.edges})
    count = len(problem.layers)
    ideals = all_ideals(count, before, _MAX_IDEALS)
    listed = ideals is not None
    if ideals is None:
        ideals = prefixes(first_orders(count, before, 0, 0), count)
    ideals = distinct(ideals)
    return ideals[np.argsort(ideals.sum(axis=1), kind="stable")], listed


def _some_ends(ideals: Ideals, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """About `count` ideals, spread evenly over sizes, the first and the last included."""
    ends = np.zeros(len(ideals), dtype=bool)
    sizes = ideals.sum(axis=1)
    for size in np.unique(np.linspace(0, sizes[-1], count).round()):
        ends[np.argmin(np.abs(sizes - size))] = True
    ends[[0, -1]] = True
    return ends


def simple_bound(problem: PiperProblem) -> float:
    """K T is at least the sum of device seconds, of each layer at its thriftiest degree and way."""
    return sum(least_device_time_s(layer) for layer in problem.layers) / problem.num_devices


class _Programme:
    """The dynamic programme of the module's docstring over given options."""

    def __init__(self, problem: PiperProblem, options: Options) -> None:
        self._problem, self._options = problem, options
        self._count = len(options.ideals)
        keys = np.stack([options.start, options.end, options.tensor_degree, options.data_degree])
        self._last = np.ones(len(options.start), dtype=bool)  # of its (start, end, t, d)
        if len(self._last):
            self._last[:-1] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
        self._devices = options.data_degree * options.tensor_degree

    def search(self, best: _Best, low: float, deadline: float, patience: int = 100) -> float:
        """Improve `best`; returns what is then proven: no pipeline of this family has a smaller objective."""
        times = np.unique(self._options.time_s)
        proven = floor = max(_below(low), self._chain_bound(times, best.objective_s))
        sound = True
        for step in range(patience):
            candidates = times[(times > floor) & (times < best.objective_s * (1 - _ROUNDING))]
            if len(candidates) == 0 or time.monotonic() > deadline:
                break
            middle = _next_bound(candidates, best.objective_s, proven * (1 + 0.02 * 2**step))
            stages = self._stages(middle)
            if stages is not None:
                best.offer(stages)
                if best.objective_s <= middle * (1 + _ROUNDING):
                    continue
                sound = False  # the ways found for the stages are slower than their frontier promised
            floor = middle
            proven = middle if sound else proven
        following = times[times > proven]
        if not sound:
            return proven
        return _below(float(following[0]) if len(following) else min(best.objective_s, self._options.ub_s))

    def prove(self, objective_s: float, low: float, deadline: float) -> float:
        """The largest bound that this family proves."""
        times = np.unique(self._options.time_s)
        times = times[times < objective_s]
        low = max(_below(low), self._chain_bound(times, objective_s))
        while time.monotonic() < deadline:
            candidates = times[(times > low) & (times < objective_s)]
            if len(candidates) == 0:
                return _below(objective_s)
            middle = float(candidates[len(candidates) // 2])
            if self._table(middle) is None:
                low = middle
            else:
                objective_s = middle
        return low

    def _valid(self, bound: float) -> Indices:
        """Options that matter at a bound: of each (start, end, t, d) the one of the largest cap."""
        fits = self._options.time_s <= bound
        following = np.append(fits[1:], False)
        return np.flatnonzero(fits & (self._last | ~following))

    def _fewest(self, chosen: Indices) -> tuple[Indices, Indices]:
        """P and Q: the fewest devices for what is in, and not in, each ideal."""
        start, end, devices = self._options.start[chosen], self._options.end[chosen], self._devices[chosen]
        far = 1 << 40
        inside, outside = np.full(self._count, far), np.full(self._count, far)
        inside[0] = outside[-1] = 0
        pair = start * self._count + end
        first = np.flatnonzero(np.append(True, pair[1:] != pair[:-1])) if len(pair) else np.zeros(0, dtype=np.int64)
        least = np.minimum.reduceat(devices, first) if len(first) else devices
        start, end = start[first], end[first]
        begins = np.searchsorted(start, np.arange(self._count + 1))
        for ideal in range(self._count):
            part = slice(begins[ideal], begins[ideal + 1])
            np.minimum.at(inside, end[part], inside[ideal] + least[part])
        for ideal in range(self._count - 2, -1, -1):
            part = slice(begins[ideal], begins[ideal + 1])
            if part.start < part.stop:
                outside[ideal] = min(far, int((outside[end[part]] + least[part]).min()))
        return inside, outside

    def _chain_bound(self, times: Array, objective_s: float) -> float:
        """The largest option time at which even pipelines without caps need too many devices."""
        times = times[times < objective_s]
        low, high = -1, len(times)
        while high - low > 1:
            middle = (low + high) // 2
            inside, _ = self._fewest(self._valid(float(times[middle])))
            if inside[-1] <= self._problem.num_devices:
                high = middle
            else:
                low = middle
        return float(times[low]) if low >= 0 else -1.0

    def _table(self, bound: float) -> tuple[Array, Indices, Indices] | None:
        """G, the options behind it, and where those of each start begin; None if there is no pipeline."""
        num_devices, options = self._problem.num_devices, self._options
        chosen = self._valid(bound)
        inside, outside = self._fewest(chosen)
        needed = inside[options.start[chosen]] + self._devices[chosen] + outside[options.end[chosen]]
        chosen = chosen[needed <= num_devices]
        if inside[-1] > num_devices:
            return None
        begins = np.searchsorted(options.start[chosen], np.arange(self._count + 1))
        caps = np.minimum(options.cap[chosen], self._problem.num_microbatches).astype(np.float64)
        table = np.full((self._count, num_devices + 1), np.inf)
        table[-1] = 0.0
        for ideal in range(self._count - 2, -1, -1):
            part = slice(begins[ideal], begins[ideal + 1])
            low, high = int(outside[ideal]), int(num_devices - inside[ideal])
            if part.start == part.stop or low > high:
                continue
            self._fill(table, ideal, chosen[part], caps[part], low, high)
        return (table, chosen, begins) if np.isfinite(table[0, num_devices]) else None

    def _fill(self, table: Array, ideal: int, chosen: Indices, caps: Array, low: int, high: int) -> None:
        devices, degree, end = self._devices[chosen], self._options.data_degree[chosen], self._options.end[chosen]
        width = high - low + 1
        result = np.full(width, np.inf)
        block = max(1, 2_000_000 // width)
        for begin in range(0, len(chosen), block):
            part = slice(begin, begin + block)
            places = np.arange(low, high + 1) - devices[part, None]
            sums = table[end[part, None], np.maximum(places, 0)]
            sums += degree[part, None]
            sums[(places < 0) | (sums > caps[part, None])] = np.inf
            np.minimum(result, sums.min(axis=0), out=result)
        np.minimum.accumulate(result, out=result)
        table[ideal, low : high + 1] = result
        table[ideal, high + 1 :] = result[-1]

    def _stages(self, bound: float) -> tuple[Stage, ...] | None:
        """A pipeline with stage times of at most `bound`."""
        found = self._table(bound)
        if found is None:
            return None
        table, chosen, begins = found
        options, ideal, left = self._options, 0, self._problem.num_devices
        stages = []
        while ideal < self._count - 1:
            behind = table[ideal, left]
            left = int(np.argmax(table[ideal] == behind))
            part = chosen[begins[ideal] : begins[ideal + 1]]
            places = left - self._devices[part]
            sums = table[options.end[part], np.maximum(places, 0)] + options.data_degree[part]
            ok = (places >= 0) & (sums == behind) & (sums <= options.cap[part])
            option = int(part[np.argmax(ok)])
            layers = np.flatnonzero(options.ideals[options.end[option]] & ~options.ideals[ideal]).tolist()
            stages.append(
                best_ways(
                    self._problem,
                    layers,
                    int(options.data_degree[option]),
                    int(options.tensor_degree[option]),
                    int(behind),
                )
            )
            ideal, left = int(options.end[option]), left - int(self._devices[option])
        return tuple(stages)


def _below(bound: float) -> float:
    """A little less: what is proven to be a lower bound may itself be feasible."""
    return bound * (1 - _ROUNDING) if bound > 0 else -1.0


def _next_bound(candidates: Array, objective_s: float, start: float) -> float:
    """The next bound to try: ever larger ones from `start` until a pipeline is known, then halves."""
    if not np.isfinite(objective_s):
        return float(candidates[min(len(candidates) - 1, int(np.searchsorted(candidates, start)))])
    middle = float(candidates[len(candidates) // 2])
    halfway = 0.5 * (float(candidates[0]) + objective_s)
    return min(middle, max(halfway, float(candidates[0])))


def _why_not(problem: PiperProblem, exact: bool) -> str:
    need = max(
        min(way.memory_per_microbatch_bytes + way.memory_fixed_bytes for ways in layer.ways.values() for way in ways)
        for layer in problem.layers
    )
    found = "No pipeline fits" if exact else "No pipeline was found that fits"
    return (
        f"{found} the memory (maxMemoryPerDevice {format_bytes(problem.limit_bytes)}, one layer alone needs at least "
        f"{format_bytes(need)}) with maxDevices {problem.num_devices} and degrees that all layers of a stage have; "
        "raise maxMemoryPerDevice or maxDevices."
    )
