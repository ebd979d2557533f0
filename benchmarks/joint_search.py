"""A joint space of networks and training settings, searched for a deadline: partita beside usual ways.

    python -m benchmarks.joint_search --json benchmarks/results/joint_search.json --check

Every row is one search on this machine by one way from one seed (`benchmarks.joint_peers` says what they are), for
networks and settings of `benchmarks.joint_task`. `score` is the loss that the delivered network was chosen by, `test`
that on characters which nobody has chosen by; `late` is when it was delivered, less the deadline, in parts of it. The
clock runs from before the first process of a way has started, imports included. Ways take turns.

`--check` fails where the mean test loss of partita's is not the lowest.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, first_line, option_parser, show
from benchmarks.joint_peers import FINAL_SHARE, explore, finish
from benchmarks.joint_task import Config, batch_size, build, data, loss_fn, optimizer, test_loss
from benchmarks.processes import Child, ChildError, Message, serve

WAYS = ("partita", "random", "asha", "asha, then plan")
MODULE = "benchmarks.joint_search"
COLUMNS = ("way", "seed", "score", "test", "late", "candidates", "best", "errors")
START_S = 60.0  # for processes to import PyTorch, and more than enough to end after the deadline


# The children ---------------------------------------------------------------------------------------------------------


def by_partita(message: Message) -> Message:
    result = partita.search(
        build, data, deadline=f"@{message['end_s']}", loss_fn=loss_fn, optimizer=optimizer, batch_size=batch_size,
        folder=message["folder"], seed=message["seed"],
    )  # fmt: skip
    ended_s = time.time()
    return {
        "score": result.score,
        "test": test_loss(result.model),
        "ended_s": ended_s,
        "candidates": sum(bool(one.points) for one in result.trials),
        "best": str(Config.of(result.best.params)),
        "plan": result.best.plan,
    }


ROLES = {"partita": by_partita, "explore": explore, "finish": finish}


# The parent -----------------------------------------------------------------------------------------------------------


def by_peers(way: str, seed: int, start_s: float, deadline_s: float, folder: Path) -> Message:
    """Explores on one core each, and finishes on all."""
    cores = sorted(partita.Cluster.detect().processes[0].cores)
    explored_s = start_s + (1 - FINAL_SHARE) * deadline_s
    with contextlib.ExitStack() as stack:
        explorers = [stack.enter_context(Child(MODULE, "explore")) for _ in cores]
        for core, child in zip(cores, explorers, strict=True):
            child.send({"role": "explore", "way": "random" if way == "random" else "asha", "end_s": explored_s,
                        "seed": 1000 * seed + core, "core": core, "folder": str(folder)})  # fmt: skip
        replies = [checked(child.receive(deadline_s + START_S)) for child in explorers]
        found = [row for reply in replies for row in reply["found"]]
        best = min(found, key=lambda row: row["score"])
        message = {"role": "finish", **best, "seed": seed, "end_s": start_s + deadline_s, "cores": cores,
                   "planned": way == "asha, then plan", "folder": str(folder)}  # fmt: skip
        done = checked(explorers[0].ask(message, deadline_s + START_S))
    return done | {"candidates": len(found), "best": str(Config.of(best["params"]))}


def checked(reply: Message) -> Message:
    """Raises `ChildError` where the child has failed."""
    if "error" in reply:
        raise ChildError(reply["error"])
    return reply


def measure(way: str, seed: int, deadline_s: float) -> Row:
    row: Row = {"way": way, "seed": seed, "deadline_s": deadline_s}
    start_s = time.time()  # for all ways, before any process of theirs has started
    with tempfile.TemporaryDirectory() as folder:
        try:
            if way == "partita":
                with Child(MODULE, "partita") as child:
                    message = {"role": "partita", "seed": seed, "end_s": start_s + deadline_s, "folder": folder}
                    found = checked(child.ask(message, 2 * deadline_s + START_S))
            else:
                found = by_peers(way, seed, start_s, deadline_s, Path(folder))
        except ChildError as error:
            return row | {"errors": first_line(error)}
    late = (found.pop("ended_s") - start_s) / deadline_s - 1
    return row | found | {"late": late}


def summary_of(rows: Sequence[Row]) -> Row:
    found: Row = {}
    for way in WAYS:
        tests = [row["test"] for row in rows if row["way"] == way and "test" in row]
        if tests:
            deviation = statistics.stdev(tests) if len(tests) > 1 else 0.0
            found[way] = {"mean": round(statistics.mean(tests), 4), "deviation": round(deviation, 4)}
    return found


def misses_of(rows: Sequence[Row], summary: Row) -> list[str]:
    found = [f"{row['way']}, seed {row['seed']}: {row['errors']}" for row in rows if "errors" in row]
    own = summary.get("partita", {}).get("mean")
    for way in WAYS[1:]:
        if own is not None and way in summary and own >= summary[way]["mean"]:
            found.append(f"partita's networks lose {own} in the test, those of {way} {summary[way]['mean']}")
    return found


def main() -> int:
    parser = option_parser("A joint space of networks and training settings, searched for a deadline.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=90.0, help="of each search, seconds")
    parser.add_argument("--ways", default=";".join(WAYS), help="some of these, separated by semicolons")
    options = parser.parse_args()
    if options.child:
        serve(lambda message: ROLES[message["role"]](message))
        return 0
    report = Report("joint_search", {"seeds": options.seeds, "deadline_s": options.deadline}, options.json)
    for seed in range(options.seeds):
        for way in options.ways.split(";"):
            report.add(measure(way, seed, options.deadline))
    summary = summary_of(report.rows)
    report.finish(summary, misses_of(report.rows, summary))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
