"""What a stage costs on a sub-mesh: tables over pairs of down-sets, one table for each way of running it.

`StageCosts` is the oracle between the two solvers: whoever knows how to run some ops on some devices (the intra-stage
solver, measured times, a roofline) offers tables. Two come with the planner:

`AdditiveCosts`  costs are sums over ops; a stage on several devices runs data parallel. With r_g rows on device g of
                 kind k(g):  forward = max over g of [r_g > 0] sum of (fixed[k, i] + r_g per_row[k, i]), backward alike;
                 end = ring all-reduce of the stage's gradients (2 (d - 1) messages of 1/d of them over the slowest
                 link) + the slowest update;  static = sum of static bytes;  saved = r_g x sum of saved bytes per row.
                 With `recompute` a second table keeps a stage's input alone: saved = r_g x boundary bytes, backward
                 takes a forward more, and static holds the activations of one microbatch. The shares r_g are
                 those of `shares`.
`OptionCosts`    asks a function for the options of every (ops, devices, rows).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from partita.errors import InputError
from partita.planner.inter.shares import share_candidates

if TYPE_CHECKING:
    from partita.planner.inter.family import Family
    from partita.planner.inter.problem import InterProblem

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StageOption:
    """One way of running given ops on given devices.

    Attributes:
        name: what a person calls it, e.g. "data=2" or "tensor=4, recompute".
        forward_s, backward_s: of one microbatch on the slowest device; `weight_s` is the part of `backward_s` that
            nothing waits for (weight gradients), which zero-bubble schedules run later.
        end_s: once a step after the last task: reduction of gradients and update.
        static_bytes, saved_bytes: per device: whatever runs, and for each microbatch in flight.
        rows: rows of a microbatch per device.
    """

    name: str
    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    end_s: float = 0.0
    static_bytes: tuple[float, ...]
    saved_bytes: tuple[float, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageTable:
    """One option for every pair of down-sets: F x F arrays, `forward_s` infinite where there is none. `static_bytes`
    and `saved_bytes` have one array for each device of the sub-mesh (the same object where devices are alike)."""

    name: str
    rows: tuple[int, ...]
    forward_s: Array
    backward_s: Array
    weight_s: Array
    end_s: Array
    static_bytes: tuple[Array, ...]
    saved_bytes: tuple[Array, ...]
    options: Mapping[tuple[int, int], StageOption] | None = None  # where names and rows differ from pair to pair

    def option(self, low: int, high: int) -> StageOption:
        if self.options is not None:
            return self.options[low, high]
        return StageOption(
            name=self.name,
            forward_s=float(self.forward_s[low, high]),
            backward_s=float(self.backward_s[low, high]),
            weight_s=float(self.weight_s[low, high]),
            end_s=float(self.end_s[low, high]),
            static_bytes=tuple(float(array[low, high]) for array in self.static_bytes),
            saved_bytes=tuple(float(array[low, high]) for array in self.saved_bytes),
            rows=self.rows,
        )


class StageCosts(Protocol):
    """The oracle. Sub-meshes of equal `key` must have equal tables (tables are asked once for each key and rows)."""

    def key(self, problem: InterProblem, devices: tuple[int, ...]) -> Hashable: ...

    def tables(
        self, problem: InterProblem, family: Family, devices: tuple[int, ...], rows: int
    ) -> Sequence[StageTable]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class OpTimes:
    """Times of every op on one kind of device, arrays of n: `fixed` whatever the rows, `row` for each of them."""

    forward_fixed_s: Array
    forward_row_s: Array
    backward_fixed_s: Array
    backward_row_s: Array
    weight_fixed_s: Array
    weight_row_s: Array
    update_s: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class AdditiveCosts:
    """See the module's docstring. Arrays of n; `static_bytes`: weights, gradients, optimizer state."""

    times: Mapping[str, OpTimes]
    static_bytes: Array
    saved_bytes_per_row: Array
    gradient_bytes: Array
    recompute: bool = False
    max_shares: int = 64

    def key(self, problem: InterProblem, devices: tuple[int, ...]) -> Hashable:
        alike = tuple((problem.devices[g].kind, problem.devices[g].memory_bytes) for g in devices)
        return alike, _slowest(problem, devices)

    def tables(
        self, problem: InterProblem, family: Family, devices: tuple[int, ...], rows: int
    ) -> Sequence[StageTable]:
        kinds = [problem.devices[g].kind for g in devices]
        for kind in kinds:
            if kind not in self.times:
                raise InputError(f"times must have every kind of device, but {kind!r} is not among {list(self.times)}.")
        limits = [problem.devices[g].memory_bytes for g in devices]
        speeds = [1.0 / max(self._row_time_s(kind), 1e-30) for kind in kinds]
        sums = _Sums(family)
        result = []
        for share in share_candidates(list(zip(kinds, limits, strict=True)), speeds, rows, self.max_shares):
            table = self._table(problem, sums, devices, share)
            result.append(table)
            if self.recompute:
                result.append(self._recomputed(family, sums, table))
        return result

    def _row_time_s(self, kind: str) -> float:
        times = self.times[kind]
        return float(times.forward_row_s.sum() + times.backward_row_s.sum())

    def _table(
        self, problem: InterProblem, sums: _Sums, devices: tuple[int, ...], share: tuple[int, ...]
    ) -> StageTable:
        pairs = sorted({(problem.devices[g].kind, r) for g, r in zip(devices, share, strict=True) if r > 0})
        forward, backward, weight = [], [], []
        for kind, r in pairs:
            times = self.times[kind]
            forward.append(sums(times.forward_fixed_s + r * times.forward_row_s))
            backward.append(sums(times.backward_fixed_s + r * times.backward_row_s))
            weight.append(sums(times.weight_fixed_s + r * times.weight_row_s))
        backward_s = np.maximum.reduce(backward)
        input_s = np.maximum.reduce([b - w for b, w in zip(backward, weight, strict=True)])
        kinds = sorted({problem.devices[g].kind for g in devices})
        end_s = np.maximum.reduce([sums(self.times[kind].update_s) for kind in kinds])
        latency_s, inverse = _slowest(problem, devices)
        count = len(devices)
        if count > 1:
            end_s = end_s + 2 * (count - 1) * (latency_s + sums(self.gradient_bytes) / count * inverse)
        saved = sums(self.saved_bytes_per_row)
        by_rows = {r: saved * r for r in set(share)}
        forward_s = np.where(sums.inside, np.maximum.reduce(forward), np.inf)
        return StageTable(
            name="one device" if count == 1 else f"data={count}",
            rows=share,
            forward_s=forward_s,
            backward_s=backward_s,
            weight_s=np.clip(backward_s - input_s, 0.0, None),
            end_s=end_s,
            static_bytes=(sums(self.static_bytes),) * count,
            saved_bytes=tuple(by_rows[r] for r in share),
        )

    def _recomputed(self, family: Family, sums: _Sums, table: StageTable) -> StageTable:
        boundary = np.broadcast_to(family.forward_bytes[:, None], sums.inside.shape)
        kept = {r: boundary * r for r in set(table.rows)}
        saved = zip(table.static_bytes, table.saved_bytes, strict=True)
        return StageTable(
            name=f"{table.name}, recompute",
            rows=table.rows,
            forward_s=table.forward_s,
            backward_s=table.backward_s + np.where(sums.inside, table.forward_s, 0.0),
            weight_s=table.weight_s,
            end_s=table.end_s,
            static_bytes=tuple(static + once for static, once in saved),
            saved_bytes=tuple(kept[r] for r in table.rows),
        )


