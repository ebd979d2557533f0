"""How long planning for 8 to 100,000 GPUs takes, and what it finds beside published best configurations.

    python -m benchmarks.planner_scale --json F [--plot FILE.svg]

GPT-3 175B and Llama-3.1 405B as plain modules on ``meta`` (`benchmarks.families.scale`). Rows: ``kind`` is "plan" (one
number of devices; capture included the first time), "replan" (other cluster), "depth" (8 to 128 layers), "width", or
"published" (a configuration that its authors report as their best, priced by the same model, beside the one found).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Row, option_parser, show
from benchmarks.families import scale as models
from partita.cluster.presets import GPU_KINDS
from partita.cost.networks import Fabric, NodeGroup
from partita.errors import InfeasibleError
from partita.planner.scale.plan import ScalePlanner
from partita.planner.scale.search import Effort
from partita.planner.scale.solution import ScaleConstraints, ScaleSolution
from partita.planner.scale.widths import WidthPlanner

DEVICES = (8, 64, 512, 1024, 4096, 16384, 32768, 100_000)
DEPTHS = (8, 16, 32, 64, 96, 128)
PLAN_LIMIT_S, REPLAN_LIMIT_S = 30.0, 0.1
COLUMNS = ("model", "kind", "devices", "layers", "seconds", "step_time_s", "gap", "tflops", "plan", "published")

# Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021, table 1
# (80 GB A100, sequences of 2,048 tokens); Grattafiori et al., "The Llama 3 Herd of Models", 2024, table 4 (H100;
# batches of 16 million tokens in sequences of 8,192; micro-batch and recomputation are left to the search).
PUBLISHED: tuple[dict[str, Any], ...] = (
    {
        "model": "GPT-3 145.6B", "gpu": "A100-80", "devices": 1536, "batch": 2304, "layers": 80, "tflops": 148.0,
        "fixed": {"tensor": 8, "pipeline": 8, "virtual": 2, "data": 24, "micro_batch": 2, "recompute": "full"},
        "source": "Megatron-LM SC21 table 1",
    },
    {
        "model": "Llama-3.1 405B", "gpu": "H100", "devices": 8192, "batch": 2048, "layers": 126, "tflops": 430.0,
        "fixed": {"tensor": 8, "pipeline": 16, "data": 64, "context": 1}, "source": "Llama 3 table 4, row 1",
    },
    {
        "model": "Llama-3.1 405B", "gpu": "H100", "devices": 16384, "batch": 2048, "layers": 126, "tflops": 400.0,
        "fixed": {"tensor": 8, "pipeline": 16, "data": 128, "context": 1}, "source": "Llama 3 table 4, row 2",
    },
)  # fmt: skip


def fabric(kind: str, num_gpus: int) -> Fabric:
    """``num_gpus`` of a kind in its usual machines."""
    return Fabric(groups=(NodeGroup.of(GPU_KINDS[kind], num_gpus),))


def planner(model: str, sequences: int, layers: int | None = None, hidden: int | None = None) -> ScalePlanner:
    """A planner of one of the two models, captured now."""
    make = models.gpt3_175b if model.startswith("GPT") else models.llama_405b
    sizes = {key: value for key, value in (("layers", layers), ("hidden", hidden)) if value is not None}
    seq = 2048 if model.startswith("GPT") else 8192
    return ScalePlanner(make(**sizes), models.next_token_loss, models.token_batch(sequences, seq))


def row(model: str, kind: str, devices: int, layers: int, seconds: float, solution: ScaleSolution | str) -> Row:
    """One line of the table; ``solution`` is a text where nothing fits."""
    found = isinstance(solution, ScaleSolution)
    return {
        "model": model,
        "kind": kind,
        "devices": devices,
        "layers": layers,
        "seconds": round(seconds, 3),
        "step_time_s": round(solution.step_time_s, 4) if isinstance(solution, ScaleSolution) else None,
        "gap": round(solution.gap, 4) if isinstance(solution, ScaleSolution) else None,
        "tflops": round(solution.flops_per_device_s / 1e12, 1) if isinstance(solution, ScaleSolution) else None,
        "memory_gib": round(max(solution.memory_bytes) / 2**30, 1) if isinstance(solution, ScaleSolution) else None,
        "plan": solution.text() if isinstance(solution, ScaleSolution) else f"nothing fits: {solution}",
        "feasible": found,
        "published": "",
    }


def timed_plan(
    plans: ScalePlanner, kind: str, devices: int, effort: Effort = "thorough"
) -> tuple[float, ScaleSolution | str]:
    """Seconds and result of one plan."""
    started_s = time.perf_counter()
    try:
        solution: ScaleSolution | str = plans.plan(fabric(kind, devices), effort=effort)
    except InfeasibleError as error:
        solution = str(error)
    return time.perf_counter() - started_s, solution


def device_rows(model: str) -> Iterator[Row]:
    """Plans from nothing for every number of devices, then re-plans by a planner that knows the model already."""
    layers = 96 if model.startswith("GPT") else 126
    kept: ScalePlanner | None = None
    for devices in DEVICES:
        batch = 1536 if devices <= 4096 else 12288
        started_s = time.perf_counter()
        plans = planner(model, batch)
        capture_s = time.perf_counter() - started_s
        seconds, solution = timed_plan(plans, "H100", devices)
        yield row(model, "plan", devices, layers, capture_s + seconds, solution)
        kept = plans
    assert kept is not None
    for kind, devices in (("H100", 8192), ("H100", 24576), ("H100", 65536), ("A100-80", 16384), ("H200", 4096)):
        seconds, solution = timed_plan(kept, kind, devices, "quick")
        yield {**row(model, "replan", devices, layers, seconds, solution), "gpu": kind}


def depth_rows(model: str) -> Iterator[Row]:
    """Plans of models of 8 to 128 layers on 1,024 devices, capture included."""
    for layers in DEPTHS:
        started_s = time.perf_counter()
        plans = planner(model, 1536, layers=layers)
        capture_s = time.perf_counter() - started_s
        seconds, solution = timed_plan(plans, "H100", 1024)
        yield {**row(model, "depth", 1024, layers, capture_s + seconds, solution), "capture_s": round(capture_s, 3)}


def width_rows() -> Iterator[Row]:
    """Plans of GPT-3's architecture at widths that were not captured."""
    plans = WidthPlanner(
        lambda hidden: models.gpt3_175b(hidden=hidden),
        (8192, 12288, 16384),
        models.next_token_loss,
        models.token_batch(1536, 2048),
    )
    plans.plan(12288, fabric("H100", 1024))  # placements of all degrees, once
    for hidden in (9216, 10240, 14336):
        started_s = time.perf_counter()
        solution = plans.plan(hidden, fabric("H100", 1024))
        seconds = time.perf_counter() - started_s
        yield {**row("GPT-3 175B", "width", 1024, 96, seconds, solution), "hidden": hidden}


