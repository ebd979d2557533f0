"""Time to the same loss on slow networks: partita's methods and its choice among them beside DDP, torchft and hivemind.

    python -m benchmarks.time_to_loss --json benchmarks/results/time_to_loss.json --curves CURVES.json --check

Two and four machines (`benchmarks.slow_machines`; needs root), one process each, on links of 1 Gbit/s, 100 Mbit/s and
10 Mbit/s. Every way (`benchmarks.loss_race`) trains the tasks of `benchmarks.method_tasks` from the same weights on the
same global batches. `--networks none` has plain processes of this machine instead.

Time to loss is steps to loss times the time of a step; both are measured, apart from each other, since losses by steps
do not depend on the network:

steps   Every way trains three seeds, without a limited network, and is judged on held-out data every 10 steps, in time
        that does not count. The target is what exact training keeps from 80 % of its steps on, 2 % above; a way has
        reached it where the mean over seeds, a trailing mean over three judgings, stays at or below (between judgings
        by interpolation). Ways that have not by then may make twice as many steps as exact training. Exact ways have
        the losses of exact training, torchft's DiLoCo those of partita's; "auto equivalent-loss" has those of the
        method that it has chosen on a network, and is judged there if that is none of the others.
time    All ways are prepared on the network's machines and step in turns, in rounds of whole turns of what they do, in
        an order that rotates; only one steps at a time. The time of a round is that of its slowest machine;
        `step_time_s` is the median over rounds of the mean step, once partita's plan has settled. By this time ways are
        judged: these trainings last seconds, the trials of candidates last a fixed number of steps, and what they find
        is remembered. `first_time_to_loss_s` counts from the first step, with the trials.

So that both are of one training, the losses of the first steps are compared (`loss_error`). `bytes_per_step` is what a
process says it has sent, in the mean, or for peers what its interface has (without headers); `peak_bytes` the most of
any step. `bytes_to_loss` is of one process, `loss` after as many samples as exact training has seen.

Curves are kept in `--curves`, and trained beforehand with `--only-curves`, at any time, since nothing is timed then.
hivemind needs an interpreter that has it, and scikit-learn: `--hivemind PYTHON`. DDP's bf16 hook does not run on gloo.

`--check` fails unless "auto exact" is within 5 % of the fastest exact way, and "auto equivalent-loss" of the fastest of
all that reach the target; or where bytes or peaks are not those of the methods' formulas, losses are not those judged,
or one of partita's ways does not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Row, median, option_parser, show
from benchmarks.loss_curves import mean_of, target_of
from benchmarks.loss_race import AUTO_EXACT, AUTO_LOSS, ROLES, WAYS, Curves, Learnt, Timed, Way, learn, outcome, race
from benchmarks.method_tasks import TASKS
from benchmarks.slow_field import Field
from benchmarks.slow_machines import Machines, why_not

MBIT = 125_000.0  # bytes a second
WHOLE, STREAMING = "diloco H=50, int4", "streaming diloco H=50, int4"
LARGEST_RATIO = 1.05
LARGEST_BYTES_ERROR = 0.001
LARGEST_LOSS_ERROR = 0.01
COLUMNS = (
    "network", "task", "entry", "time_to_loss_s", "first_time_to_loss_s", "ratio", "steps_to_loss", "step_time_s",
    "bytes_to_loss", "bytes_per_step", "peak_bytes", "loss", "errors",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """So many machines, and what each can send, bytes a second; None: processes of this machine."""

    name: str
    num: int
    rate: float | None


NETWORKS = tuple(
    Network(f"{num} x {name}", num, rate * MBIT)
    for num in (2, 4)
    for name, rate in (("1 Gbit/s", 1000), ("100 Mbit/s", 100), ("10 Mbit/s", 10))
)
HERE = (Network("none: 2 processes", 2, None), Network("none: 4 processes", 4, None))


def judge(rows: Sequence[Row]) -> None:
    """Adds to partita's choices on one network and task the fastest way that they are compared with, and the ratio."""
    reached = [row for row in rows if row.get("time_to_loss_s") is not None]
    for row in reached:
        if row["entry"] in (AUTO_EXACT, AUTO_LOSS):
            others = [other for other in reached if other is not row and (other["exact"] or row["entry"] == AUTO_LOSS)]
            best = min(others, key=lambda other: float(other["time_to_loss_s"]), default=None)
            if best is not None:
                row |= {"best": best["entry"], "ratio": row["time_to_loss_s"] / best["time_to_loss_s"]}