class _Sums:
    """Sums of an op's figures over every stage."""

    def __init__(self, family: Family) -> None:
        self.inside = family.inside
        self._sets = family.sets.astype(np.float64)

    def __call__(self, figures: Array) -> Array:
        below = self._sets @ figures
        return np.where(self.inside, np.clip(below[None, :] - below[:, None], 0.0, None), 0.0)


def _slowest(problem: InterProblem, devices: tuple[int, ...]) -> tuple[float, float]:
    """(latency_s, seconds per byte) of the slowest link inside a sub-mesh."""
    if len(devices) == 1:
        return 0.0, 0.0
    at = np.ix_(list(devices), list(devices))
    apart = ~np.eye(len(devices), dtype=bool)
    return float(problem.links.latency_s[at][apart].max()), 1.0 / float(problem.links.bytes_per_s[at][apart].min())


@dataclass(frozen=True, kw_only=True, eq=False)
class OptionCosts:
    """Tables from a function (ops, devices, rows) -> options; options of equal place in the answers share a table.

    `same` tells which sub-meshes have equal answers (by default only equal ones).
    """

    options: Callable[[tuple[int, ...], tuple[int, ...], int], Sequence[StageOption]]
    same: Callable[[tuple[int, ...]], Hashable] = tuple

    def key(self, problem: InterProblem, devices: tuple[int, ...]) -> Hashable:
        limits = tuple(problem.devices[g].memory_bytes for g in devices)
        return self.same(devices), limits

    def tables(
        self, problem: InterProblem, family: Family, devices: tuple[int, ...], rows: int
    ) -> Sequence[StageTable]:
        answers: list[dict[tuple[int, int], StageOption]] = []
        for low, high in np.argwhere(family.inside).tolist():
            for place, option in enumerate(self.options(family.ops(low, high), devices, rows)):
                if place == len(answers):
                    answers.append({})
                answers[place][low, high] = option
        return [_filled(len(family), len(devices), options) for options in answers]


def _filled(size: int, num_devices: int, options: dict[tuple[int, int], StageOption]) -> StageTable:
    """A table from single options; names and rows may differ from pair to pair."""
    arrays = {name: np.zeros((size, size)) for name in ("forward_s", "backward_s", "weight_s", "end_s")}
    arrays["forward_s"][:] = np.inf
    static = tuple(np.zeros((size, size)) for _ in range(num_devices))
    saved = tuple(np.zeros((size, size)) for _ in range(num_devices))
    for at, option in options.items():
        for name, array in arrays.items():
            array[at] = getattr(option, name)
        for place in range(num_devices):
            static[place][at] = option.static_bytes[place]
            saved[place][at] = option.saved_bytes[place]
    return StageTable(name="", rows=(), static_bytes=static, saved_bytes=saved, options=options, **arrays)
