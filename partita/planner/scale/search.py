"""The search for the fastest way to train a cut model on a fabric: all corners at once, then exactly the best.

Families (t, c, b) are priced once each. t divides the smallest machine; c is a power of two (`CONTEXTS`), above 1 only
with b = 1 and where devices would be left over without; b is one of `MICRO_BATCHES`; block boundaries are cut along t
where they can be. Other values can be forced, but are not in the space. All corners that are usual are estimated and
bounded in one table (`partita.planner.scale.space`). In the order of their estimates, those whose estimated memory fits
and whose bound is below the best step time are cut into stages (`partita.planner.scale.cuts`) and priced exactly
(`partita.planner.scale.step`), until the work of an `Effort` is spent; it is counted, not timed, so that plans do not
depend on the machine that plans. A second table has all other corners, but for numbers of stages and replicas whose
bound is not below the best so far. What may still be faster then is priced too, if that is little enough work. The
bound that the solution reports is the least of all corners' bounds whose least memory fits, priced or not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from partita.cost.calibration import Calibration
from partita.cost.kernels import LayerWork
from partita.cost.networks import Fabric
from partita.errors import InfeasibleError, InputError
from partita.planner.scale.cuts import cut_chain
from partita.planner.scale.families import REMATS, Family, machines_of, peak, price_family
from partita.planner.scale.rates import Rates
from partita.planner.scale.solution import ScaleConstraints
from partita.planner.scale.space import SLACK, Corners, Pairs, paired, tabled
from partita.planner.scale.step import Degrees, Remat, State, StepPrediction, predict_step
from partita.planner.scale.works import WorkMaker
from partita.units import GIB

MICRO_BATCHES = (1, 2, 4, 8, 16)
CONTEXTS = (1, 2, 4, 8, 16, 32)
TENSORS = (1, 2, 4, 8)  # whose works are made ahead: machines of up to eight devices
_ALTERNATIVES = 5
_PRICE_OPS = 8000  # work of one exact price besides its schedule, in ops of a schedule

Effort = Literal["quick", "thorough", "exhaustive"]


@dataclass(frozen=True)
class _Limits:
    """Work of a search: ops of schedules that are evaluated, exact prices of usual and of other corners, and those of
    one family; ops beyond which what is left is not priced as a whole."""

    ops: int
    prices: int
    rare_prices: int
    of_family: int
    rest_ops: float


LIMITS: dict[Effort, _Limits] = {
    "quick": _Limits(100_000, 7, 2, 3, 0),
    "thorough": _Limits(3_000_000, 100, 50, 12, 3_000_000),
    "exhaustive": _Limits(3_000_000, 100, 50, 12, float("inf")),
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One corner with its cut and exact price."""

    family: Family
    degrees: Degrees
    remat: Remat
    zero: int
    num_microbatches: int
    cuts: tuple[int, ...]
    prediction: StepPrediction

    @property
    def schedule(self) -> str:
        return "interleaved" if self.degrees.virtual > 1 else "1f1b"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Result of a search: the best, the others in order, the proven bound, and counts for the report.

    `num_open`: corners that were not priced though their bound is below the best; with none no corner is faster.
    """

    best: Candidate
    others: tuple[Candidate, ...]
    bound_s: float
    num_families: int
    num_corners: int
    num_priced: int
    num_open: int


@dataclass
class Searcher:
    """Searches for one model; prices of families are kept between searches on fabrics of the same machines."""

    maker: WorkMaker
    chain: tuple[int, ...]  # pieces in model order
    state: State
    batch: int
    calibration: Calibration = field(default_factory=Calibration)
    _families: dict[object, Family | str] = field(default_factory=dict)

    def search(self, fabric: Fabric, constraints: ScaleConstraints, effort: Effort = "thorough") -> Found:
        """The fastest way.

        Raises:
            InfeasibleError: nothing fits the memory or the constraints; names the nearest miss.
        """
        return _Search(self, fabric, constraints, effort).run()

    def prepare(self) -> None:
        """Makes the works of all families that a re-plan may ask for, whatever the cluster."""
        for tensor, context, micro_batch in itertools.product(TENSORS, CONTEXTS, MICRO_BATCHES):
            if (context > 1 and micro_batch > 1) or self.batch % micro_batch:
                continue
            for sequence in (True, False) if tensor > 1 else (False,):
                with contextlib.suppress(InfeasibleError):  # then there is no such family
                    self.maker.works(
                        tensor=tensor, context=context, sequence_parallel=sequence, micro_batch=micro_batch
                    )
                    break

    def family(self, fabric: Fabric, tensor: int, context: int, micro_batch: int, sequence: bool) -> Family | str:
        """The priced family, or why there is none."""
        key = (machines_of(fabric), tensor, context, micro_batch, sequence)
        if key not in self._families:
            try:
                works = self.maker.works(
                    tensor=tensor, context=context, sequence_parallel=sequence, micro_batch=micro_batch
                )
                self._families[key] = price_family(
                    degrees=Degrees(tensor=tensor, context=context),
                    micro_batch=micro_batch,
                    sequence_parallel=sequence,
                    works=works,
                    chain=self.chain,
                    is_gap=tuple(piece.is_gap for piece in self.maker.model.pieces),
                    fabric=fabric,
                    calibration=self.calibration,
                )
            except InfeasibleError as error:
                self._families[key] = str(error)
        return self._families[key]


class _Tried:
    """A table, and which of its corners were priced."""

    def __init__(self, table: Corners, most_memory_bytes: float) -> None:
        self.table = table
        self.is_possible = table.least_memory_bytes <= most_memory_bytes
        self.is_priced = np.zeros(len(table), dtype=bool)

    @property
    def bound_s(self) -> float:
        """No corner that may fit takes less."""
        return float(self.table.bound_s[self.is_possible].min(initial=float("inf")))

    def open(self, best_s: float) -> np.ndarray:
        """Corners that may take less than ``best_s`` and were not priced."""
        return np.flatnonzero(self.is_possible & ~self.is_priced & (self.table.bound_s < best_s))

    def ops(self, corners: np.ndarray) -> np.ndarray:
        """Work of pricing one cut of each, in ops of a schedule."""
        p, v, m = (column[corners] for column in (self.table.pipeline, self.table.virtual, self.table.num_microbatches))
        return np.asarray(_PRICE_OPS + np.where(p > 1, 2 * p * v * np.minimum(m, 6 * p), 0))


class _Search:
    def __init__(self, searcher: Searcher, fabric: Fabric, constraints: ScaleConstraints, effort: Effort) -> None:
        self.searcher, self.fabric, self.constraints = searcher, fabric, constraints
        self.limits = LIMITS[effort]
        self.best: Candidate | None = None
        self.priced: list[Candidate] = []
        self.most_limit = max(group.kind.gpu.memory_bytes for group in fabric.groups)
        self.refusals: dict[str, None] = {}
        blocks = sum(not searcher.maker.model.pieces[i].is_gap for i in searcher.chain)
        self.num_stages = max(blocks, 1)
        self.rates = Rates(fabric, searcher.calibration)

    def run(self) -> Found:
        families = list(self._families())
        if not families:
            raise InfeasibleError(self._nothing_fits(None, families))
        usual = _Tried(self._table(families, self._rows(families)), self.most_limit)
        self._price_best(families, usual, self.limits.prices)
        limit_s = self.best.prediction.step_time_s if self.best is not None else float("inf")
        rare = _Tried(self._table(families, self._rows(families, limit_s)), self.most_limit)
        self._price_best(families, rare, self.limits.rare_prices)
        for tried in (usual, rare):
            self._price_rest(families, tried)
        if self.best is None:
            raise InfeasibleError(self._nothing_fits(usual.table if len(usual.table) else rare.table, families))
        best_s = self.best.prediction.step_time_s
        others = sorted((c for c in self.priced if c is not self.best), key=lambda c: c.prediction.step_time_s)
        return Found(
            best=self.best,
            others=tuple(others[:_ALTERNATIVES]),
            bound_s=min(best_s, usual.bound_s, rare.bound_s),
            num_families=len(families),
            num_corners=len(usual.table) + len(rare.table),
            num_priced=int(usual.is_priced.sum() + rare.is_priced.sum()),
            num_open=sum(len(tried.open(best_s)) for tried in (usual, rare)),
        )

    def _table(self, families: Sequence[Family], rows: Sequence[np.ndarray]) -> Corners:
        fixed = self.constraints
        return tabled(
            families,
            rows,
            remats=REMATS if fixed.recompute is None else (fixed.recompute,),
            zeros=None if fixed.zero is None else (fixed.zero,),
            state=self.searcher.state,
            rates=self.rates,
        )

    def _price_best(self, families: Sequence[Family], tried: _Tried, most: int) -> None:
        """Prices corners in the order of their estimates; those that may not fit only where nothing else does."""
        table = tried.table
        fits = table.memory_bytes <= self.most_limit
        of_family: Counter[tuple[int, int]] = Counter()
        ops = 0
        for group in (np.flatnonzero(fits & tried.is_possible), np.flatnonzero(tried.is_possible & ~fits)):
            for i in group[np.argsort(table.estimate_s[group], kind="stable")]:
                if self.best is not None and (ops >= self.limits.ops or of_family.total() >= most):
                    break
                if self.best is not None and table.bound_s[i] >= self.best.prediction.step_time_s:
                    continue
                key = (int(table.family[i]), int(table.remat[i]))
                if of_family[key] >= self.limits.of_family and self.best is not None:
                    continue
                of_family[key] += 1
                ops += self._price(families, tried, int(i))
            if self.best is not None:
                break

    def _price_rest(self, families: Sequence[Family], tried: _Tried) -> None:
        """Prices every corner that may still be faster, if that is little enough work."""
        if self.best is None:
            return
        rest = tried.open(self.best.prediction.step_time_s)
        if tried.ops(rest).sum() > self.limits.rest_ops:
            return
        for i in rest[np.argsort(tried.table.bound_s[rest], kind="stable")]:
            if tried.table.bound_s[i] < self.best.prediction.step_time_s:
                self._price(families, tried, int(i))

    def _families(self) -> Iterator[Family]:
        fixed, fabric = self.constraints, self.fabric
        size = min(group.gpus_per_machine for group in fabric.groups)
        tensors = [fixed.tensor] if fixed.tensor else [t for t in range(1, size + 1) if size % t == 0]
        contexts = [fixed.context] if fixed.context else [c for c in CONTEXTS if c <= fabric.num_gpus]
        batches = [fixed.micro_batch] if fixed.micro_batch else [b for b in MICRO_BATCHES if b <= self.searcher.batch]
        for tensor, context, micro_batch in itertools.product(tensors, contexts, batches):
            if tensor * context > fabric.num_gpus or self.searcher.batch % micro_batch:
                continue
            # A context axis is for sequences that leave too few samples for the devices, or too long for the memory.
            if context > 1 and not fixed.context and not self._wants_context(tensor, context, micro_batch):
                continue
            # Cut block boundaries exchange no more bytes than whole ones and keep fewer: whole ones only if need be:
            # the programme of their placements can take a minute.
            modes = [fixed.sequence_parallel] if fixed.sequence_parallel is not None else [True, False]
            for sequence in modes if tensor > 1 else [False]:
                found = self.searcher.family(fabric, tensor, context, micro_batch, sequence)
                if not isinstance(found, str):
                    yield found
                    break
                self.refusals[found] = None

    def _wants_context(self, tensor: int, context: int, micro_batch: int) -> bool:
        """Whether devices would be left over, with one block a stage and one sample a replica, on half the degree."""
        usable = tensor * (context // 2) * self.num_stages * (self.searcher.batch // micro_batch)
        return micro_batch == 1 and (usable < self.fabric.num_gpus or self._is_crowded())

    def _is_crowded(self) -> bool:
        return self.fabric.num_gpus >= 2 * self.searcher.batch

    def _pairs(self, family: Family) -> Pairs:
        """All numbers of stages and replicas; the same for families of equal size."""
        fixed = self.constraints
        return paired(
            batch=self.searcher.batch,
            num_devices=self.fabric.num_gpus,
            group=family.tensor * family.context,
            micro_batch=family.micro_batch,
            num_pieces=len(self.searcher.chain),
            num_blocks=family.num_blocks,
            pipelines=(fixed.pipeline,) if fixed.pipeline else None,
            datas=(fixed.data,) if fixed.data else None,
        )

    def _rows(self, families: Sequence[Family], limit_s: float | None = None) -> list[np.ndarray]:
        """Degrees of the usual corners; with ``limit_s`` of all others that may take less than that."""
        virtuals = (self.constraints.virtual,) if self.constraints.virtual else None
        found = []
        for family in families:
            pairs = self._pairs(family)
            chosen = np.ones(len(pairs.stages), dtype=bool)
            if limit_s is not None:
                chosen = self._least_s(family, pairs) * (1 - SLACK) < limit_s
            found.append(pairs.rows(family.num_blocks, virtuals, usual=limit_s is None, chosen=chosen))
        return found

    def _least_s(self, family: Family, pairs: Pairs) -> np.ndarray:
        """A bound on all corners of each pair, whatever their chunks, ZeRO stage and sends (`space`)."""
        times = family.times[self.constraints.recompute or "none"]  # recomputation only adds to passes
        ahead, back = times.forward, times.backward
        p, m, block_s = pairs.stages, pairs.num_microbatches, ahead.block_s + back.block_s
        later = np.maximum(p - 1 - family.num_gaps, 0)
        even_s = (m * (ahead.cut_s + back.cut_s) + block_s * later * (later + 1) / 2) / p
        return np.asarray(np.maximum(even_s, m * np.ceil(family.num_blocks / p) * block_s))

    def _price(self, families: Sequence[Family], tried: _Tried, i: int) -> int:
        """Prices one corner exactly; the work it took."""
        table = tried.table
        tried.is_priced[i] = True
        family = families[table.family[i]]
        p, v, d, zero = (int(column[i]) for column in (table.pipeline, table.virtual, table.data, table.zero))
        remat = REMATS[table.remat[i]]
        degrees = Degrees(data=d, tensor=family.tensor, pipeline=p, virtual=v, context=family.context)
        m = self.searcher.batch // (d * family.micro_batch)
        seen: set[tuple[int, ...]] = set()
        for from_end in (False, True) if v == 1 else (True,):
            cuts = cut_chain(self._times(family, remat, degrees), p * v, from_end=from_end)
            if cuts in seen:
                continue
            seen.add(cuts)
            prediction = predict_step(
                chunks_of(family, self.searcher.chain, cuts),
                degrees,
                self.fabric,
                num_microbatches=m,
                schedule="interleaved" if v > 1 else "1f1b",
                remat=remat,
                zero=zero,
                state=self.searcher.state,
                calibration=self.searcher.calibration,
            )
            limits = memory_limits(self.fabric, degrees)
            over = max(have - limit for have, limit in zip(prediction.memory_bytes, limits, strict=True))
            candidate = Candidate(
                family=family, degrees=degrees, remat=remat, zero=zero, num_microbatches=m, cuts=cuts,
                prediction=prediction,
            )  # fmt: skip
            if over > 0:
                continue
            self.priced.append(candidate)
            if self.best is None or prediction.step_time_s < self.best.prediction.step_time_s:
                self.best = candidate
        return len(seen) * int(tried.ops(np.array([i]))[0])

    def _times(self, family: Family, remat: Remat, degrees: Degrees) -> list[list[float]]:
        """Seconds of every piece of the chain on every stage's kind of device."""
        times = family.times[remat].pieces_s
        row = [times[piece] for piece in self.searcher.chain]
        if len(self.fabric.groups) == 1:
            return [row]
        speeds = [_stage_speed(self.fabric, degrees, stage) for stage in range(degrees.pipeline)]
        return [[time / speed for time in row] for speed in speeds]

    def _nothing_fits(self, table: Corners | None, families: Sequence[Family]) -> str:
        refused = "; ".join(list(self.refusals)[:3])
        if table is None or not len(table):
            return f"no degrees satisfy the constraints {self.constraints} on {self.fabric.num_gpus} devices. {refused}"
        i = int(table.memory_bytes.argmin())
        family = families[table.family[i]]
        degrees = f"tensor {family.tensor}, pipeline {table.pipeline[i]}, data {table.data[i]}"
        text = f"{degrees}, context {family.context}, recompute {REMATS[table.remat[i]]}, zero {table.zero[i]}"
        return (
            f"every device must hold its share, but the least that any way needs is {table.memory_bytes[i] / GIB:.1f} "
            f"GiB of {self.most_limit / GIB:.1f} GiB ({text}). Use more devices, devices with more memory, or shorter "
            f"sequences." + (f" Not possible: {refused}." if refused else "")
        )


