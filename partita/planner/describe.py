"""The texts of a plan: a short table, the long explanation, and the difference of two plans."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from partita.plan import Plan, Prediction
from partita.plan_layout import Exchange, Layout
from partita.units import format_bytes, format_flops, format_time

_MOST_KEYS = 20  # of a field's entries in a comparison


def title(plan: Plan) -> str:
    """One line: how the plan splits the step. ``"2 workers: data 2 x pipeline 1, 1 thread each, compiled"``."""
    how = "compiled" if plan.compiled else "not compiled"
    threads = f"{plan.threads_per_worker} thread{'s' if plan.threads_per_worker > 1 else ''} each"
    if plan.mode == "block":
        return f"plain PyTorch ({'torch.compile' if plan.compiled else 'eager'}), {threads}"
    if plan.layout is not None:
        return _layout_title(plan)
    data, pipeline, tensor = (plan.axes.get(axis, 1) for axis in ("data", "pipeline", "tensor"))
    mesh = f"data {data} x pipeline {pipeline}" + (f" x tensor {tensor}" if tensor > 1 else "")
    workers = f"{plan.num_workers} worker{'s' if plan.num_workers > 1 else ''}"
    text = f"{workers}: {mesh}, {threads}, {how}"
    if any("data" in by_axis for by_axis in plan.inputs.values()):
        text += ", fully sharded"
    if plan.num_microbatches > 1:
        text += f", {plan.num_microbatches} microbatches, {plan.schedule}"
    if plan.bucket_bytes:
        text += f", exchange in background by {format_bytes(plan.bucket_bytes)}"
    return text


def _layout_title(plan: Plan) -> str:
    """``"1024 GPUs: data 16 x pipeline 8 x tensor 8, 96 microbatches of 1 samples, 1f1b, ZeRO 1"``."""
    axes = [axis for axis in ("data", "pipeline", "tensor", "context") if axis in plan.axes]
    mesh = " x ".join(f"{axis} {plan.axes[axis]}" for axis in axes)
    parts = [f"{plan.num_workers} GPUs: {mesh}", f"{plan.num_microbatches} microbatches of {plan.micro_batch}"]
    chunks = f" ({plan.num_virtual_stages} chunks a stage)" if plan.num_virtual_stages > 1 else ""
    parts += [f"{plan.schedule}{chunks}"] if plan.axes.get("pipeline", 1) > 1 else []
    parts += [f"recompute {plan.recompute}"] if plan.recompute != "none" else []
    parts += [f"ZeRO {plan.zero_stage}"] if plan.zero_stage else []
    parts += ["sequence parallel"] if plan.sequence_parallel else []
    return ", ".join(parts)


def table(plan: Plan) -> str:
    """The short table that ``print(plan)`` shows."""
    rows = [("plan", title(plan))]
    prediction = plan.prediction
    if prediction is not None:
        rows.append(("predicted step", f"{format_time(prediction.step_time_s)} +-{prediction.uncertainty:.0%}"))
        rows.append(("lower bound", f"{format_time(prediction.lower_bound_s)} (gap {prediction.gap:.0%})"))
        rows.append(
            (
                "peak memory",
                ", ".join(
                    f"process {rank}: {format_bytes(num_bytes)}" for rank, num_bytes in prediction.memory_bytes.items()
                )
                or "unknown",
            )
            if plan.layout is None
            else ("peak memory", _peak_of_layout(plan.layout, prediction))
        )
        if plan.layout is None:
            rows.append(("sent per step", format_bytes(prediction.bytes_sent)))
    if plan.measured_step_time_s is not None:
        rows.append(("measured step", format_time(plan.measured_step_time_s)))
    if plan.layout is not None:
        rows += _layout_rows(plan, plan.layout)
        return _aligned(rows)
    if plan.shares:
        rows.append(("rows", " + ".join(map(str, plan.shares))))
    for stage, start in enumerate(plan.stage_starts, start=1):
        rows.append((f"stage {stage} from", start))
    for worker in plan.workers:
        device = f"GPU {worker.gpu}" if worker.gpu is not None else f"cores {_ranges(worker.cores)}"
        rows.append(
            (
                f"worker {worker.index}",
                f"stage {worker.stage}, data {worker.data}"
                + (f", tensor {worker.tensor}" if plan.axes.get("tensor", 1) > 1 else "")
                + f": process {worker.process}, machine {worker.machine}, "
                f"{device}",
            )
        )
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _peak_of_layout(layout: Layout, prediction: Prediction) -> str:
    """The stage whose GPUs are fullest."""
    limits = layout.memory_limits_bytes
    share = {stage: num_bytes / limits[int(stage)] for stage, num_bytes in prediction.memory_bytes.items()}
    stage = max(share, key=lambda one: share[one])
    have, limit = prediction.memory_bytes[stage], limits[int(stage)]
    return f"stage {stage}: {format_bytes(have)} of {format_bytes(limit)} a GPU"


def _layout_rows(plan: Plan, layout: Layout) -> list[tuple[str, str]]:
    rows = [("batch", f"{layout.global_batch} samples")]
    if plan.prediction is not None and layout.model_flops:
        rate = layout.model_flops / plan.prediction.step_time_s / plan.num_workers
        rows.append(("model FLOP/s", f"{format_flops(rate)}/s a GPU"))
    for group in layout.machines:
        rows.append(("machines", f"{group.num_machines} x {group.gpus_per_machine} {group.kind}"))
    rows.append(("ranks", f"{layout.order[0]} fastest, then {', '.join(layout.order[1:])}"))
    for first, last, text in _equal_stages(plan, layout):
        rows.append((f"stage {first}" if first == last else f"stages {first}-{last}", text))
    return rows


def _equal_stages(plan: Plan, layout: Layout) -> list[tuple[int, int, str]]:
    """Stages with equally many blocks of the same kind of GPU, together."""
    p = len(layout.stages)
    found: list[tuple[int, int, str]] = []
    for stage, chunks in enumerate(layout.stages):
        counts = layout.num_layers[stage::p]
        kind = layout.stage_kinds[stage] if layout.stage_kinds else ""
        text = f"{' + '.join(map(str, counts))} blocks on {kind}"
        if stage == 0 or stage == p - 1 or p <= 4:
            text += f" ({', '.join(first if first == last else f'{first} to {last}' for first, last in chunks)})"
        if found and found[-1][2] == text:
            found[-1] = (found[-1][0], stage, text)
        else:
            found.append((stage, stage, text))
    return found


def explanation(plan: Plan) -> str:
    """The long text that `Plan.explain` gives."""
    parts = [table(plan)]
    if plan.reasons:
        parts.append("Why\n" + "\n".join(f"- {reason}" for reason in plan.reasons))
    if plan.alternatives:
        lines = []
        for other in plan.alternatives:
            times = f"predicted {format_time(other.predicted_step_time_s)}"
            if other.measured_step_time_s is not None:
                times += f", measured {format_time(other.measured_step_time_s)}"
            lines.append(f"- {other.description}: {times}. {other.reason}")
        parts.append("Alternatives\n" + "\n".join(lines))
    if plan.layout is not None:
        parts += _layout_parts(plan, plan.layout)
    if plan.placements:
        lines = [
            f"- {name}: " + ", ".join(f"{axis} {text}" for axis, text in axes.items())
            for name, axes in sorted(plan.placements.items())
        ]
        parts.append("Placements\n" + "\n".join(lines))
    parts.append(f"Model {plan.graph_fingerprint}, cluster {plan.cluster_fingerprint}, plan {plan.hash}.")
    return "\n\n".join(parts)


def _layout_parts(plan: Plan, layout: Layout) -> list[str]:
    """Placements of parameters, and the exchanges that take longest."""
    lines = [
        f"- {name}: {', '.join(f'{axis} {text}' for axis, text in placed.items())}"
        for name, placed in plan.inputs.items()
    ]
    lines += [f"- values between blocks: tensor {layout.activations}"] if plan.axes.get("tensor", 1) > 1 else []
    parts = ["Placements\n" + "\n".join(lines)] if lines else []
    worst = sorted(layout.exchanges, key=lambda item: -item.time_s * item.count)[:10]
    lines = [f"- {exchange_text(item)}" for item in worst]
    parts += ["Exchanges, longest first (not what hides them)\n" + "\n".join(lines)] if lines else []
    return parts


def exchange_text(item: Exchange) -> str:
    """``"blocks.*: addmm_5 all_reduce over tensor, P -> R, 2.0 MiB, 20 us, 96 times a step: 1.9 ms"``."""
    return (
        f"{item.module or item.block}: {item.value} {item.kind} over {item.axis} ({item.phase}), {item.source} -> "
        f"{item.target}, {format_bytes(item.num_bytes)}, {format_time(item.time_s)}, {item.count} times a step: "
        f"{format_time(item.time_s * item.count)}"
    )


def difference(plan: Plan, other: Plan) -> str:
    """One line per field that differs."""
    lines = []
    for name in plan.__struct_fields__:
        first, second = getattr(plan, name), getattr(other, name)
        if first != second:
            lines.append(f"{name}: {_short(first)} -> {_short(second)}")
    return "\n".join(lines)


def comparison(plan: Plan, other: Plan) -> str:
    """What differs, for people: both in a line, times and memory beside each other, then fields that decide what runs.
    "" if the plans are equal."""
    if plan == other:
        return ""
    rows = [("", title(plan), title(other))]
    first, second = plan.prediction, other.prediction
    if first is not None and second is not None:
        ratio = second.step_time_s / first.step_time_s if first.step_time_s > 0 else 1.0
        tie = abs(ratio - 1) <= max(first.uncertainty, second.uncertainty)
        verdict = f" ({ratio:.2f} times{', a tie within the uncertainty' if tie else ''})" if ratio != 1 else ""
        rows.append(("predicted step", format_time(first.step_time_s), format_time(second.step_time_s) + verdict))
        rows.append(("lower bound", format_time(first.lower_bound_s), format_time(second.lower_bound_s)))
        peaks = [format_bytes(max(one.memory_bytes.values(), default=0)) for one in (first, second)]
        rows.append(("peak memory", peaks[0], peaks[1]))
    if plan.layout is not None and other.layout is not None:
        parts = [name for name in plan.layout.parts_s if name in other.layout.parts_s]
        rows += [
            (f"  {name}", format_time(plan.layout.parts_s[name]), format_time(other.layout.parts_s[name]))
            for name in parts
        ]
    lines = [f"{name + ': ' if name else ''}{one} -> {two}" for name, one, two in rows if one != two]
    told = ("prediction", "alternatives", "reasons", "layout", "workers")
    for name in plan.__struct_fields__:
        one, two = getattr(plan, name), getattr(other, name)
        if one == two or name in told:
            continue
        if isinstance(one, dict) and isinstance(two, dict):
            keys = [key for key in {**one, **two} if one.get(key) != two.get(key)]
            lines += [f"{name}[{key}]: {_short(one.get(key))} -> {_short(two.get(key))}" for key in keys[:_MOST_KEYS]]
            lines += [f"{name}: {len(keys) - _MOST_KEYS} more differ"] if len(keys) > _MOST_KEYS else []
        else:
            lines.append(f"{name}: {_short(one)} -> {_short(two)}")
    if plan.num_workers != other.num_workers:
        lines.append(f"workers: {plan.num_workers} -> {other.num_workers}")
    if plan.layout is not None and other.layout is not None and plan.layout.num_layers != other.layout.num_layers:
        lines.append(f"blocks by chunk: {_short(plan.layout.num_layers)} -> {_short(other.layout.num_layers)}")
    return "\n".join(lines) or "predictions and explanations alone"


def _short(value: object) -> str:
    text = msgspec.json.encode(value, order="sorted").decode()
    return text if len(text) <= 200 else text[:197] + "..."


def _ranges(cores: Sequence[int]) -> str:
    """``(0, 1, 2, 5) -> '0-2,5'``."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs) or "none"
