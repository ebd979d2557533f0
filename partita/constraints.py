"""`Constraints`: what of a plan the user fixes beforehand."""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec

from partita.arguments import told
from partita.errors import InputError
from partita.sharding.placement import dim_of

Schedule = Literal["gpipe", "1f1b"]
Recompute = Literal["none", "selective", "full"]
ONLY_DESCRIBED = ("context", "num_virtual_stages", "micro_batch", "recompute", "zero_stage", "sequence_parallel")
_COUNTS = (
    "data", "tensor", "pipeline", "num_workers", "threads_per_worker", "num_microbatches", "context",
    "num_virtual_stages", "micro_batch",
)  # fmt: skip


class Constraints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Corners of the plan space fixed by the user; None leaves the choice to the planner.

    `num_workers` counts the workers of the whole job. `stage_starts` names the first op of every stage but the first.
    `local_statistics` lets ops that couple samples (BatchNorm) use the statistics of their own shard or microbatch.
    `inputs` says how inputs of the step lie along mesh axes, by their names or patterns of them (`fnmatch`):
    ``{"*.up.weight": {"tensor": "S(0)"}, "*.down.weight": {"tensor": "S(1)"}, "batch*": {"tensor": "S(1)"}}``;
    parameters go by their dotted names, tensors of the batch by ``batch`` and their path. `fully_sharded` cuts every
    parameter that is large enough over the data axis: each worker stores and updates its part, and gathers the whole
    where it is read.
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
    inputs: dict[str, dict[str, str]] | None = None
    fully_sharded: bool = False
    context: int | None = None
    num_virtual_stages: int | None = None
    micro_batch: int | None = None
    recompute: Recompute | None = None
    zero_stage: int | None = None
    sequence_parallel: bool | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"Constraints.{name} must be a positive integer or None, but got {value!r}.")
        for name in ("compiled", "local_statistics", "fully_sharded", "sequence_parallel"):
            value = getattr(self, name)
            may_be_none = name in ("compiled", "sequence_parallel")
            if not isinstance(value, bool) and not (value is None and may_be_none):
                none = " or None" if may_be_none else ""
                raise InputError(f"Constraints.{name} must be True, False{none}, but got {told(value)}.")
        starts: object = self.stage_starts
        if starts is not None and not (
            isinstance(starts, (tuple, list)) and all(isinstance(start, str) for start in starts)
        ):
            raise InputError(
                f"Constraints.stage_starts must be a tuple of names of ops or None, but got {told(starts)}. Pass e.g. "
                f"({starts if isinstance(starts, str) else 'addmm'!r},)."
            )
        if isinstance(starts, list):
            msgspec.structs.force_setattr(self, "stage_starts", tuple(starts))
        _check_inputs(self.inputs)
        if self.schedule not in (None, "gpipe", "1f1b"):
            near = difflib.get_close_matches(str(self.schedule), ["gpipe", "1f1b"], n=1, cutoff=0.0)[0]
            raise InputError(
                f'Constraints.schedule must be "gpipe" or "1f1b", but got {self.schedule!r}. Did you mean {near!r}?'
            )
        if self.recompute not in (None, "none", "selective", "full"):
            raise InputError(
                f'Constraints.recompute must be "none", "selective", "full" or None, but got {self.recompute!r}.'
            )
        if self.zero_stage not in (None, 0, 1, 2, 3) or isinstance(self.zero_stage, bool):
            raise InputError(f"Constraints.zero_stage must be 0, 1, 2, 3 or None, but got {self.zero_stage!r}.")
        data, pipeline, tensor, total = self.data, self.pipeline, self.tensor or 1, self.num_workers
        if total is not None and data is not None and pipeline is not None and data * pipeline * tensor != total:
            raise InputError(
                f"data * pipeline * tensor must equal num_workers, but got data={data}, pipeline={pipeline}, "
                f"tensor={tensor} and num_workers={total}. Drop num_workers, or set it to {data * pipeline * tensor}."
            )
        for name, value in (("data", data), ("pipeline", pipeline), ("tensor", self.tensor)):
            if total is not None and value is not None and total % value:
                raise InputError(
                    f"num_workers must be a multiple of {name}, but got num_workers={total} and {name}={value}."
                )
        if self.stage_starts is not None and pipeline is not None and len(self.stage_starts) != pipeline - 1:
            raise InputError(
                f"stage_starts must name the first op of every stage but the first: {pipeline - 1} names for "
                f"pipeline={pipeline}, but got {len(self.stage_starts)}."
            )


def refuse_described(constraints: Constraints) -> None:
    """What only plans for described GPUs can have must not be fixed for others.

    Raises:
        InputError: it is.
    """
    given = [name for name in ONLY_DESCRIBED if getattr(constraints, name) is not None]
    if given:
        raise InputError(
            f"{', '.join(given)} can be fixed only for a described cluster of GPUs, e.g. Cluster.preset('4x8xH100'), "
            "but the plan is for processors or for the machines here. Leave them out."
        )


def _check_inputs(inputs: object) -> None:
    if inputs is None:
        return
    wanted = 'names (or patterns) of inputs -> mesh axis -> placement, e.g. {"fc.weight": {"tensor": "S(0)"}}'
    if not isinstance(inputs, dict):
        raise InputError(f"Constraints.inputs must map {wanted}, but got {told(inputs)}.")
    for name, by_axis in inputs.items():
        if not isinstance(name, str) or not isinstance(by_axis, dict):
            raise InputError(f"Constraints.inputs must map {wanted}, but has {name!r}: {by_axis!r}.")
        for axis, text in by_axis.items():
            if axis not in ("tensor", "data"):
                raise InputError(
                    f'the axes of Constraints.inputs must be "tensor" or "data", but {name!r} names {axis!r}.'
                )
            dim_of(text) if isinstance(text, str) else dim_of(repr(text))
