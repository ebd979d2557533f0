"""`partita profile --from-runs FILE`: constants of GPU generations from a handful of measured training runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from partita.cli.output import print_json, table


def calibrate(path: Path, out: Path | None, *, json: bool) -> int:
    """Fit, write the constants to `out` (default: the cache) and say what changed; rows that cannot be used are
    named."""
    from dataclasses import asdict

    from partita.cost.calibration import Calibration
    from partita.planner.scale.fit import fit
    from partita.planner.scale.runs import measured_runs

    measured, refused = measured_runs(path)
    for reason in refused:
        print(f"partita: warning: {path}: {reason}", file=sys.stderr)
    found = fit(measured)
    where = found.calibration.save(out)
    changed: list[tuple[str, str, float, float]] = [
        (generation, name, asdict(Calibration().of(generation))[name], value)
        for generation, constants in found.calibration.generations.items()
        for name, value in asdict(constants).items()
        if abs(value / asdict(Calibration().of(generation))[name] - 1) > 1e-3
    ]
    if json:
        summary: dict[str, Any] = {
            "file": str(where),
            "num_runs": found.num_runs,
            "refused": refused,
            "error_before": found.error_before,
            "error_after": found.error_after,
            "generations": {name: asdict(constants) for name, constants in found.calibration.generations.items()},
        }
        print_json(summary)
        return 0
    rows = [
        ("runs used, refused", f"{found.num_runs}, {len(refused)}"),
        ("mean error of the step time", f"{found.error_before:.1%} before, {found.error_after:.1%} after"),
    ]
    rows += [(f"{generation} {name}", f"{before:.3g} -> {after:.3g}") for generation, name, before, after in changed]
    print(table([*rows, ("written to", str(where))]))
    return 0
