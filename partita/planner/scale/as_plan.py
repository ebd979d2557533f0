"""From a `ScaleSolution` to a `Plan` of mode "layout", and from `Constraints` to `ScaleConstraints`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from partita.constraints import Constraints
from partita.cost.calibration import Calibration
from partita.cost.model import CollectiveKind
from partita.cost.networks import Channel, Fabric, channel
from partita.errors import InputError
from partita.plan import MOST_LISTED, Alternative, Plan, Prediction
from partita.plan_layout import Exchange, Layout, MachineGroup, worker_of
from partita.planner.scale.pieces import CutModel, Piece
from partita.planner.scale.solution import ScaleConstraints, ScaleSolution
from partita.planner.scale.solve_pieces import Layout as PieceLayout
from partita.planner.scale.step import State
from partita.planner.scale.ways import conversion, lay_text
from partita.planner.scale.works import Shards, WorkMaker
from partita.sharding.calls import Value

# Relative error of predicted step times that four of five published runs stay within where their own source had no
# part in fitting the constants (`benchmarks/results/published.json`: medians of 4 to 13 % by source left out).
UNCERTAINTY = 0.12
_REFUSED = ("num_workers", "threads_per_worker", "compiled", "stage_starts", "inputs")


def scale_constraints(constraints: Constraints, batch_size: int) -> ScaleConstraints:
    """The same corners for described GPUs.

    Raises:
        InputError: something is fixed that plans for described GPUs do not have, or the numbers do not fit the batch.
    """
    given = [name for name in _REFUSED if getattr(constraints, name) is not None]
    given += ["local_statistics"] if constraints.local_statistics else []
    if given:
        raise InputError(
            f"for a described cluster of GPUs, {', '.join(given)} cannot be fixed: workers are GPUs, and stages are "
            "runs of blocks. Fix data, tensor, pipeline, context, num_virtual_stages, micro_batch, num_microbatches, "
            "recompute, zero_stage or sequence_parallel."
        )
    if constraints.schedule == "gpipe":
        raise InputError('for a described cluster of GPUs, the schedule must be "1f1b" or None, but got "gpipe".')
    data, micro = _data_and_micro(constraints, batch_size)
    zero, virtual = constraints.zero_stage, constraints.num_virtual_stages
    if constraints.fully_sharded:
        if zero not in (None, 3):
            raise InputError(f"fully_sharded is zero_stage=3, but got zero_stage={zero} as well. Drop one.")
        zero = 3
    if constraints.schedule == "1f1b":
        if virtual not in (None, 1):
            raise InputError(f'schedule "1f1b" has one chunk a stage, but num_virtual_stages={virtual}. Drop one.')
        virtual = 1
    return ScaleConstraints(
        data=data, tensor=constraints.tensor, pipeline=constraints.pipeline, virtual=virtual,
        context=constraints.context, micro_batch=micro, recompute=constraints.recompute, zero=zero,
        sequence_parallel=constraints.sequence_parallel,
    )  # fmt: skip


def _data_and_micro(constraints: Constraints, batch_size: int) -> tuple[int | None, int | None]:
    """``data x micro_batch x num_microbatches`` is the batch: two of them give the third."""
    data, micro, count = constraints.data, constraints.micro_batch, constraints.num_microbatches
    if count is None:
        return data, micro
    if data is None and micro is None:
        raise InputError(
            f"num_microbatches={count} must come with data or micro_batch (their product is the batch of {batch_size} "
            "samples). Fix one of them as well."
        )
    known = count * (data or 1) * (micro or 1)
    rest, over = divmod(batch_size, known)
    if over or rest < 1 or (data is not None and micro is not None and rest != 1):
        raise InputError(
            f"data x micro_batch x num_microbatches must be the batch of {batch_size} samples, but got data={data}, "
            f"micro_batch={micro}, num_microbatches={count}."
        )
    return data if data is not None else rest, micro if micro is not None else rest


def plan_of(solution: ScaleSolution, fabric: Fabric, *, cluster_fingerprint: str) -> Plan:
    """The plan that tells `solution`.

    Args:
        solution: as `plan_at_scale` gives it, with its planner.
        fabric: on which it was planned.
        cluster_fingerprint: of the cluster (`partita.plan.cluster_fingerprint`).

    Example:
        >>> plan = plan_of(plan_at_scale(...), fabric, cluster_fingerprint="")  # doctest: +SKIP
        >>> plan.axes, plan.micro_batch, plan.prediction.gap  # doctest: +SKIP
        ({'pipeline': 8, 'data': 128, 'tensor': 8}, 1, 0.02)
    """
    axes = {name: solution.axes[name] for name in ("pipeline", "data", "tensor")}
    if solution.axes["context"] > 1:
        axes["context"] = solution.axes["context"]
    layout = Layout(
        machines=tuple(
            MachineGroup(
                kind=group.kind.gpu.name, num_machines=group.num_machines, gpus_per_machine=group.gpus_per_machine
            )
            for group in fabric.groups
        ),
        stages=solution.stages,
        num_layers=solution.num_layers,
        global_batch=solution.global_batch,
        activations=solution.activations,
        memory_limits_bytes=tuple(round(limit) for limit in solution.memory_limits_bytes),
        stage_kinds=solution.stage_kinds,
        parts_s=dict(solution.parts_s),
        num_parameters=solution.num_parameters,
        model_flops=solution.model_flops,
        exchanges=tuple(exchanges_of(solution, fabric)),
    )
    return Plan(
        mode="layout",
        graph_fingerprint=solution.planner.fingerprint,
        cluster_fingerprint=cluster_fingerprint,
        axes=axes,
        workers=tuple(worker_of(layout, axes, rank) for rank in range(solution.num_devices))
        if solution.num_devices <= MOST_LISTED
        else (),
        threads_per_worker=1,
        num_microbatches=solution.num_microbatches,
        schedule="interleaved" if solution.schedule == "interleaved" else "1f1b",
        stage_starts=tuple(stage[0][0] for stage in solution.stages[1:]),
        shares=(solution.global_batch // axes["data"],) * axes["data"] if axes["data"] <= MOST_LISTED else (),
        inputs={name: {"tensor": text} for name, text in sorted(solution.placements.items()) if text != "R"},
        prediction=Prediction(
            step_time_s=solution.step_time_s,
            lower_bound_s=solution.lower_bound_s,
            uncertainty=UNCERTAINTY,
            memory_bytes={str(stage): round(have) for stage, have in enumerate(solution.memory_bytes)},
            bytes_sent=0,
        ),
        alternatives=tuple(
            Alternative(
                description=other.text, predicted_step_time_s=other.step_time_s, measured_step_time_s=None,
                reason=f"{other.reason[0].upper()}{other.reason[1:]}.",
            )
            for other in solution.alternatives
        ),
        reasons=solution.reasons,
        micro_batch=solution.micro_batch,
        num_virtual_stages=solution.axes["virtual"],
        recompute=solution.recompute,
        zero_stage=solution.zero,
        sequence_parallel=solution.sequence_parallel,
        layout=layout,
    )  # fmt: skip


def exchanges_of(solution: ScaleSolution, fabric: Fabric) -> Iterator[Exchange]:
    """The collectives that placements inside blocks cause, and those of gradients and sharded parameters."""
    axes, maker = solution.axes, solution.planner.maker
    layouts = [maker.solver.layout(axes["tensor"], sequence=solution.sequence_parallel)]
    if axes["context"] > 1:
        layouts.append(maker.solver.layout(axes["context"], sequence=True, axis="context"))
    ends = [*solution.cuts[1:], len(maker.model.chain)]
    chunks = [
        [piece for piece, _ in maker.model.chain[begin:end]] for begin, end in zip(solution.cuts, ends, strict=True)
    ]
    p = axes["pipeline"]
    for number, piece in enumerate(maker.model.pieces):
        most = max(sum(chunk.count(number) for chunk in chunks[stage::p]) for stage in range(p))
        if most:
            inside = _inside(maker, piece, layouts, solution, channels_of(fabric, axes))
            of_data = _of_data(maker, piece, layouts, solution, channels_of(fabric, axes)["data"])
            for item in (*inside, *of_data):
                yield msgspec.structs.replace(item, count=item.count * most)


def channels_of(fabric: Fabric, axes: Mapping[str, int]) -> dict[str, Channel]:
    """The channels of the axes on the first stage's GPUs (see `partita.planner.scale.step`)."""
    tensor, context, span = axes["tensor"], axes["context"], axes["data"] * axes["tensor"] * axes["context"]
    sizes = {"tensor": (tensor, 1), "context": (context, tensor), "data": (axes["data"] * context, tensor)}
    return {
        axis: channel(fabric, Calibration(), num_ranks=ranks, stride=stride, span=span)
        for axis, (ranks, stride) in sizes.items()
    }


