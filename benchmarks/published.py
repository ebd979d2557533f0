"""Published training runs: predicted step time and memory against what their authors measured.

    python -m benchmarks.published                          # the runs in benchmarks/data/published
    python -m benchmarks.published FILE... --json F         # other files with the same fields
    python -m benchmarks.published --calibration FILE       # with constants from `partita profile --from-runs`
    python -m benchmarks.published --cross-validate         # fit without each group of sources, predict that group
    python -m benchmarks.published --check                  # exit 1 if a goal is missed on vTrain's single-node runs

The JSON file has `rows`, one for each row of the files: `file`, `index`, `source`, `predicted_step_time_s`,
`predicted_memory_bytes`, `fits`, `refused` (the reason, or null), `assumed` (facts filled from public definitions) and
`measured_step_time_s`; and in `summary["sources"]`, for each source: rows used and refused with the reasons, mean and
median absolute relative error of the step time, the mean after one scale for the whole source, the share of pairs (same
model, GPUs and global batch) in the right order, the regret of the plan that the prediction would pick among the
measured ones (its measured time over the best one's, minus 1; mean and largest), the memory's mean absolute relative
error, and the share of right verdicts whether a run fits its GPUs.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Row, option_parser, show
from partita.cost.calibration import Calibration
from partita.errors import InputError, PartitaError
from partita.planner.scale.fit import fit
from partita.planner.scale.rows import Refusal, measured_step_time_s, positive_of, ran_out_of_memory, read_rows
from partita.planner.scale.runs import Measured, Run, read_run

DATA = Path(__file__).parent / "data" / "published"
COLUMNS = ("source", "used", "refused", "error", "median", "scaled", "pairs", "num_pairs", "regret", "worst_regret",
           "memory_error", "fits_right")  # fmt: skip
# Goals for runs that were not looked at, checked on vTrain's single-node ones. Calculon on the same rows: error 0.389,
# pairs 0.715, regret 0.108.
GOALS = {"error": 0.12, "pairs": 0.88, "regret": 0.02}
GROUPS = ("vTrain", "Megatron-LM SC21", "Korthikanti", "torchtitan", "Megatron-Bridge", "NeMo",
          "MosaicML llm-foundry A100", "MosaicML llm-foundry H100")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a file, read."""

    file: str
    index: int
    row: Mapping[str, Any]
    run: Run | None
    refused: str | None
    measured_s: float | None

    @property
    def source(self) -> str:
        return str(self.row.get("source") or "unknown")


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """All rows of the files. Raises `InputError` where one is not a list of objects."""
    entries = []
    for path in paths:
        for index, row in enumerate(read_rows(path)):
            run, refused, measured_s = None, None, None
            try:
                run = read_run(row)
                run.predict()
                measured_s = measured_step_time_s(row)
                positive_of(row, "memory_gib")
            except Refusal as error:
                run, refused = None, str(error)
            entries.append(Entry(file=str(path), index=index, row=row, run=run, refused=refused, measured_s=measured_s))
    return entries


def predict_entry(entry: Entry, calibration: Calibration | None) -> Row:
    """The output row of one entry."""
    row: Row = {
        "file": entry.file,
        "index": entry.index,
        "source": entry.source,
        "predicted_step_time_s": None,
        "predicted_memory_bytes": None,
        "fits": None,
        "refused": entry.refused,
        "assumed": list(entry.run.assumed) if entry.run else [],
        "measured_step_time_s": entry.measured_s,
    }
    if entry.run is not None:
        found = entry.run.predict(calibration)
        row["predicted_step_time_s"] = found.step_time_s
        row["predicted_memory_bytes"] = found.peak_memory_bytes
        row["fits"] = entry.run.fits(found)
    return row


def scores(entries: Sequence[Entry], rows: Sequence[Row]) -> Row:
    """The figures of one source."""
    both = list(zip(entries, rows, strict=True))
    used = [(entry, row) for entry, row in both if row["predicted_step_time_s"] and entry.measured_s]
    refused = Counter(row["refused"] for row in rows if row["refused"])
    result: Row = {"source": entries[0].source, "used": len(used), "refused": sum(refused.values())}
    result["reasons"] = dict(refused.most_common())
    result["without_measured_time"] = len(rows) - len(used) - result["refused"]
    if used:
        times = [(row["predicted_step_time_s"], float(entry.measured_s or 0)) for entry, row in used]
        errors = [abs(predicted / measured - 1) for predicted, measured in times]
        scale = math.exp(statistics.mean(math.log(measured / predicted) for predicted, measured in times))
        result |= {
            "error": statistics.mean(errors),
            "median": statistics.median(errors),
            "scaled": statistics.mean(abs(scale * predicted / measured - 1) for predicted, measured in times),
            "scale": scale,
        }
        result |= _order(used)
    result |= _memory(both)
    return result


