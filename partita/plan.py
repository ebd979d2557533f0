"""`Plan`: how one model's training step is split over workers, as a value (JSON in and out)."""

from __future__ import annotations

from typing import Literal

import msgspec

Schedule = Literal["gpipe", "1f1b"]


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """One worker: a thread of process `process` that owns the device made of `cores` (or GPU `gpu`)."""

    index: int
    process: int
    machine: int
    cores: tuple[int, ...]
    stage: int  # coordinate on the pipeline axis
    data: int  # coordinate on the data axis
    gpu: int | None = None


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost model says of a plan. `lower_bound_s` is proven for every plan of the searched space under the same
    cost model; `uncertainty` is the relative error that the cost model expects of `step_time_s`."""

    step_time_s: float
    lower_bound_s: float
    uncertainty: float
    memory_bytes: dict[str, int]  # peak by process rank (as text)
    bytes_sent: int = 0  # between processes, per step

    @property
    def gap(self) -> float:
        """Relative distance to the lower bound: 0 means proven optimal under the cost model."""
        return self.step_time_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that was considered and not taken."""

    description: str
    predicted_step_time_s: float
    measured_step_time_s: float | None
    reason: str


class Constraints(msgspec.Struct, frozen=True, kw_only=True):
    """Corners of the plan space fixed by the user; None leaves the choice to the planner.

    `num_workers` counts the workers of the whole job. `stage_starts` names the first op of every stage but the first.
    `local_statistics` lets ops that couple samples (BatchNorm) use the statistics of their own shard or microbatch.
    """

    data: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    num_workers: int | None = None
    threads_per_worker: int | None = None
    num_microbatches: int | None = None
    schedule: Schedule | None = None
    compiled: bool | None = None
    stage_starts: tuple[str, ...] | None = None
    local_statistics: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How one model's training step is split over workers.

    `mode` "graph" runs the captured graph as programs; "block" runs plain PyTorch on the whole batch on one worker (eager,
    or `torch.compile` if `compiled`), with `reasons` saying why. Mesh axes are "pipeline" (stages) and "data" (rows of the
    batch); `axes` gives their extents. `stage_starts` holds the name of the first forward op (in the graph's order)
    of every stage but the first. `shares` gives the rows of the global batch of each data coordinate. `placements` maps
    op names to placement texts per mesh axis, e.g. ``{"addmm": {"data": "S(0)"}}``.
    """

    mode: Literal["graph", "block"]
    graph_fingerprint: str
    cluster_fingerprint: str
    axes: dict[str, int]
    workers: tuple[Worker, ...]
    threads_per_worker: int
    num_microbatches: int = 1
    schedule: Schedule = "1f1b"
    compiled: bool = False
    stage_starts: tuple[str, ...] = ()
    shares: tuple[int, ...] = ()
    placements: dict[str, dict[str, str]] = {}
    prediction: Prediction | None = None
    measured_step_time_s: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    reasons: tuple[str, ...] = ()
    local_statistics: bool = False
    version: int = 1
