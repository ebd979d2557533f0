"""The texts of a plan: a short table, the long explanation, and the difference of two plans."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from partita.plan import Plan
from partita.units import format_bytes, format_time


def title(plan: Plan) -> str:
    """One line: how the plan splits the step. ``"2 workers: data 2 x pipeline 1, 1 thread each, compiled"``."""
    how = "compiled" if plan.compiled else "not compiled"
    threads = f"{plan.threads_per_worker} thread{'s' if plan.threads_per_worker > 1 else ''} each"
    if plan.mode == "block":
        return f"plain PyTorch ({'torch.compile' if plan.compiled else 'eager'}), {threads}"
    data, pipeline, tensor = (plan.axes.get(axis, 1) for axis in ("data", "pipeline", "tensor"))
    mesh = f"data {data} x pipeline {pipeline}" + (f" x tensor {tensor}" if tensor > 1 else "")
    workers = f"{plan.num_workers} worker{'s' if plan.num_workers > 1 else ''}"
    text = f"{workers}: {mesh}, {threads}, {how}"
    if any("data" in by_axis for by_axis in plan.inputs.values()):
        text += ", fully sharded"
    if plan.num_microbatches > 1:
        text += f", {plan.num_microbatches} microbatches, {plan.schedule}"
    return text


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
        )
        rows.append(("sent per step", format_bytes(prediction.bytes_sent)))
    if plan.measured_step_time_s is not None:
        rows.append(("measured step", format_time(plan.measured_step_time_s)))
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
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


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
    if plan.placements:
        lines = [
            f"- {name}: " + ", ".join(f"{axis} {text}" for axis, text in axes.items())
            for name, axes in sorted(plan.placements.items())
        ]
        parts.append("Placements\n" + "\n".join(lines))
    parts.append(f"Model {plan.graph_fingerprint}, cluster {plan.cluster_fingerprint}, plan {plan.hash}.")
    return "\n\n".join(parts)


def difference(plan: Plan, other: Plan) -> str:
    """One line per field that differs."""
    lines = []
    for name in plan.__struct_fields__:
        first, second = getattr(plan, name), getattr(other, name)
        if first != second:
            lines.append(f"{name}: {_short(first)} -> {_short(second)}")
    return "\n".join(lines)


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
