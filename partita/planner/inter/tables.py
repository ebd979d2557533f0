"""What all settings of a search share: stage tables by sub-mesh, memory tests, transfers, and bounds on first stages.

Bounds on first stages, for any stages that hold down-set I on the first p devices of an order, memory for one
microbatch in flight alone required; each is a shortest path over (I, p):
    forward[p, I]  sum of f           path[p, I]  sum of f + b (without w for zero-bubble)
    load[p, I]     max of f + b       start[p, I] max of (m-1) b + (m-k) f [+ (m-k) w], k = min(m, most stages)
They do not depend on the stages behind, and each is the least on its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partita.planner.inter.costs import StageTable
from partita.planner.inter.family import Family, Mask
from partita.planner.inter.problem import Array, InterProblem

_ROUNDING = 1e-9


@dataclass(frozen=True)
class FirstStages:
    """See the module's docstring; arrays of (L + 1) x F."""

    forward_s: Array
    path_s: Array
    load_s: Array
    start_s: Array


class Tables:
    """Caches of one search."""

    def __init__(self, problem: InterProblem, family: Family) -> None:
        self.problem, self.family = problem, family
        self._tables: dict[tuple[Hashable, int], list[StageTable]] = {}
        self._fits: dict[tuple[Hashable, int, int], list[Mask]] = {}
        self._passes: dict[tuple[Hashable, int, int], tuple[Array, npt.NDArray[np.int64]]] = {}
        self._least: dict[tuple[object, ...], tuple[Array, ...]] = {}
        self._first: dict[tuple[object, ...], FirstStages] = {}
        self._keys: dict[tuple[int, ...], Hashable] = {}
        self._links: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]] = {}

    def of(self, devices: tuple[int, ...], num_microbatches: int) -> list[StageTable]:
        """The options of a sub-mesh."""
        key = self._key(devices, num_microbatches)
        if key not in self._tables:
            rows = self.problem.rows(num_microbatches)
            self._tables[key] = list(self.problem.costs.tables(self.problem, self.family, devices, rows))
        return self._tables[key]

    def fits(self, devices: tuple[int, ...], num_microbatches: int, in_flight: int) -> list[Mask]:
        """For every option the pairs of down-sets that exist and fit the memory with so many microbatches in flight."""
        key = (*self._key(devices, num_microbatches), in_flight)
        if key not in self._fits:
            limits = [self.problem.devices[g].memory_bytes for g in devices]
            tables = self.of(devices, num_microbatches)
            self._fits[key] = [_mask(self.family, table, limits, in_flight) for table in tables]
        return self._fits[key]

    def transfers(
        self, source: tuple[int, ...], target: tuple[int, ...], cuts: npt.NDArray[np.int64], num_microbatches: int
    ) -> tuple[Array, Array]:
        """Times of the boundaries `cuts` there and back for one microbatch."""
        rows = self.problem.rows(num_microbatches)
        result = []
        for ends, sizes in (
            ((source, target), self.family.forward_bytes[cuts]),
            ((target, source), self.family.backward_bytes[cuts]),
        ):
            if ends not in self._links:
                self._links[ends] = self.problem.link(*ends)
            latency_s, per_byte_s = self._links[ends]
            result.append(np.where(sizes > 0, latency_s + rows * sizes * per_byte_s, 0.0))
        return result[0], result[1]

    def first_stages(self, order: tuple[int, ...], num_microbatches: int, split: bool, most: int) -> FirstStages:
        """The bounds on the first stages along an order; `split`: weight gradients run apart; `most`: of stages."""
        key = (order, num_microbatches, split, most)
        if key not in self._first:
            self._first[key] = self._shortest(order, num_microbatches, split, most)
        return self._first[key]

    def _shortest(self, order: tuple[int, ...], m: int, split: bool, most: int) -> FirstStages:
        shape = (len(order) + 1, len(self.family))
        result = [np.full(shape, np.inf) for _ in range(4)]
        for array in result:
            array[0, 0] = 0.0
        for p in range(len(order)):
            open_ = np.isfinite(result[1][p])
            if not open_.any():
                continue
            for d in self.sizes(len(order) - p):
                least = self._least_of(order[p : p + d], m, split, most)
                for array, one in zip(result[:2], least[:2], strict=True):
                    reached = (array[p][open_, None] + one[open_]).min(axis=0)
                    np.minimum(array[p + d], reached, out=array[p + d])
                for array, one in zip(result[2:], least[2:], strict=True):
                    reached = np.maximum(array[p][open_, None], one[open_]).min(axis=0)
                    np.minimum(array[p + d], reached, out=array[p + d])
        return FirstStages(*result)

    def _least_of(self, devices: tuple[int, ...], m: int, split: bool, most: int) -> tuple[Array, ...]:
        """The least f, f + b', f + b, start over all options that fit with one microbatch in flight."""
        key = (self._key(devices, m), split, most)
        if key not in self._least:
            shape = self.family.inside.shape
            found = tuple(np.full(shape, np.inf) for _ in range(4))
            k = min(m, most)
            for table, fits in zip(self.of(devices, m), self.fits(devices, m, 1), strict=True):
                f, w = np.where(fits, table.forward_s, 0.0), table.weight_s if split else 0.0
                b = table.backward_s - w
                start = (m - 1) * b + (m - k) * (f + w)
                for least, one in zip(found, (f, f + b, f + table.backward_s, start), strict=True):
                    np.minimum(least, np.where(fits, one, np.inf), out=least)
            self._least[key] = found
        return self._least[key]

    def sizes(self, room: int) -> list[int]:
        """Stage sizes that fit `room` devices."""
        return sorted({d for d in self.problem.stage_sizes if d <= room})

    def least_pass(self, devices: tuple[int, ...], m: int) -> Array:
        """The least f + b of every pair of down-sets (one microbatch in flight)."""
        return self._least_of(devices, m, False, 1)[2]

    def key(self, devices: tuple[int, ...]) -> Hashable:
        """Equal for sub-meshes of equal tables and limits."""
        if devices not in self._keys:
            limits = tuple(self.problem.devices[g].memory_bytes for g in devices)
            self._keys[devices] = (self.problem.costs.key(self.problem, devices), limits)
        return self._keys[devices]

    def passes(self, devices: tuple[int, ...], m: int, in_flight: int) -> tuple[Array, npt.NDArray[np.int64]]:
        """The least f + b of every pair of down-sets that fits with so many microbatches in flight, and the option."""
        key = (*self._key(devices, m), in_flight)
        if key not in self._passes:
            shape = self.family.inside.shape
            least, which = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
            for option, (table, fits) in enumerate(
                zip(self.of(devices, m), self.fits(devices, m, in_flight), strict=True)
            ):
                one = np.where(fits, table.forward_s + table.backward_s, np.inf)
                which[one < least] = option
                np.minimum(least, one, out=least)
            self._passes[key] = least, which
        return self._passes[key]

    def _key(self, devices: tuple[int, ...], num_microbatches: int) -> tuple[Hashable, int]:
        return self.key(devices), num_microbatches


def _mask(family: Family, table: StageTable, limits: list[float], in_flight: int) -> Mask:
    fits = family.inside & np.isfinite(table.forward_s)
    seen: set[tuple[int, int, float]] = set()
    for limit, static, saved in zip(limits, table.static_bytes, table.saved_bytes, strict=True):
        case = (id(static), id(saved), limit)
        if np.isfinite(limit) and case not in seen:
            fits = fits & (static + in_flight * saved <= limit * (1 + _ROUNDING))
            seen.add(case)
    return fits
