"""The inter-stage problem: which ops form a stage, on which devices, how many microbatches, which schedule.

Space        An order pi of devices (one of `orders`), its first L devices (the others stay idle; with `uses_all` none
             does), S stages. Stage s
             holds the ops I_{s+1} \\ I_s of a chain of down-sets {} = I_0 < I_1 < ... < I_S = all ops, and the devices
             pi(p_s) .. pi(p_s + d_s - 1) with p_0 = 0, p_{s+1} = p_s + d_s, p_S = L and d_s in `stage_sizes`; one of
             the options that the stage costs offer for (ops, devices); m in `microbatch_counts`; a schedule of
             `schedules`. Interleaved with v chunks: a chain of v S down-sets, stage q on the devices of q mod S.
Transfers    A value made in I_s and read outside crosses the boundary, whatever stage reads it: it is handed on from
             stage to stage. Boundary bytes go over min(d, d') lanes in parallel, each with its part of the bytes, at
             the latency and bandwidth of the slowest link between the two sub-meshes; they overlap with compute.
Objective    the makespan of the schedule's task order (`schedule_time`), that is
             max over s of (end of the last task of stage s + end_s of stage s) + fixed_s.
Memory       of each device of stage s: static + saved x (microbatches in flight) at most its `memory_bytes`.
Sources: PipeDream (Narayanan et al. 2019, section 3.1: intervals and replication), DAPPLE (Fan et al. 2021: device
orders, uneven stages), Alpa (Zheng et al. 2022, section 5.2: sub-meshes), Piper (Tarnawski et al. 2021: down-sets,
in-flight memory by the position from the end), zero-bubble pipelines (Qi et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from partita.errors import InputError
from partita.planner.inter.costs import StageCosts

Array = npt.NDArray[np.float64]
InterSchedule = Literal["gpipe", "1f1b", "zero_bubble", "interleaved"]
SCHEDULES: tuple[InterSchedule, ...] = get_args(InterSchedule)


@dataclass(frozen=True, kw_only=True)
class InterDevice:
    """One device: `kind` names its speed (devices of a kind take equal times), `memory_bytes` its limit."""

    name: str
    kind: str
    memory_bytes: float = np.inf


@dataclass(frozen=True, kw_only=True)
class Value:
    """What one op hands to others: bytes for one row of the batch, there (forward) and back (its gradient)."""

    producer: int
    consumers: tuple[int, ...]
    forward_bytes_per_row: float
    backward_bytes_per_row: float


@dataclass(frozen=True, kw_only=True)
class Links:
    """N x N matrices, entry [a, b] from device a to device b; the diagonal is not read."""

    latency_s: Array
    bytes_per_s: Array

    @staticmethod
    def uniform(num_devices: int, latency_s: float, bytes_per_s: float) -> Links:
        shape = (num_devices, num_devices)
        return Links(latency_s=np.full(shape, latency_s), bytes_per_s=np.full(shape, bytes_per_s))


@dataclass(frozen=True, kw_only=True)
class InterProblem:
    """See the module's docstring. Raises `InputError` where the data do not fit together.

    Attributes:
        num_ops: ops 0 .. n - 1.
        values: what crosses between ops; each also means that its consumers come after its producer.
        before: further precedence, pairs (first, second).
        batch_rows: rows of the global batch; every microbatch has batch_rows / m of them.
        microbatch_counts: candidates for m, each a divisor of `batch_rows`.
        chunk_counts: candidates for v of the interleaved schedule, which also needs m to be a multiple of S.
        stage_sizes: how many devices a stage may have.
        orders: candidate device orders (indices; each device at most once); see `partita.planner.inter.orders`.
        uses_all: whether every device of an order must be in a stage.
        fixed_s: added to every step.
        max_down_sets: more of them, and the prefixes of topological orders stand for all.
    """

    num_ops: int
    devices: tuple[InterDevice, ...]
    links: Links
    costs: StageCosts
    batch_rows: int
    microbatch_counts: tuple[int, ...]
    values: tuple[Value, ...] = ()
    before: tuple[tuple[int, int], ...] = ()
    schedules: tuple[InterSchedule, ...] = ("1f1b",)
    chunk_counts: tuple[int, ...] = (2,)
    stage_sizes: tuple[int, ...] = (1,)
    orders: tuple[tuple[int, ...], ...] = field(default=())
    uses_all: bool = False
    fixed_s: float = 0.0
    max_down_sets: int = 800

    def __post_init__(self) -> None:
        count = len(self.devices)
        _must(self.num_ops >= 1, "num_ops must be at least 1", self.num_ops)
        _must(count >= 1, "there must be at least one device", count)
        for name in ("latency_s", "bytes_per_s"):
            shape = getattr(self.links, name).shape
            _must(shape == (count, count), f"links.{name} must be {count} x {count}", shape)
        _must(bool(self.microbatch_counts), "microbatch_counts must not be empty", self.microbatch_counts)
        _must(bool(self.schedules), "schedules must not be empty", self.schedules)
        for m in self.microbatch_counts:
            fits = m >= 1 and self.batch_rows % m == 0
            _must(fits, f"every microbatch count must divide batch_rows={self.batch_rows}", m)
        for schedule in self.schedules:
            _must(schedule in SCHEDULES, f"a schedule must be one of {SCHEDULES}", schedule)
        _must(all(v >= 2 for v in self.chunk_counts), "chunk_counts must be at least 2", self.chunk_counts)
        _must(all(d >= 1 for d in self.stage_sizes), "stage_sizes must be at least 1", self.stage_sizes)
        if not self.orders:
            object.__setattr__(self, "orders", (tuple(range(count)),))
        for order in self.orders:
            fits = len(set(order)) == len(order) >= 1 and all(0 <= device < count for device in order)
            _must(fits, f"an order must name devices 0 .. {count - 1}, each once", order)
        for first, second in self.precedence():
            fits = 0 <= first < self.num_ops and 0 <= second < self.num_ops and first != second
            _must(fits, f"values and before must name two ops of 0 .. {self.num_ops - 1}", (first, second))

    def precedence(self) -> list[tuple[int, int]]:
        """Pairs (first, second), each once."""
        pairs = {(value.producer, consumer) for value in self.values for consumer in value.consumers}
        return sorted(pairs | set(self.before))

    def beginnings(self, least: int = 1) -> list[tuple[int, ...]]:
        """The devices that a pipeline may use, in order, each once: at least `least` of them."""
        found = [o[:n] for o in self.orders for n in ((len(o),) if self.uses_all else range(1, len(o) + 1))]
        return list(dict.fromkeys(order for order in found if len(order) >= least))

    def rows(self, num_microbatches: int) -> int:
        return self.batch_rows // num_microbatches

    def link(self, source: Sequence[int], target: Sequence[int]) -> tuple[float, float]:
        """(latency_s, seconds per byte) of a boundary between two sub-meshes."""
        at = np.ix_(list(source), list(target))
        lanes = min(len(source), len(target))
        return float(self.links.latency_s[at].max()), 1.0 / (lanes * float(self.links.bytes_per_s[at].min()))


def _must(holds: bool, rule: str, given: object) -> None:
    if not holds:
        raise InputError(f"{rule}, but got {given}.")
