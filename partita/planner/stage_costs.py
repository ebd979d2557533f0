"""What the stages of one corner cost: the figures of a pipeline, for any stage boundaries.

Legend       stage q holds the positions low .. high - 1 of `Work`; worker (q, d) is on data coordinate d and has r_d of
             the rows of a microbatch.
    forward_q = max over the workers of the stage of sum of forward times with r_d rows;  backward_q alike
    there_q   = transfer into the stage: at the latency and bandwidth of the slowest of the links (q - 1, d) -> (q, d)
    end_q     = reduction of the stage's gradients over its workers + optimizer on the largest slice + sending the
                parameters that later stages read too
    memory    = of every process: bytes of parameters, gradients and optimizer state + what its workers of the stage
                save for the microbatches in flight
`StageCosts` is the oracle of the inter-stage solver (`problem`), gives the bounds of `inter.chain` (`chain`), and
prices given boundaries on its own (`makespan_s`), which a solution is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from partita.plan import Schedule
from partita.planner.inter import InterDevice, InterProblem, Links, StageTable, Value
from partita.planner.inter.chain import Chain, prefix_sums
from partita.planner.inter.family import Family
from partita.planner.inter.schedule_time import PipelineTimes, in_flight, makespan_s
from partita.planner.work import Array, Work

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Host:
    """A process of a stage: the rows that its workers have of a microbatch, of all rows of the batch, and its
    memory."""

    rank: int
    fraction: float
    limit_bytes: float


@dataclass(frozen=True, kw_only=True, eq=False)
class StageGroup:
    """The workers of one stage.

    Attributes:
        name: for people.
        forward_s, backward_s: prefix sums over positions, one row for each kind of worker (kind and rows).
        static_bytes, saved_bytes: prefix sums; saved bytes for all rows of the batch.
        link, back_link: (latency_s, seconds for a byte of the whole batch) into this stage, and back.
        shared_link: (latency_s, seconds for a byte) to the next stage, of parameters that it reads as well.
        end_s: of (elements, bytes) of parameters, without sending any. `end_s(x) / x` must not grow, as in rooflines
            and alpha-beta models.
    """

    name: str
    forward_s: Array
    backward_s: Array
    static_bytes: Array
    saved_bytes: Array
    hosts: tuple[Host, ...]
    link: tuple[float, float]
    back_link: tuple[float, float]
    shared_link: tuple[float, float]
    end_s: Callable[[int, int], float]

    @property
    def limit_bytes(self) -> float:
        """Of the smallest process."""
        return min(host.limit_bytes for host in self.hosts)

    def needs(self, static: Array, saved: Array) -> list[Array]:
        """What each process needs, in proportion to its memory, counted in bytes of the smallest one."""
        least = self.limit_bytes
        return [
            (static + saved * host.fraction) * (least / host.limit_bytes if np.isfinite(least) else 1.0)
            for host in self.hosts
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCosts:
    """See the module's docstring."""

    work: Work
    groups: tuple[StageGroup, ...]
    num_microbatches: int
    schedule: Schedule

    @property
    def num_ops(self) -> int:
        return len(self.work.names)

    @cached_property
    def elements(self) -> Array:
        return prefix_sums(self.work.parameter_elements)

    @cached_property
    def num_bytes(self) -> Array:
        return prefix_sums(self.work.parameter_bytes)

    def times(self, starts: Sequence[int]) -> PipelineTimes:
        """The times of given stages."""
        spans = list(pairwise((0, *starts, self.num_ops)))
        found = list(zip(self.groups, spans, strict=True))
        forward = [float((g.forward_s[:, high] - g.forward_s[:, low]).max()) for g, (low, high) in found]
        backward = [float((g.backward_s[:, high] - g.backward_s[:, low]).max()) for g, (low, high) in found]
        ends = [
            group.end_s(int(self.elements[high] - self.elements[low]), int(self.num_bytes[high] - self.num_bytes[low]))
            + (float(_transfer_s(group.shared_link, self.work.shared_bytes[high])) if high < self.num_ops else 0.0)
            for group, (low, high) in found
        ]
        there, back = self.work.there_bytes, self.work.back_bytes
        return PipelineTimes(
            forward_s=forward,
            backward_s=backward,
            weight_s=[0.0] * len(found),
            end_s=ends,
            forward_transfer_s=[float(_transfer_s(g.link, there[low])) for g, (low, _) in found[1:]],
            backward_transfer_s=[float(_transfer_s(g.back_link, back[low])) for g, (low, _) in found[1:]],
        )

    def makespan_s(self, starts: Sequence[int]) -> float | None:
        """The step's time with given starts, without what is fixed; None where they are no pipeline that fits."""
        edges = (0, *starts, self.num_ops)
        if len(edges) != len(self.groups) + 1 or any(low >= high for low, high in pairwise(edges)):
            return None
        for group, needs in zip(self.groups, self.memory_bytes(starts), strict=True):
            if any(needs[host.rank] > host.limit_bytes * (1 + _ROUNDING) for host in group.hosts):
                return None
        return makespan_s(self.schedule, self.times(starts), self.num_microbatches)

    def memory_bytes(self, starts: Sequence[int]) -> list[dict[int, float]]:
        """What each stage needs in each of its processes."""
        result = []
        for q, (group, (low, high)) in enumerate(zip(self.groups, pairwise((0, *starts, self.num_ops)), strict=True)):
            static = float(group.static_bytes[high] - group.static_bytes[low])
            saved = self.in_flight(q) * float(group.saved_bytes[high] - group.saved_bytes[low])
            result.append({host.rank: static + saved * host.fraction for host in group.hosts})
        return result

    def in_flight(self, stage: int) -> int:
        return in_flight(self.schedule, stage, len(self.groups), self.num_microbatches)

    def chain(self) -> Chain:
        """The same for bounds: of several workers of a stage the one that is slowest on the whole counts alone, and the
        end counts in proportion to its parameters."""
        slowest = [int((g.forward_s[:, -1] + g.backward_s[:, -1]).argmax()) for g in self.groups]
        elements, num_bytes = int(self.elements[-1]), int(self.num_bytes[-1])
        ends = [group.end_s(elements, num_bytes) / elements if elements else 0.0 for group in self.groups]
        uniform = len(np.unique(self._ratio())) <= 1
        return Chain(
            forward_s=np.stack([np.diff(g.forward_s[k]) for g, k in zip(self.groups, slowest, strict=True)]),
            backward_s=np.stack([np.diff(g.backward_s[k]) for g, k in zip(self.groups, slowest, strict=True)]),
            end_s=np.outer(ends if uniform else np.zeros(len(ends)), self.work.parameter_elements),
            memory_bytes=np.stack([self._memory_of(q) for q in range(len(self.groups))]),
            limit_bytes=np.array([g.limit_bytes for g in self.groups]),
            there_s=np.stack([_transfer_s(g.link, self.work.there_bytes) for g in self.groups]),
            back_s=np.stack([_transfer_s(g.back_link, self.work.back_bytes) for g in self.groups]),
            schedule=self.schedule,
            num_microbatches=self.num_microbatches,
        )

    def _memory_of(self, stage: int) -> Array:
        """Of the process of the stage that needs most on the whole."""
        group = self.groups[stage]
        needs = group.needs(np.diff(group.static_bytes), self.in_flight(stage) * np.diff(group.saved_bytes))
        return max(needs, key=lambda need: float(need.sum()))

    def _ratio(self) -> Array:
        """Bytes of an element at every position with parameters: only if they are alike is the end in proportion."""
        has = self.work.parameter_elements > 0
        return self.work.parameter_bytes[has] / self.work.parameter_elements[has]

    def problem(self, cuts: Sequence[int]) -> InterProblem:
        """The inter-stage problem in which a stage may begin at the given positions alone."""
        edges = (0, *cuts, self.num_ops)
        count, m = len(self.groups), self.num_microbatches
        there, back = self.work.there_bytes, self.work.back_bytes
        latency, rate = np.zeros((count, count)), np.full((count, count), np.inf)
        for q, group in enumerate(self.groups[1:], start=1):
            for at, (latency_s, byte_s) in (((q - 1, q), group.link), ((q, q - 1), group.back_link)):
                latency[at], rate[at] = latency_s, 1.0 / byte_s if byte_s > 0 else np.inf
        return InterProblem(
            num_ops=len(edges) - 1,
            devices=tuple(InterDevice(name=g.name, kind=g.name, memory_bytes=g.limit_bytes) for g in self.groups),
            links=Links(latency_s=latency, bytes_per_s=rate),
            costs=_Tables(self, np.array(edges)),
            batch_rows=m,  # a row of the problem is a microbatch: the times here are those of one
            microbatch_counts=(m,),
            values=tuple(
                Value(
                    producer=place,
                    consumers=(place + 1,),
                    forward_bytes_per_row=float(there[cut]),
                    backward_bytes_per_row=float(back[cut]),
                )
                for place, cut in enumerate(cuts)
            ),
            schedules=(self.schedule,),
            uses_all=True,
        )