def misses_of(row: Row, kind: str) -> list[str]:
    """One sentence for each limit that a row misses."""
    where = f"{row['network']}, {row['task']}, {row['entry']}"
    if row.get("errors"):
        return [f"{where}: did not run: {row['errors']}"] if kind == "partita" else []
    misses = []
    if row["entry"] in (AUTO_EXACT, AUTO_LOSS):
        if row.get("time_to_loss_s") is None:
            misses.append(f"{where}: must reach a loss of {row['target']}, but reaches {row['loss']:.4f}")
        elif row.get("ratio", 0.0) > LARGEST_RATIO:
            misses.append(f"{where}: must take at most {LARGEST_RATIO} times as long as {row['best']}, but takes "
                          f"{row['ratio']:.3f} times")  # fmt: skip
    if row.get("is_settled") is False:
        misses.append(f"{where}: the plan must settle before steps are timed; give it longer (--settle)")
    if row.get("bytes_error", 0.0) > LARGEST_BYTES_ERROR:
        misses.append(f"{where}: bytes a step must be {row['formula']:.0f}, but are {row['bytes_per_step']:.0f}")
    if row.get("peak_bytes", 0.0) > row.get("peak_formula", float("inf")) * (1 + LARGEST_BYTES_ERROR):
        misses.append(f"{where}: a step must send {row['peak_formula']:.0f} bytes at most, but one {row['peak_bytes']}")
    if row.get("loss_error", 0.0) > LARGEST_LOSS_ERROR:
        misses.append(f"{where}: losses must be those that were judged, but differ by {row['loss_error']:.2%}")
    return misses


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    kinds = {way.name: way.kind for way in WAYS}
    summary: dict[str, Any] = {"num_rows": len(rows)}
    for name in (AUTO_EXACT, AUTO_LOSS):
        ratios = [row["ratio"] for row in rows if row["entry"] == name and "ratio" in row]
        summary |= {f"{name}: median ratio": median(ratios), f"{name}: largest ratio": max(ratios, default=None)}
    for task in TASKS:
        summary[f"{task}: peak of DiLoCo / of its 4 fragments"] = median(fewer_at_peak(rows, task))
    failed = [f"{row['entry']}: {row['errors']}" for row in rows if row.get("errors")]
    summary["did not run"] = list(dict.fromkeys(failed))
    return summary, [miss for row in rows for miss in misses_of(row, kinds[row["entry"]])]


