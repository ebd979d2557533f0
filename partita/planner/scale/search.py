"""The search for the fastest way to train a cut model on a fabric: best first over families, then over their corners.

Families (t, c, b) are priced once each, sequence-parallel where the boundary can be cut. A family's bound is ``B W /
(b N / (t c))``: no pipeline, no
exchange of gradients, all devices busy. Families are opened in the order of their bounds; of an opened family all
corners
are estimated and bounded at once (`partita.planner.scale.space`); the most promising whose estimated memory fits are
cut
into stages (`partita.planner.scale.cuts`) and priced exactly (`partita.planner.scale.step`). The search ends when no
family and no corner is left whose bound is below the best step time times ``1 - tolerance``, or after `MOST_PRICED`
exact
prices. The bound that the solution reports is the least of all corners' bounds whose least memory fits, priced or not.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from partita.cost.calibration import Calibration
from partita.cost.kernels import LayerWork
from partita.cost.networks import Fabric, NodeGroup, channel
from partita.errors import InfeasibleError, InputError
from partita.planner.scale.cuts import cut_chain
from partita.planner.scale.solution import ScaleConstraints
from partita.planner.scale.space import REMATS, VIRTUALS, Family, corners, enumerated, stage_numbers
from partita.planner.scale.step import Degrees, Remat, State, StepPrediction, predict_step
from partita.planner.scale.works import WorkMaker
from partita.units import GIB

MOST_PRICED = 8  # exact prices of one search
MOST_OF_FAMILY = 6
MICRO_BATCHES = (1, 2, 4, 8, 16)
CONTEXTS = (1, 2, 4, 8, 16, 32)
_ALTERNATIVES = 5


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
    """Result of a search: the best, the others in order, the proven bound, and counts for the report."""

    best: Candidate
    others: tuple[Candidate, ...]
    bound_s: float
    num_families: int
    num_corners: int
    num_priced: int


@dataclass
class Searcher:
    """Searches for one model; prices of families are kept between searches on fabrics of the same machines."""

    maker: WorkMaker
    chain: tuple[int, ...]  # pieces in model order
    state: State
    batch: int
    calibration: Calibration = field(default_factory=Calibration)
    _families: dict[object, Family | str] = field(default_factory=dict)

    def search(self, fabric: Fabric, constraints: ScaleConstraints) -> Found:
        """The fastest way.

        Raises:
            InfeasibleError: nothing fits the memory or the constraints; names the nearest miss.
        """
        return _Search(self, fabric, constraints).run()

    def family(self, fabric: Fabric, tensor: int, context: int, micro_batch: int, sequence: bool) -> Family | str:
        """The priced family, or why there is none."""
        key = (_machines(fabric), tensor, context, micro_batch, sequence, fabric.num_gpus if context > 1 else 0)
        if key not in self._families:
            try:
                works = self.maker.works(
                    tensor=tensor, context=context, sequence_parallel=sequence, micro_batch=micro_batch
                )
                self._families[key] = self._price(fabric, tensor, context, micro_batch, sequence, works)
            except InfeasibleError as error:
                self._families[key] = str(error)
        return self._families[key]

    def _price(
        self, fabric: Fabric, tensor: int, context: int, micro_batch: int, sequence: bool, works: tuple[LayerWork, ...]
    ) -> Family:
        counts = tuple(self.chain.count(index) for index in range(len(works)))
        if len(fabric.groups) > 1:  # prices are those of the fastest kind; `_stage_speed` tells how the others compare
            fabric = Fabric(groups=(max(fabric.groups, key=_peak),))
        degrees = Degrees(tensor=tensor, context=context)

        def price(chunk: list[tuple[LayerWork, int]], remat: Remat) -> float:
            parts = predict_step(
                [chunk],
                degrees,
                fabric,
                num_microbatches=1,
                remat=remat,
                state=self.state,
                calibration=self.calibration,
            ).parts
            return parts["compute"] + parts["exchange"]

        pieces = [(work, count) for work, count in zip(works, counts, strict=True) if count]
        one = channel(fabric, self.calibration, num_ranks=2, stride=max(1, fabric.num_gpus // 2))
        boundary = max((work.boundary_bytes for work in works), default=0.0)
        return Family(
            tensor=tensor,
            context=context,
            micro_batch=micro_batch,
            sequence_parallel=sequence,
            works=works,
            counts=counts,
            is_gap=tuple(piece.is_gap for piece in self.maker.model.pieces),
            times_s={remat: tuple(price([(work, 1)], remat) for work in works) for remat in REMATS},
            total_s={remat: price(pieces, remat) for remat in REMATS},
            bandwidth=max(group.kind.gpu.memory_bytes_per_s for group in fabric.groups),
            send_bytes=boundary,
            send_bytes_per_s=one.ring_bytes_per_s or 1.0,
        )


def _machines(fabric: Fabric) -> tuple[object, ...]:
    """What prices inside a machine depend on."""
    return tuple((g.kind.gpu.name, g.gpus_per_machine, g.link, g.network) for g in fabric.groups)


class _Search:
    def __init__(self, searcher: Searcher, fabric: Fabric, constraints: ScaleConstraints) -> None:
        self.searcher, self.fabric, self.constraints = searcher, fabric, constraints
        self.best: Candidate | None = None
        self.priced: list[Candidate] = []
        self.bound_s = float("inf")
        self.num_corners = 0
        self.nearest: tuple[float, str] = (float("inf"), "")
        self.least_limit = min(group.kind.gpu.memory_bytes for group in fabric.groups)
        self.most_limit = max(group.kind.gpu.memory_bytes for group in fabric.groups)
        self.refusals: dict[str, None] = {}
        self._enumerated: dict[tuple[int, int, int], np.ndarray] = {}
        self._exchanges: dict[tuple[int, int, int], tuple[float, float]] = {}
        constants = [searcher.calibration.of(group.kind.generation) for group in fabric.groups]
        self._overlap = max(one.overlap for one in constants)

    def run(self) -> Found:
        counter = itertools.count()
        heap: list[tuple[float, int, Family]] = []
        for family in self._families():
            heapq.heappush(heap, (self._family_bound_s(family), next(counter), family))
        num_families = len(heap)
        corner_heap: list[tuple[float, int, tuple[Family, Remat, tuple[int, int, int, int], float]]] = []
        while heap or corner_heap:
            best_s = self.best.prediction.step_time_s if self.best else float("inf")
            if heap and heap[0][0] <= (corner_heap[0][0] if corner_heap else float("inf")):
                bound, _, family = heapq.heappop(heap)
                if bound >= best_s:
                    heap.clear()
                    continue
                for estimate, item in self._open(family):
                    heapq.heappush(corner_heap, (estimate, next(counter), item))
                continue
            if len(self.priced) >= MOST_PRICED or not corner_heap:
                break
            _, _, item = heapq.heappop(corner_heap)
            if item[3] < best_s:
                self._price(*item[:3])
        for bound, _, _ in heap:  # families that were not opened bound the rest
            self.bound_s = min(self.bound_s, bound)
        if self.best is None:
            raise InfeasibleError(self._nothing_fits())
        others = sorted((c for c in self.priced if c is not self.best), key=lambda c: c.prediction.step_time_s)
        return Found(
            best=self.best,
            others=tuple(others[:_ALTERNATIVES]),
            bound_s=min(self.bound_s, self.best.prediction.step_time_s),
            num_families=num_families,
            num_corners=self.num_corners,
            num_priced=len(self.priced),
        )

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
            # Cut block boundaries exchange no more bytes than whole ones and keep fewer: whole ones only if need be.
            modes = [fixed.sequence_parallel] if fixed.sequence_parallel is not None else [True, False]
            for sequence in modes if tensor > 1 else [False]:
                found = self.searcher.family(fabric, tensor, context, micro_batch, sequence)
                if not isinstance(found, str):
                    yield found
                    break
                self.refusals[found] = None

    def _wants_context(self, tensor: int, context: int, micro_batch: int) -> bool:
        """Whether devices would be left over, with one block a stage and one sample a replica, on half the degree."""
        blocks = sum(not self.searcher.maker.model.pieces[i].is_gap for i in self.searcher.chain)
        usable = tensor * (context // 2) * max(blocks, 1) * (self.searcher.batch // micro_batch)
        return micro_batch == 1 and (usable < self.fabric.num_gpus or self._is_crowded())

    def _is_crowded(self) -> bool:
        return self.fabric.num_gpus >= 2 * self.searcher.batch

    def _family_bound_s(self, family: Family) -> float:
        replicas = self.fabric.num_gpus / (family.tensor * family.context)
        return self.searcher.batch / family.micro_batch * min(family.total_s.values()) / replicas

    def _open(self, family: Family) -> Iterator[tuple[float, tuple[Family, Remat, tuple[int, int, int, int], float]]]:
        """The most promising corners of a family: (estimate, (family, remat, degrees and ZeRO, bound))."""
        fixed = self.constraints
        columns = self._columns(family)
        for remat in REMATS if fixed.recompute is None else (fixed.recompute,):
            if remat == "selective" and family.total_s["selective"] == family.total_s["none"]:
                continue
            table = corners(family, remat, columns=columns, state=self.searcher.state, overlap=self._overlap)
            self.num_corners += len(table.pipeline)
            possible = table.least_memory_bytes <= self.most_limit
            if possible.any():
                self.bound_s = min(self.bound_s, float(table.bound_s[possible].min()))
            fits = table.memory_bytes <= self.most_limit
            for index in table.memory_bytes.argsort()[:1]:
                degrees = f"tensor {family.tensor}, pipeline {table.pipeline[index]}, data {table.data[index]}"
                text = f"{degrees}, context {family.context}, recompute {remat}, zero {table.zero[index]}"
                self.nearest = min(self.nearest, (float(table.memory_bytes[index]), text))
            order = [i for i in table.estimate_s.argsort() if fits[i]][:MOST_OF_FAMILY]
            for i in order:
                key = (int(table.pipeline[i]), int(table.virtual[i]), int(table.data[i]), int(table.zero[i]))
                yield float(table.estimate_s[i]), (family, remat, key, float(table.bound_s[i]))

    def _columns(self, family: Family) -> np.ndarray:
        """All corners' degrees; the same for families of equal size."""
        fixed, fabric = self.constraints, self.fabric
        group = family.tensor * family.context
        key = (family.tensor, family.context, family.micro_batch)
        if key not in self._enumerated:
            several = len(fabric.groups) > 1
            blocks = family.num_blocks
            self._enumerated[key] = enumerated(
                batch=self.searcher.batch,
                num_devices=fabric.num_gpus,
                group=group,
                context=family.context,
                micro_batch=family.micro_batch,
                num_blocks=blocks,
                pipelines=[fixed.pipeline]
                if fixed.pipeline
                else stage_numbers(fabric.num_gpus // group, max(blocks, 1)),
                virtuals=[fixed.virtual] if fixed.virtual else [1] if several else VIRTUALS,
                datas=[fixed.data] if fixed.data else None,
                zeros=[fixed.zero] if fixed.zero is not None else None,
                exchange=lambda replicas: self._exchange(family, replicas),
            )
        return self._enumerated[key]

    def _exchange(self, family: Family, replicas: int) -> tuple[float, float]:
        """Seconds for each byte, and besides, of a reduce-scatter over the data axis."""
        key = (family.tensor, family.context, replicas)
        if key not in self._exchanges:
            ranks = replicas * family.context
            one = channel(
                self.fabric,
                self.searcher.calibration,
                num_ranks=ranks,
                stride=family.tensor,
                span=ranks * family.tensor,
            )
            fixed_s = one.collective_s("reduce_scatter", 0.0)
            unit = 1e9
            self._exchanges[key] = (one.collective_s("reduce_scatter", unit) - fixed_s) / unit, fixed_s
        return self._exchanges[key]

    def _price(self, family: Family, remat: Remat, key: tuple[int, int, int, int]) -> None:
        p, v, d, zero = key
        degrees = Degrees(data=d, tensor=family.tensor, pipeline=p, virtual=v, context=family.context)
        m = self.searcher.batch // (d * family.micro_batch)
        tried: set[tuple[int, ...]] = set()
        for from_end in (False, True) if v == 1 else (True,):
            cuts = cut_chain(self._times(family, remat, degrees), p * v, from_end=from_end)
            if cuts in tried:
                continue
            tried.add(cuts)
            prediction = predict_step(
                self._chunks(family, cuts),
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

    def _times(self, family: Family, remat: Remat, degrees: Degrees) -> list[list[float]]:
        """Seconds of every piece of the chain on every stage's kind of device."""
        times = family.times_s[remat]
        row = [times[piece] for piece in self.searcher.chain]
        if len(self.fabric.groups) == 1:
            return [row]
        speeds = [_stage_speed(self.fabric, degrees, stage) for stage in range(degrees.pipeline)]
        return [[time / speed for time in row] for speed in speeds]

    def _chunks(self, family: Family, cuts: Sequence[int]) -> list[list[tuple[LayerWork, int]]]:
        return chunks_of(family, self.searcher.chain, cuts)

    def _nothing_fits(self) -> str:
        refused = "; ".join(list(self.refusals)[:3])
        if self.nearest[1]:
            need, text = self.nearest
            return (
                f"every device must hold its share, but the least that any way needs is {need / GIB:.1f} GiB of "
                f"{self.most_limit / GIB:.1f} GiB ({text}). Use more devices, devices with more memory, or shorter "
                f"sequences." + (f" Not possible: {refused}." if refused else "")
            )
        return f"no degrees satisfy the constraints {self.constraints} on {self.fabric.num_gpus} devices. {refused}"


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
    own = min(_peak(group) for group in fabric.groups_of(stage * span, (stage + 1) * span - 1))
    return own / max(_peak(group) for group in fabric.groups)


def _peak(group: NodeGroup) -> float:
    rates = group.kind.gpu.flops_per_s
    return rates.get("bfloat16") or rates.get("float16") or max(rates.values())


def batch_refused(batch: int) -> InputError:
    """The batch has no samples."""
    return InputError(f"the batch must have samples (rows of dim 0) to deal out, but has {batch}.")
