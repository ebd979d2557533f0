"""`TrainingLayout`: what the configuration files of other engines say of a plan, independent of their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.errors import InputError
from partita.plan import Plan
from partita.planner.scale.solution import ScaleSolution


@dataclass(frozen=True, kw_only=True)
class TrainingLayout:
    """Degrees, stages and micro-batches of a plan.

    Attributes:
        data, tensor, pipeline, context: degrees.
        num_layers: blocks of each chunk in model order; chunk c lies on stage ``c % pipeline``. The embedding belongs
        to
            the first chunk, the head to the last.
        micro_batch, global_batch: samples.
        recompute: "none", "selective" or "full".
        zero: 0 to 3.
        sequence_parallel: whether values between blocks are cut along the tensor axis.
    """

    data: int
    tensor: int
    pipeline: int
    context: int
    num_layers: tuple[int, ...]
    micro_batch: int
    global_batch: int
    recompute: str
    zero: int
    sequence_parallel: bool

    def __post_init__(self) -> None:
        if len(self.num_layers) % self.pipeline or self.global_batch % (self.data * self.micro_batch):
            raise InputError(
                "chunks must be a multiple of the stages and the batch one of data x micro-batch, but got "
                f"{len(self.num_layers)} chunks on {self.pipeline} stages and a batch of {self.global_batch} for "
                f"{self.data} x {self.micro_batch}."
            )

    @property
    def virtual(self) -> int:
        """Chunks of each stage."""
        return len(self.num_layers) // self.pipeline

    @property
    def num_devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def num_microbatches(self) -> int:
        return self.global_batch // (self.data * self.micro_batch)

    @property
    def is_even(self) -> bool:
        """Whether all chunks hold equally many blocks."""
        return len(set(self.num_layers)) == 1


def layout_of(solution: ScaleSolution) -> TrainingLayout:
    """What engines are told of ``solution``.

    Raises:
        InputError: the model is no single list of blocks between an embedding and a head.
    """
    _check_tower(solution.stages, solution.num_layers)
    return TrainingLayout(
        data=solution.axes["data"],
        tensor=solution.axes["tensor"],
        pipeline=solution.axes["pipeline"],
        context=solution.axes["context"],
        num_layers=solution.num_layers,
        micro_batch=solution.micro_batch,
        global_batch=solution.global_batch,
        recompute=solution.recompute,
        zero=solution.zero,
        sequence_parallel=solution.sequence_parallel,
    )


def layout_of_plan(plan: Plan) -> TrainingLayout:
    """What engines are told of a plan for described GPUs.

    Raises:
        InputError: the plan is for the runtime here, or its model is no single list of blocks.
    """
    layout = plan.layout
    if layout is None:
        raise InputError(
            f'export needs a plan for a described cluster of GPUs (mode "layout"), but this one has mode '
            f"{plan.mode!r}, which partita itself runs. Plan with a cluster such as Cluster.preset('128x8xH100')."
        )
    _check_tower(layout.stages, layout.num_layers)
    return TrainingLayout(
        data=plan.axes.get("data", 1),
        tensor=plan.axes.get("tensor", 1),
        pipeline=plan.axes.get("pipeline", 1),
        context=plan.axes.get("context", 1),
        num_layers=layout.num_layers,
        micro_batch=plan.micro_batch or 1,
        global_batch=layout.global_batch,
        recompute=plan.recompute,
        zero=plan.zero_stage,
        sequence_parallel=plan.sequence_parallel,
    )


def _check_tower(stages: Sequence[Sequence[tuple[str, str]]], num_layers: Sequence[int]) -> None:
    first, last = stages[0][0][0], stages[-1][-1][1]
    inner = [name for stage in stages for pair in stage for name in pair if ".." in name]
    if inner or sum(num_layers) < 1:
        raise InputError(
            "an engine's configuration tells one list of blocks between an embedding and a head, but the model has "
            f"{first!r} to {last!r} with {inner[:2] or 'no blocks'}; export is for models of one tower."
        )


def refuse(engine: str, must: str, given: object, change: str) -> InputError:
    """What a format cannot express."""
    return InputError(f"{engine} needs {must}, but the plan has {given}. {change}")