@dataclass(frozen=True, eq=False)
class _Tables:
    """The solver's oracle: device q is the sub-mesh of stage q, op i the positions edges[i] .. edges[i + 1] - 1."""

    costs: StageCosts
    edges: np.ndarray

    def key(self, problem: InterProblem, devices: tuple[int, ...]) -> Hashable:
        return devices

    def tables(
        self, problem: InterProblem, family: Family, devices: tuple[int, ...], rows: int
    ) -> Sequence[StageTable]:
        (device,) = devices
        group = self.costs.groups[device]
        at = self.edges[family.sets.sum(axis=1)]  # of a chain every down-set is a prefix
        zero = np.zeros(family.inside.shape)
        static = _between(group.static_bytes[None], at, family)
        saved = self.costs.in_flight(device) * _between(group.saved_bytes[None], at, family)
        need = np.maximum.reduce(group.needs(static, saved))
        return [
            StageTable(
                name=group.name,
                rows=(rows,),
                forward_s=_between(group.forward_s, at, family),
                backward_s=_between(group.backward_s, at, family),
                weight_s=zero,
                end_s=self._ends(group, at, family),
                static_bytes=(need,),  # the microbatches in flight are known
                saved_bytes=(zero,),
            )
        ]

    def _ends(self, group: StageGroup, at: np.ndarray, family: Family) -> Array:
        elements = _between(self.costs.elements[None], at, family)
        num_bytes = _between(self.costs.num_bytes[None], at, family)
        kinds, which = np.unique(elements + 1j * num_bytes, return_inverse=True)
        ends = np.array([group.end_s(int(kind.real), int(kind.imag)) for kind in kinds.tolist()])
        sent = _transfer_s(group.shared_link, np.append(self.costs.work.shared_bytes, 0.0)[at])
        return np.asarray(ends[which].reshape(elements.shape) + sent[None, :])


def _between(prefix: Array, at: np.ndarray, family: Family) -> Array:
    """The largest over the rows of what lies between two down-sets."""
    sums = prefix[:, at]
    most = (sums[:, None, :] - sums[:, :, None]).max(axis=0)
    return np.asarray(np.where(family.inside, np.maximum(most, 0.0), 0.0))


def _transfer_s(link: tuple[float, float], num_bytes: npt.ArrayLike) -> Array:
    """Nothing takes no time."""
    num_bytes = np.asarray(num_bytes, dtype=float)
    return np.asarray(np.where(num_bytes > 0, link[0] + num_bytes * link[1], 0.0))