def published_rows() -> Iterator[Row]:
    """What the authors found best, priced by our model, beside what we find best."""
    for entry in PUBLISHED:
        plans = planner(entry["model"], entry["batch"], layers=entry["layers"])
        where = fabric(entry["gpu"], entry["devices"])
        told = " ".join(f"{name} {value}" for name, value in entry["fixed"].items())
        for kind, constraints in (("published", ScaleConstraints(**entry["fixed"])), ("found", None)):
            started_s = time.perf_counter()
            try:
                solution: ScaleSolution | str = plans.plan(where, constraints)
            except InfeasibleError as error:
                solution = str(error)
            seconds = time.perf_counter() - started_s
            line = row(entry["model"], kind, entry["devices"], entry["layers"], seconds, solution)
            yield {**line, "published": f"{entry['source']}: {told}; measured {entry['tflops']} TFLOP/s"}


def plot(rows: list[Row], path: Path) -> None:
    """Seconds against depth and against devices as two polylines in one SVG."""
    size, margin = 320, 40
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * size}" height="{size}" font-size="11">']
    for panel, (kind, key) in enumerate((("depth", "layers"), ("plan", "devices"))):
        chosen = [r for r in rows if r["kind"] == kind]
        top = max((r["seconds"] for r in chosen), default=1.0)
        left = panel * size + margin
        parts.append(f'<text x="{left}" y="15">seconds (0 to {top:.1f}) against {key}</text>')
        for number, model in enumerate(sorted({r["model"] for r in chosen})):
            own = [r for r in chosen if r["model"] == model]
            step = (size - 2 * margin) / max(len(own) - 1, 1)
            points = [
                (left + i * step, size - margin - (size - 2 * margin) * r["seconds"] / top) for i, r in enumerate(own)
            ]
            color = ("#06c", "#c60")[number % 2]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}"/>')
            parts.append(f'<text x="{left}" y="{30 + 13 * number}" fill="{color}">{model}</text>')
            parts += [
                f'<text x="{x:.1f}" y="{size - margin + 14}" text-anchor="middle">{r[key]}</text>'
                for r, (x, _) in zip(own, points, strict=True)
            ]
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def misses(rows: list[Row]) -> Iterator[str]:
    """Limits that are not met."""
    for one in rows:
        limit = {"plan": PLAN_LIMIT_S, "depth": PLAN_LIMIT_S, "replan": REPLAN_LIMIT_S, "width": REPLAN_LIMIT_S}.get(
            one["kind"]
        )
        if limit is not None and one["seconds"] > limit:
            took = f"took {one['seconds']} s, limit {limit} s"
            yield f"{one['kind']} of {one['model']} on {one['devices']} devices {took}"


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot (SVG) here")
    options = parser.parse_args(arguments)
    wanted = options.families.split(",") if options.families else ["GPT-3 175B", "Llama-3.1 405B"]
    report = Report("planner_scale", {"devices": DEVICES, "depths": DEPTHS}, options.json)
    for model in wanted:
        for source in (device_rows(model), depth_rows(model)):
            for one in source:
                report.add(one)
    for one in itertools.chain(width_rows(), published_rows()):
        report.add(one)
    of = {
        kind: [r["seconds"] for r in report.rows if r["kind"] == kind] for kind in ("plan", "replan", "depth", "width")
    }
    report.finish({f"slowest_{kind}_s": max(times, default=None) for kind, times in of.items()}, misses(report.rows))
    if options.plot:
        plot(report.rows, options.plot)
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