def _inside(
    maker: WorkMaker, piece: Piece, layouts: list[PieceLayout], solution: ScaleSolution, channels: Mapping[str, Channel]
) -> Iterator[Exchange]:
    model, places = maker.model, set(piece.ops)
    for layout in layouts:
        others = [other for other in layouts if other is not layout]
        for turn, place in layout.conversions:
            kind: Any = conversion(turn.source, turn.target)
            if place not in places or not kind:
                continue
            lays = [(other.lay_of(turn.value), other.size) for other in others]
            num_bytes = maker.num_bytes(turn.value, lays, solution.micro_batch)
            yield Exchange(
                block=piece.name,
                value=value_text(model, turn.value),
                module=module_of(model, turn.value, place),
                phase=turn.phase.value,
                axis=layout.axis,
                kind=kind,
                source=lay_text(turn.source),
                target=lay_text(turn.target),
                num_bytes=num_bytes,
                time_s=channels[layout.axis].collective_s(kind, num_bytes),
                count=solution.num_microbatches,
            )


def _of_data(
    maker: WorkMaker, piece: Piece, layouts: list[PieceLayout], solution: ScaleSolution, data: Channel
) -> Iterator[Exchange]:
    """Gradients are reduced over the data axis, parameters gathered where they are sharded (ZeRO)."""
    if data.num_ranks < 2:
        return
    state: State = solution.planner.state
    m, zero = solution.num_microbatches, solution.zero
    reduce: tuple[CollectiveKind, float] = ("reduce_scatter", state.exchange_bytes)
    gather: tuple[CollectiveKind, float] = ("all_gather", state.weight_bytes)
    table: dict[int, list[tuple[str, tuple[CollectiveKind, float], str, str, int]]] = {
        0: [("backward", ("all_reduce", state.exchange_bytes), "P", "R", 1)],
        1: [("backward", reduce, "P", "S", 1), ("forward", gather, "S", "R", 1)],
        2: [("backward", reduce, "P", "S", m), ("forward", gather, "S", "R", 1)],
        3: [("backward", reduce, "P", "S", m), ("forward", gather, "S", "R", m), ("backward", gather, "S", "R", m)],
    }
    shards = Shards(tuple(layouts))
    for value in maker.parameters(piece):
        elements = maker.num_bytes(value, shards.lays(value), 1) / value.spec.dtype.itemsize
        trained = value.name in maker.model.gradients
        name = maker.model.parameter_name(value.name)
        for phase, (kind, size), source, target, count in table[zero]:
            if (kind == "all_gather" and zero < 3 and not trained) or (kind != "all_gather" and not trained):
                continue
            yield Exchange(
                block=piece.name,
                value=name,
                module=name.rpartition(".")[0],
                phase=phase,
                axis="data",
                kind=kind,
                source=source,
                target=target,
                num_bytes=size * elements,
                # Many parameters share one collective: latencies are not each one's own.
                time_s=data.collective_s(kind, size * elements) - data.collective_s(kind, 0.0),
                count=count,
            )


def value_text(model: CutModel, value: Value) -> str:
    """A parameter's name (pattern), else the value's own."""
    return model.parameter_name(value.name) if value.name in model.parameters else value.name


def module_of(model: CutModel, value: Value, place: int) -> str:
    """Path (pattern) of the module that makes a value, or of the one that reads it where none makes it."""
    op = value.producer or model.programs[0].ops[place]
    if value.name in model.parameters:
        return model.parameter_name(value.name).rpartition(".")[0]
    return pattern_of(model, op.info.module if op.info is not None else "")


def pattern_of(model: CutModel, path: str) -> str:
    """A captured module's path with the number of its block replaced by ``*``."""
    for member, pattern in model.path_of.items():
        if path == member or path.startswith(member + "."):
            return pattern + path[len(member) :]
    return path