def fewer_at_peak(rows: Sequence[Row], task: str) -> list[float]:
    """On each network the most bytes of a step of DiLoCo, in those of a step of Streaming DiLoCo."""
    known = [row for row in rows if row["task"] == task and "peak_bytes" in row]
    peaks = {(row["network"], row["entry"]): row["peak_bytes"] for row in known}
    return [
        peak / peaks[network, STREAMING]
        for (network, entry), peak in peaks.items()
        if entry == WHOLE and peaks.get((network, STREAMING))
    ]


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument(
        "--networks", default="", metavar="TEXT,TEXT", help='those with one of these, e.g. "4 x", "none"'
    )
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B")
    parser.add_argument("--entries", default="", metavar="A;B", help="only these ways, by name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="instead of the task's own number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=1.0, help="of steps of one way in one round")
    parser.add_argument("--settle", type=float, default=300.0, help="seconds that a plan has to settle")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="losses by steps, read and added to")
    parser.add_argument("--only-curves", action="store_true", help="train what is missing in --curves, time nothing")
    parser.add_argument("--hivemind", default=sys.executable, metavar="PYTHON", help="an interpreter that has hivemind")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one preparation or turn")
    options = parser.parse_args()
    texts = options.networks.split(",")
    networks = [one for one in (*NETWORKS, *HERE) if any(text in one.name for text in texts)]
    names = [name.strip() for name in options.entries.split(";")] if options.entries else [way.name for way in WAYS]
    tasks = [task.strip() for task in options.tasks.split(",")]
    if not set(names) <= {way.name for way in WAYS} or not set(tasks) <= set(TASKS) or not networks:
        parser.error(f"--entries must name some of {[way.name for way in WAYS]}, --tasks of {list(TASKS)}, --networks "
                     f"parts of {[one.name for one in (*NETWORKS, *HERE)]}")  # fmt: skip
    ways = [way for way in WAYS if way.name in names]
    reason = why_not()
    if reason is not None and not options.only_curves and any(one.rate for one in networks):
        print(f"time_to_loss: skipped; {reason}", file=sys.stderr)
        return 0
    told = ("networks", "tasks", "entries", "seeds", "steps", "rounds", "round_seconds", "settle")
    settings = {name: getattr(options, name) or "all" for name in told}
    report = Report("time_to_loss", settings, path=options.json)
    learnt = learn_all(networks, tasks, ways, options)
    if options.only_curves:
        return 0
    for network in networks:
        run_network(report, network, tasks, ways, learnt, options)
    report.finish(*summarise(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


Known = dict[tuple[int, str, str], Learnt]  # by number of processes, task and way


def learn_all(networks: Sequence[Network], tasks: Sequence[str], ways: Sequence[Way], options: Any) -> Known:
    """What is known of each way before any network, and of exact training in any case."""
    curves, found = Curves(options.curves), Known()
    needed = {"exact", *(way.like or way.name for way in ways if not way.chooses)}
    judged = [way for way in WAYS if way.name in needed]
    for num in sorted({network.num for network in networks}):
        with tempfile.TemporaryDirectory() as cache, contextlib.closing(_field(num, cache, options)) as field:
            for task, way in itertools.product(tasks, judged):
                steps = options.steps or TASKS[task].steps
                learnt = found[num, task, way.name] = curves.of(field, way, task, steps, options.seeds)
                told = learnt.error or f"{learnt.at(steps)[0]:.4f}"
                print(f"{num} processes, {task}, {way.name}: {told}", file=sys.stderr, flush=True)
    return found


def run_network(
    report: Report, network: Network, tasks: Sequence[str], ways: Sequence[Way], known: Known, options: Any
) -> None:
    """Adds the rows of one network. The caches of its machines start empty, as on machines that are new to partita."""
    with contextlib.ExitStack() as opened:
        cache = opened.enter_context(tempfile.TemporaryDirectory())
        rates = (network.rate,) * network.num if network.rate else ()
        machines = opened.enter_context(Machines(rates)) if rates else network.num
        field = opened.enter_context(contextlib.closing(_field(machines, cache, options)))
        for task in tasks:
            for row in rows_of(field, task, ways, known, options):
                report.add({"network": network.name, "task": task, **row})
                told = {name: row.get(name) for name in COLUMNS if row.get(name) is not None}
                print(f"{network.name}, {task}: {told}", file=sys.stderr, flush=True)


def _field(machines: Machines | int, cache: str, options: Any) -> Field:
    interpreters = {"hivemind": options.hivemind}
    return Field("benchmarks.loss_child", ROLES, machines, Path(cache), options.timeout, interpreters)


def rows_of(field: Field, task: str, ways: Sequence[Way], known: Known, options: Any) -> list[Row]:
    """Of each way on one network and task."""
    steps = options.steps or TASKS[task].steps
    exact = known[field.num, task, "exact"]
    target = None if exact.error else target_of(mean_of(exact.curves))
    timed = race(field, ways, task, options.rounds, options.round_seconds, options.settle)
    rows = []
    for way in ways:
        found = timed[way.name]
        if isinstance(found, str):
            learnt = Learnt(error=found)
        elif way.chooses:
            chosen = dataclasses.replace(way, name=found.method)  # asked again, it might choose another one
            learnt = learnt_by(found.method, field.num, task, timed, known) or learn(
                field, chosen, task, steps, options.seeds, target
            )
        else:
            learnt = known[field.num, task, way.like or way.name]
        rows.append(outcome(way, steps, target, learnt, found))
    judge(rows)
    return rows


def learnt_by(method: str, num: int, task: str, timed: Mapping[str, Timed | str], known: Known) -> Learnt | None:
    """What is known of a method that was chosen, if it is one of those that were judged."""
    for name, found in timed.items():
        learnt = known.get((num, task, name))
        if learnt is not None and not learnt.error and isinstance(found, Timed) and found.method == method:
            return learnt
    return None


if __name__ == "__main__":
    sys.exit(main())
