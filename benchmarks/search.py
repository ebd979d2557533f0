"""Everything about the search of configurations, part by part.

    python -m benchmarks.search --json benchmarks/results/search.json --check

connections   methods that learn connections, on known tasks, and that plans change nothing of it
blocks        linear layers and networks of blocks beside dense ones
structure     growth that changes nothing, rates that hold for every width, files that load without partita
table         proposals on a table of known networks
joint         a joint space searched for a deadline, beside usual ways
resources     the best configuration for each kind of resources, on all of them (emulated machines need root)
deadlines     deadlines that are met, whatever is killed

Each part is a benchmark of its own (`benchmarks.connections`, ..., `benchmarks.table_search`), which says what its rows
are; it is run with its usual settings, and its figures are in the part's own file beside the given one. Here stand
their summaries and misses. It takes hours; `--parts` names some.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Row, option_parser, show

PARTS: Mapping[str, str] = {
    "connections": "connections",
    "blocks": "blocks",
    "structure": "structure",
    "table": "table_search",
    "joint": "joint_search",
    "resources": "resources_search",
    "deadlines": "deadlines",
}
COLUMNS = ("part", "rows", "misses", "summary", "errors")


def run(part: str, folder: Path) -> Row:
    """One part, in a process of its own."""
    path = folder / f"{PARTS[part]}.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{PARTS[part]}", "--json", str(path)], stdout=sys.stderr, check=False
    )
    row: Row = {"part": part}
    if done.returncode:
        return row | {"errors": f"it ended with code {done.returncode}"}
    found: dict[str, Any] = json.loads(path.read_text())
    return row | {"rows": len(found["rows"]), "misses": found["misses"], "summary": found["summary"]}


def main() -> int:
    parser = option_parser("Everything about the search of configurations, part by part.")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B")
    options = parser.parse_args()
    names = options.parts.split(",")
    if not set(names) <= set(PARTS):
        parser.error(f"--parts must name some of {', '.join(PARTS)}")
    report = Report("search", {"parts": names}, options.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.json is None else options.json.parent
        for name in names:
            report.add(run(name, folder))
    misses = [f"{row['part']}: {miss}" for row in report.rows for miss in row.get("misses", ())]
    misses += [f"{row['part']}: {row['errors']}" for row in report.rows if "errors" in row]
    report.finish({row["part"]: "missed" if row.get("misses") or "errors" in row else "holds" for row in report.rows},
                  misses)  # fmt: skip
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
