"""`ScaleSolution`: how to train a model on a cluster, without programs: degrees, stages, micro-batches, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from partita.arguments import check_count, check_number, told
from partita.errors import InputError
from partita.planner.scale.step import Remat
from partita.units import gap_of


@dataclass(frozen=True, kw_only=True)
class ScaleConstraints:
    """What of a plan is fixed beforehand; None leaves it to the search.

    Attributes:
        data, tensor, pipeline, context: degrees (context: the sequence is cut, weights are whole).
        virtual: chunks of blocks that a pipeline stage holds (more than 1: the interleaved schedule).
        micro_batch: samples per micro-batch.
        recompute: what the backward pass computes again.
        zero: what is sharded over the data axis (0 nothing, 1 optimizer state, 2 + gradients, 3 + parameters).
        sequence_parallel: whether values between blocks are cut along the tensor axis.
    """

    data: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    virtual: int | None = None
    context: int | None = None
    micro_batch: int | None = None
    recompute: Remat | None = None
    zero: int | None = None
    sequence_parallel: bool | None = None

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline", "virtual", "context", "micro_batch"):
            value = getattr(self, name)
            if value is not None:
                check_count(value, name)
        if self.zero is not None:
            check_number(self.zero, "zero", least=0, most=3, whole=True)
        if self.recompute not in (None, *get_args(Remat)):
            raise InputError(f"recompute must be one of {get_args(Remat)} or None, but got {told(self.recompute)}.")


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way, its predicted time, and why it was not taken."""

    text: str
    step_time_s: float
    peak_memory_bytes: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class ScaleSolution:
    """The fastest way found, and how near to the best possible it is proven to be.

    Attributes:
        axes: degree by axis name: "data", "tensor", "pipeline", "virtual", "context", "expert".
        stages: for each stage, for each of its chunks, ``(first, last)`` block names in model order.
        cuts: index, among all blocks and gaps of the model in order, at which each chunk begins.
        num_layers: blocks of each chunk, in model order (gaps, that is embedding and head, not counted).
        num_devices: devices used, of `num_devices_there`.
        global_batch: samples of one step; ``data * micro_batch * num_microbatches``.
        schedule: "1f1b", or "interleaved" where a stage holds several chunks.
        recompute, zero, sequence_parallel: see `ScaleConstraints`.
        placements: along the tensor axis, by parameter name with ``*`` for the number of a block: "R", "S(0)", ...
        activations: the same for values between blocks.
        step_time_s, parts_s: predicted, and what it is made of.
        memory_bytes: predicted peak of one device of each stage; limits in `memory_limits_bytes`.
        lower_bound_s: no way in the searched space is faster under the cost model.
        stage_kinds: kind of device of each stage.
        num_parameters, model_flops: of the whole model; FLOPs of one step, recomputation not counted.
        reasons: what limits the solution, in words.
        alternatives: the best other ways.
        seconds: what planning took.
    """

    axes: Mapping[str, int]
    stages: tuple[tuple[tuple[str, str], ...], ...]
    cuts: tuple[int, ...]
    num_layers: tuple[int, ...]
    num_devices: int
    num_devices_there: int
    global_batch: int
    micro_batch: int
    num_microbatches: int
    schedule: str
    recompute: Remat
    zero: int
    sequence_parallel: bool
    placements: Mapping[str, str]
    activations: str
    step_time_s: float
    parts_s: Mapping[str, float]
    memory_bytes: tuple[float, ...]
    memory_limits_bytes: tuple[float, ...]
    lower_bound_s: float
    stage_kinds: tuple[str, ...]
    num_parameters: float
    model_flops: float
    reasons: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    seconds: Mapping[str, float]  # what planning took: "capture", "placements and prices", "search"
    planner: Any = field(default=None, repr=False, compare=False)  # keeps captures and prices, for `replan`

    @property
    def gap(self) -> float:
        """The share of the step time that could at most be saved."""
        return gap_of(self.step_time_s, self.lower_bound_s)

    @property
    def flops_per_device_s(self) -> float:
        """Model FLOP/s of one device (recomputation not counted)."""
        return self.model_flops / self.step_time_s / self.num_devices

    def text(self) -> str:
        """One line: degrees, micro-batches and what is saved."""
        return way_text(
            self.axes, self.micro_batch, self.num_microbatches, self.recompute, self.zero, self.sequence_parallel
        )


def way_text(
    axes: Mapping[str, int], micro_batch: int, num_microbatches: int, recompute: str, zero: int, sequence_parallel: bool
) -> str:
    """The degrees above 1 and the settings, in words."""
    degrees = " ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one device"
    saved = [] if recompute == "none" else [f"recompute {recompute}"]
    saved += [f"zero {zero}"] if zero else []
    saved += ["sequence parallel"] if sequence_parallel else []
    return ", ".join([degrees, f"{num_microbatches} x {micro_batch} samples", *saved])