def chunks_of(family: Family, chain: Sequence[int], cuts: Sequence[int]) -> list[list[tuple[LayerWork, int]]]:
    """The chain cut at ``cuts``, equal neighbours counted together."""
    chunks = []
    for begin, end in zip(cuts, [*cuts[1:], len(chain)], strict=True):
        runs = [(piece, len(list(same))) for piece, same in itertools.groupby(chain[begin:end])]
        chunks.append([(family.works[piece], count) for piece, count in runs])
    return chunks


def memory_limits(fabric: Fabric, degrees: Degrees) -> tuple[float, ...]:
    """Memory of the smallest device of each stage."""
    span = degrees.stage_devices
    return tuple(
        float(min(g.kind.gpu.memory_bytes for g in fabric.groups_of(stage * span, (stage + 1) * span - 1)))
        for stage in range(degrees.pipeline)
    )


def _stage_speed(fabric: Fabric, degrees: Degrees, stage: int) -> float:
    """Peak rate of the slowest kind of a stage over that of the fastest kind of all."""

    span = degrees.stage_devices
    own = min(peak(group) for group in fabric.groups_of(stage * span, (stage + 1) * span - 1))
    return own / max(peak(group) for group in fabric.groups)


def batch_refused(batch: int) -> InputError:
    """The batch has no samples."""
    return InputError(f"the batch must have samples (rows of dim 0) to deal out, but has {batch}.")