def _order(used: Sequence[tuple[Entry, Row]]) -> Row:
    groups: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
    for entry, row in used:
        key = (entry.row.get("model"), entry.row.get("n_gpus"), entry.row.get("global_batch"))
        groups[key].append((row["predicted_step_time_s"], float(entry.measured_s or 0)))
    num_pairs = right = 0
    regrets = []
    for times in groups.values():
        for number, (first, first_s) in enumerate(times):
            for second, second_s in times[:number]:
                if first_s != second_s:
                    num_pairs += 1
                    right += (first - second) * (first_s - second_s) > 0
        if len(times) > 1:
            regrets.append(min(times)[1] / min(measured for _, measured in times) - 1)
    return {
        "pairs": right / num_pairs if num_pairs else None,
        "num_pairs": num_pairs,
        "regret": statistics.mean(regrets) if regrets else None,
        "worst_regret": max(regrets, default=None),
    }


def _memory(both: Sequence[tuple[Entry, Row]]) -> Row:
    errors, verdicts = [], []
    for entry, row in both:
        if entry.run is None:
            continue
        predicted = row["predicted_memory_bytes"]
        if given := positive_of(entry.row, "memory_gib"):
            errors.append(abs(predicted / (given * 2**30) - 1))
        ran_out = ran_out_of_memory(entry.row)
        if entry.measured_s or ran_out:
            verdicts.append(row["fits"] != (ran_out and not entry.measured_s))
    return {
        "memory_error": statistics.mean(errors) if errors else None,
        "num_memory": len(errors),
        "fits_right": sum(verdicts) / len(verdicts) if verdicts else None,
    }


def by_source(entries: Sequence[Entry], rows: Sequence[Row]) -> list[Row]:
    """The figures of each source, in the order of the files."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, entry in enumerate(entries):
        places[entry.source].append(number)
    return [scores([entries[i] for i in own], [rows[i] for i in own]) for own in places.values()]


def cross_validate(entries: Sequence[Entry]) -> list[Row]:
    """Figures of rows that their constants have not seen: each group of sources is predicted with constants fitted to
    the others, from the prior on; and vTrain's models in two halves (fitted to one half and all other sources)."""
    usable = [entry for entry in entries if entry.run is not None and entry.measured_s]
    splits: list[tuple[str, list[Entry]]] = [
        (f"without {group}", [entry for entry in usable if entry.source.startswith(group)]) for group in GROUPS
    ]
    sweep = [entry for entry in usable if entry.source.startswith("vTrain")]
    models = sorted({str(entry.row.get("model")) for entry in sweep})
    for number in (0, 1):
        half = [entry for entry in sweep if models.index(str(entry.row.get("model"))) % 2 == number]
        splits.append((f"without {', '.join(models[number::2])}", half))
    result = []
    for name, held in splits:
        if not held:
            continue
        left_out = {(entry.file, entry.index) for entry in held}
        known = [entry for entry in usable if (entry.file, entry.index) not in left_out]
        calibration = fit(thin(known), Calibration.prior()).calibration
        figures = scores(held, [predict_entry(entry, calibration) for entry in held])
        result.append(figures | {"source": name})
        print(json.dumps({key: result[-1].get(key) for key in ("source", "used", "error", "pairs", "regret")}))
    return result


def thin(entries: Sequence[Entry], limit: int = 150) -> list[Measured]:
    """Runs to fit to: at most about `limit` of a source, evenly spread (their weight is bounded anyway)."""
    counts = Counter(entry.source for entry in entries)
    seen: Counter[str] = Counter()
    found = []
    for entry in entries:
        stride = -(-counts[entry.source] // limit)
        seen[entry.source] += 1
        if seen[entry.source] % stride == 0 and entry.run is not None and entry.measured_s:
            found.append(Measured(run=entry.run, step_time_s=entry.measured_s, source=entry.source))
    return found


def misses(sources: Sequence[Row]) -> list[str]:
    """Goals that vTrain's single-node runs do not reach."""
    found = []
    for figures in sources:
        if not figures["source"].startswith("vTrain ground_truth_single"):
            continue
        for name, goal in GOALS.items():
            value = figures.get(name)
            if value is None or (value < goal if name == "pairs" else value > goal):
                bound = "at least" if name == "pairs" else "at most"
                found.append(f"{figures['source']}: {name} must be {bound} {goal:g}, but is {value}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser(str(__doc__).splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="runs (default: benchmarks/data/published)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="constants instead of the shipped ones")
    parser.add_argument("--cross-validate", action="store_true", help="also predict what the constants have not seen")
    options = parser.parse_args(arguments)
    paths = options.files or [Path(os.path.relpath(path)) for path in sorted(DATA.glob("*.json"))]
    try:
        calibration = Calibration.load(options.calibration) if options.calibration else None
        entries = read_entries(paths)
        if not entries:
            raise InputError(f"the files must hold at least one run, but {', '.join(map(str, paths))} hold none.")
        report = Report("published", {"files": [str(path) for path in paths]}, options.json)
        report.rows = [predict_entry(entry, calibration) for entry in entries]
        summary: dict[str, Any] = {"sources": by_source(entries, report.rows)}
        if options.cross_validate:
            summary["cross_validation"] = cross_validate(entries)
    except PartitaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.finish(summary, misses(summary["sources"]))
    table = Report("published", report.settings)
    table.rows = summary["sources"] + summary.get("cross_validation", [])
    table.misses = report.misses
    show(table, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
