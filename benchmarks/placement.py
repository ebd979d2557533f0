"""Published instances of two placement problems: objective, proven bound and time of `partita.planner.placement`.

    python -m benchmarks.placement                            # all files in benchmarks/data, with the published limits
    python -m benchmarks.placement FILE... --json F           # files of either format
    python -m benchmarks.placement FILE --set maxDevices=512  # instead of the file's limit
    python -m benchmarks.placement --check                    # exit 1 if a published figure is missed, or 5 s passed

The JSON file is a list with one entry for each file: `file`, `kind` ("placement" or "piper"), `overrides`,
`objective`, `lower_bound`, `lower_bound_space` (what it is proven for), `seconds`, `contiguous`, and `assignment` (node
id to device: accelerators first, then CPU cores) or `stages` (`nodes`, `d`, `t`, `tmpcs`: node id to TMPC id).
Placements have `rounds` as well, the samples in flight, and `pipeline`: the best assignment in pipeline order, with a
bound among those.

Each objective is computed from the definition, apart from the solver. `--check` knows the largest loads of the
published exact algorithms, for pipelines: an assignment that is not contiguous may be below them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Row, option_parser, show
from partita.errors import InputError, PartitaError
from partita.planner.placement import (
    PiperProblem,
    PiperSolution,
    PlacementProblem,
    PlacementSolution,
    read_piper,
    read_placement,
    solve_piper,
    solve_placement,
)

DATA = Path(__file__).parent / "data"
LIMIT_S = 5.0
PUBLISHED = {
    "bert24_inference": 17.78990625,
    "bert24_training": 41.7458125,
    "gnmt_inference": 32.910658203125,
    "gnmt_training": 107.0044140625,
    "bert_l-3_inference": 27.9185676799125,
    "bert_l-3_training": 65.30314912208605,
    "bert32a100": 0.00256113,
}
PIPER_LIMITS = {"maxDevices": 512, "maxMemoryPerDevice": 8 * 2**30, "bandwidth": 25 * 2**30, "mbsInBatch": 1920}
COLUMNS = (
    "file",
    "kind",
    "objective",
    "published",
    "lower_bound",
    "contiguous",
    "pipeline",
    "pipeline_bound",
    "seconds",
)


def solve_file(path: Path, overrides: Mapping[str, float] | None, time_limit_s: float | None) -> Row:
    """The entry of one file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} must be a readable JSON file, but: {error}.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, but it holds {type(data).__name__}.")
    limit = {} if time_limit_s is None else {"time_limit_s": time_limit_s}
    start = time.perf_counter()
    if "maxFPGAs" in data or "maxSizePerFPGA" in data:
        problem = read_placement(data, overrides)
        entry = _placement_entry(problem, solve_placement(problem, **limit))
        kind = "placement"
    else:
        piper = read_piper(data, overrides)
        entry = _piper_entry(piper, solve_piper(piper, **limit))
        kind = "piper"
    seconds = time.perf_counter() - start
    return (
        {"file": str(path), "kind": kind, "overrides": dict(overrides) if overrides else None}
        | entry
        | {"seconds": round(seconds, 3)}
    )


def _placement_entry(problem: PlacementProblem, solution: PlacementSolution) -> Row:
    ids = [operator.id for operator in problem.operators]
    pipeline = None
    if solution.pipeline_devices is not None:
        pipeline = {
            "objective": solution.pipeline_objective,
            "lower_bound": solution.pipeline_lower_bound,
            "assignment": dict(zip(map(str, ids), solution.pipeline_devices, strict=True)),
        }
    return {
        "objective": solution.objective,
        "lower_bound": solution.lower_bound,
        "lower_bound_space": "all assignments",
        "contiguous": solution.priced.contiguous,
        "rounds": solution.priced.rounds,
        "assignment": dict(zip(map(str, ids), solution.devices, strict=True)),
        "pipeline": pipeline,
    }


def _piper_entry(problem: PiperProblem, solution: PiperSolution) -> Row:
    stages = []
    for stage in solution.stages:
        layers = [problem.layers[layer] for layer in stage.layers]
        chosen = zip(layers, stage.ways, strict=True)
        stages.append(
            {
                "nodes": [layer.id for layer in layers],
                "d": stage.data_degree,
                "t": stage.tensor_degree,
                "tmpcs": {str(layer.id): layer.ways[stage.tensor_degree][way].id for layer, way in chosen},
            }
        )
    return {
        "objective": solution.objective_s,
        "lower_bound": solution.lower_bound_s,
        "lower_bound_space": "all pipelines",
        "contiguous": True,
        "stages": stages,
    }


def parse_overrides(items: Sequence[str]) -> dict[str, float]:
    """`key=value` of each item, e.g. `maxDevices=512`; raises `InputError` where that is not their form.

    >>> parse_overrides(["maxDevices=512", "bandwidth=2.5e10"])
    {'maxDevices': 512, 'bandwidth': 25000000000.0}
    """
    overrides: dict[str, float] = {}
    for item in items:
        key, equals, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or not key:
            raise InputError(f"--set must be key=number, but got {item!r}; write e.g. --set maxDevices=512.")
        overrides[key] = int(number) if number.is_integer() else number
    return overrides


def misses(row: Row) -> list[str]:
    """Published figures that a row does not reach, and solves that took too long."""
    found = []
    published = row.get("published")
    if published is not None and row["objective"] > published * (1 + 1e-5 if row["kind"] == "piper" else 1 + 1e-9):
        found.append(f"{row['file']} must be at most {published}, but is {row['objective']}")
    if row["seconds"] > LIMIT_S:
        found.append(f"{row['file']} must take at most {LIMIT_S:g} s, but took {row['seconds']:.2f} s")
    return found


def published_figure(path: Path, kind: str, overrides: Mapping[str, float] | None) -> float | None:
    """The published objective of a known file with the limits that it was published for."""
    same_limits = dict(overrides or {}) == (PIPER_LIMITS if kind == "piper" else {})
    return PUBLISHED.get(path.stem) if same_limits else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser(str(__doc__).splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="instances (default: all published ones)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a limit of the files")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for each file, about")
    options = parser.parse_args(arguments)
    try:
        rows = _run(options)
    except PartitaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report("placement", {"files": [row["file"] for row in rows]})
    report.rows = [_cells(row) for row in rows]
    report.misses = [miss for row in report.rows for miss in misses(row)]
    report.rows = [_digits(row) for row in report.rows]
    show(report, COLUMNS)
    return report.exit_code(options.check)


def _run(options: Any) -> list[Row]:
    overrides = parse_overrides(options.set) or None
    work = [(path, overrides) for path in options.files]
    if not work:
        work = [(path, overrides) for path in sorted((DATA / "placement").glob("*.json"))] if not overrides else []
        work += [(path, overrides or PIPER_LIMITS) for path in sorted((DATA / "piper").glob("*.json"))]
    rows: list[Row] = []
    for path, limits in work:
        rows.append(solve_file(path, limits, options.time_limit))
        if options.json:  # after every file, so that an interrupted run leaves what it had
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _cells(row: Row) -> Row:
    pipeline = row.get("pipeline") or {}
    return row | {
        "file": Path(row["file"]).name,
        "published": published_figure(Path(row["file"]), row["kind"], row["overrides"]),
        "pipeline": pipeline.get("objective"),
        "pipeline_bound": pipeline.get("lower_bound"),
    }


def _digits(row: Row) -> Row:
    """With seven digits where the table would show three."""
    return row | {name: f"{row[name]:.7g}" for name in COLUMNS if isinstance(row[name], float) and name != "seconds"}


if __name__ == "__main__":
    sys.exit(main())
