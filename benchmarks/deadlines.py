"""Whether a search meets its deadline, whatever is killed meanwhile.

    python -m benchmarks.deadlines --json benchmarks/results/deadlines.json --check

Every row is one run of `partita search` on the characters of `benchmarks.joint_task`. In half of the runs something is
killed with SIGKILL at a random moment, by turns the process of a trial and that of the search itself, which its
attendant goes on with in another. `late` is when the command has ended, measured from its start and less the deadline,
in parts of the deadline; `delivered` the same for the moment at which the network lay in its file. `lost` counts
finished trials that are no more, `running` those that are left as running.

`--check` fails where the deadline is missed by more than 5 %, on either side, or a run delivers nothing, or something
that does not score what it says, loses a finished trial, or leaves one running.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.common import Report, Row, first_line, option_parser, show
from benchmarks.processes import PINNED_ENVIRONMENT

SCRIPT = Path(__file__).with_name("joint_task.py")
VICTIMS = ("nothing", "a trial", "nothing", "the search")  # by turns
TOLERANCE = 0.05
LEAST, MOST = 0.1, 0.9  # of the deadline, when something is killed
COLUMNS = ("seed", "killed", "after_s", "late", "delivered", "score", "again", "trials", "lost", "running", "errors")


def run(seed: int, victim: str, deadline_s: float, folder: Path) -> Row:
    """One search, from its command's start to its end."""
    moment_s = random.Random(seed).uniform(LEAST, MOST) * deadline_s
    command = [sys.executable, "-m", "partita", "search", str(SCRIPT), "--deadline", f"{deadline_s}s"]
    options = ["--folder", str(folder), "--seed", str(seed), "--json", "--quiet"]
    start_s = time.time()
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **PINNED_ENVIRONMENT},
    ) as process:  # fmt: skip
        row: Row = {"seed": seed, "killed": victim}
        finished: set[int] = set()
        if victim != "nothing":
            time.sleep(moment_s)
            after_s = _kill(victim, process, start_s + deadline_s, start_s)
            row["after_s"] = after_s
            finished = _trials(folder, "COMPLETE")
        output, errors = process.communicate(timeout=3 * deadline_s)
    late_s = time.time() - start_s - deadline_s
    row |= {"late": late_s / deadline_s, "deadline_s": deadline_s}
    if process.returncode:
        return row | {"errors": first_line(errors.strip().splitlines()[-1] if errors.strip() else "nothing was said")}
    found = json.loads(output)
    return row | {
        "delivered": (found["delivered_s"] - start_s - deadline_s) / deadline_s,
        "score": found["score"],
        "again": _score(found),
        "trials": len(_trials(folder, "COMPLETE")),
        "lost": len(finished - _trials(folder, "COMPLETE")),
        "running": len(_trials(folder, "RUNNING")),
        "values": found["params"],
    }


def _kill(victim: str, attendant: subprocess.Popen[str], until_s: float, start_s: float) -> float | None:
    """Kills the victim as soon as there is one; after how many seconds it was, None if there was none."""
    while time.time() < until_s:
        if attendant.poll() is not None:
            return None
        try:
            found = _processes(victim, psutil.Process(attendant.pid))
            if found:
                random.Random(start_s).choice(found).kill()
                return time.time() - start_s
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.02)
    return None


def _processes(victim: str, attendant: Any) -> list[Any]:
    """The processes of trials, which are children of the server that they are forked from, or the search."""
    searching = attendant.children()
    if victim == "the search":
        return searching
    servers = [one for search in searching for one in search.children()]
    return [trial for server in servers for trial in server.children()]


def _trials(folder: Path, state: str) -> set[int]:
    """Numbers of trials in a state, as the database has them."""
    if not (folder / "study.db").exists():
        return set()
    with closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=rw", uri=True)) as connection:
        try:
            return {number for (number,) in connection.execute("SELECT number FROM trials WHERE state = ?", (state,))}
        except sqlite3.OperationalError:  # its tables are being made
            return set()


def _score(found: Mapping[str, Any]) -> float:
    """What the delivered network scores, judged here."""
    import torch
    from safetensors.torch import load_file

    from benchmarks.joint_task import Config, data, loss_fn, network

    model = network(Config.of(found["params"]))
    model.load_state_dict(load_file(found["weights"]))
    with torch.no_grad():
        return float(loss_fn(model.eval(), data()[1]))


def misses_of(rows: Sequence[Row]) -> list[str]:
    found = []
    for row in rows:
        name = f"run {row['seed']} ({row['killed']} killed)"
        if "errors" in row:
            found.append(f"{name}: {row['errors']}")
            continue
        if abs(row["late"]) > TOLERANCE or row["delivered"] > 0:
            found.append(f"{name}: ended {row['late']:+.1%} from the deadline, delivered {row['delivered']:+.1%}")
        if row["lost"] or row["running"]:
            found.append(f"{name}: {row['lost']} finished trials are lost, {row['running']} are left running")
        if row["killed"] != "nothing" and row["after_s"] is None:
            found.append(f"{name}: nothing was killed")
        if abs(row["again"] - row["score"]) > 1e-4 * abs(row["score"]):
            found.append(f"{name}: said to score {row['score']}, but scores {row['again']}")
    return found


def summary_of(rows: Sequence[Row]) -> Row:
    told = [row for row in rows if "errors" not in row]
    return {
        "runs": len(rows),
        "met within 5 %": sum(abs(row["late"]) <= TOLERANCE and row["delivered"] <= 0 for row in told),
        "latest": max((row["late"] for row in told), default=None),
        "earliest": min((row["late"] for row in told), default=None),
        "killed": sum(row.get("after_s") is not None for row in rows),
    }


def main() -> int:
    parser = option_parser("Whether a search meets its deadline, whatever is killed meanwhile.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--deadline", type=float, default=45.0, help="of each, seconds")
    options = parser.parse_args()
    report = Report("deadlines", {"runs": options.runs, "deadline_s": options.deadline}, options.json)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.runs):
            report.add(run(seed, VICTIMS[seed % len(VICTIMS)], options.deadline, Path(folder) / str(seed)))
    report.finish(summary_of(report.rows), misses_of(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
