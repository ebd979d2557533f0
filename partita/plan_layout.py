"""The regular layout of a plan for described GPUs: thousands of workers told by extents instead of one by one.

Worker r of axes with extents ``n_1 .. n_k`` (in `Layout.order`, fastest first) has the coordinates of r as a number of
mixed radix, ``r = c_1 + n_1 (c_2 + n_2 (c_3 + ...))``, as ranks of Megatron-LM have; it is GPU ``r mod g`` of its
machine, for machines of g GPUs that follow each other in rank order.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from partita.errors import PlanError

ORDER = ("tensor", "context", "data", "pipeline")


class Worker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker: a thread of process `process` that owns the device made of `cores` (or GPU `gpu`)."""

    index: int
    process: int
    machine: int
    cores: tuple[int, ...]
    stage: int  # coordinate on the pipeline axis
    data: int  # coordinate on the data axis
    tensor: int = 0  # coordinate on the tensor axis
    gpu: int | None = None
    context: int = 0  # coordinate on the context axis


class MachineGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal machines that follow each other in rank order; `kind` is the GPU's name."""

    kind: str
    num_machines: int
    gpus_per_machine: int


class Exchange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One collective that placements cause, for one microbatch and one block.

    Attributes:
        block: pattern of the blocks that do it ("model.layers.*"), "input" or "output".
        value: what is exchanged: a parameter, or a value and the op that makes it.
        module: path (pattern) of the module whose op makes or reads the value.
        phase: "forward" or "backward".
        axis, kind: mesh axis, and "all_reduce", "reduce_scatter", "all_gather" or "all_to_all".
        source, target: placements before and after, e.g. "P" and "S(1)".
        num_bytes: of the whole value along `axis`, as one worker takes part in it.
        time_s: of one exchange on the GPUs of the first stage, without what may hide it.
        count: how often a worker of the busiest stage does it in a step.
    """

    block: str
    value: str
    module: str
    phase: str
    axis: str
    kind: str
    source: str
    target: str
    num_bytes: float
    time_s: float
    count: int


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan for described GPUs says beside its axes.

    Attributes:
        machines: groups of equal machines in rank order, idle ones included.
        order: mesh axes, the one along which rank numbers run fastest first.
        stages: for each stage, for each of its chunks, ``(first, last)`` blocks in model order.
        num_layers: blocks of each chunk in model order (embedding and head not counted).
        global_batch: samples of one step.
        activations: placement of values between blocks along the tensor axis.
        memory_limits_bytes: of one GPU of each stage.
        stage_kinds: kinds of GPU of each stage.
        parts_s: what the predicted step time is made of.
        num_parameters, model_flops: of the whole model; FLOPs of one step without recomputation.
        exchanges: the collectives that placements cause inside blocks.
    """

    machines: tuple[MachineGroup, ...]
    stages: tuple[tuple[tuple[str, str], ...], ...]
    num_layers: tuple[int, ...]
    global_batch: int
    activations: str = "R"
    order: tuple[str, ...] = ORDER
    memory_limits_bytes: tuple[int, ...] = ()
    stage_kinds: tuple[str, ...] = ()
    parts_s: dict[str, float] = {}
    num_parameters: float = 0.0
    model_flops: float = 0.0
    exchanges: tuple[Exchange, ...] = ()

    @property
    def num_gpus_there(self) -> int:
        return sum(group.num_machines * group.gpus_per_machine for group in self.machines)


def worker_of(layout: Layout, axes: Mapping[str, int], index: int) -> Worker:
    """The worker with rank `index`.

    Example:
        >>> group = MachineGroup(kind="H100", num_machines=2, gpus_per_machine=8)
        >>> layout = Layout(machines=(group,), stages=((("a", "a"),),), num_layers=(1,), global_batch=4)
        >>> worker_of(layout, {"tensor": 4, "data": 4}, 13).data
        3

    Raises:
        PlanError: there is no such worker, or the machines end before it.
    """
    rest, place = index, {}
    for axis in layout.order:
        rest, place[axis] = divmod(rest, axes.get(axis, 1))
    if index < 0 or rest:
        raise PlanError(f"the plan has no worker {index} on axes {dict(axes)}.")
    gpu, machine = index, 0
    for group in layout.machines:
        num_gpus = group.num_machines * group.gpus_per_machine
        if gpu < num_gpus:
            number, local = divmod(gpu, group.gpus_per_machine)
            return Worker(
                index=index, process=index, machine=machine + number, cores=(), gpu=local,
                stage=place["pipeline"], data=place["data"], tensor=place["tensor"], context=place["context"],
            )  # fmt: skip
        gpu, machine = gpu - num_gpus, machine + group.num_machines
    raise PlanError(f"worker {index} must lie on a machine of the layout, but there are {layout.num_gpus_there} GPUs.")
