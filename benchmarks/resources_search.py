"""The best configuration found for each kind of resources, run on all of them: a cross table.

    python -m benchmarks.resources_search --json benchmarks/results/resources_search.json --check

Resources are one core, two cores, and two emulated machines of one core each at 100 Mbit/s (which need root,
`benchmarks.slow_machines`). For each, a configuration of `benchmarks.joint_task` is searched on this machine; then
every configuration is trained from new weights on every kind of resources, by the plan that partita adopts for it
there, for the same time. A cell is the mean test loss over seeds. How many steps fit into the time is measured before,
once a cell, and the same for all seeds; `seconds` is what they took.

`--check` fails where on some resources another configuration than their own is best, or two of them are the same.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import partita  # before torch: it makes waiting threads sleep instead of spin
from benchmarks.common import Report, Row, option_parser, show
from benchmarks.joint_peers import Training
from benchmarks.joint_task import Config, batch_size, build, data, loss_fn, optimizer, test_loss
from benchmarks.processes import Child, Message, serve
from benchmarks.slow_field import Field, what_failed
from benchmarks.slow_machines import Machines
from partita.planner.describe import title
from partita.search.training_run import DECAY_SHARE, decay

MODULE, ROLE = "benchmarks.resources_search", "any"
RATE = 12.5e6  # bytes a second: 100 Mbit/s
NUM_TIMED = 20  # steps, to know how many fit into the time
LIMIT_S = 900.0  # for a plan to be adopted
COLUMNS = ("configuration", "resources", "test", "deviation", "steps", "seconds", "plan", "values")


@dataclass(frozen=True)
class Resources:
    """What a configuration is searched for. `cores`: of the search; `words`: what it is told of them."""

    name: str
    cores: tuple[int, ...]
    words: str | None = None


ONE, TWO = Resources("one core", (0,)), Resources("two cores", (0, 1))
APART = Resources("two machines", (0,), "2 machines at 100 Mbit/s")
ALL = (ONE, TWO, APART)


# The children ---------------------------------------------------------------------------------------------------------


def search(message: Message) -> Message:
    result = partita.search(
        build, data, deadline=message["deadline_s"], loss_fn=loss_fn, optimizer=optimizer, batch_size=batch_size,
        folder=message["folder"], seed=message["seed"], resources=message["words"], final_share=message["final_share"],
    )  # fmt: skip
    return {"config": asdict(Config.of(result.best.params)), "score": result.score, "trials": len(result.trials)}


def settle(message: Message) -> Message:
    """The plan that is adopted for a configuration here, and how long its steps take."""
    training = Training(Config(**message["config"]), seed=0)
    with partita.parallelize(training.model, training.optimizer, loss_fn, training.batch()) as step:
        while not step.is_settled:
            step(training.batch())
        start_s = time.perf_counter()
        for _ in range(NUM_TIMED):
            step(training.batch())
        step_time_s = (time.perf_counter() - start_s) / NUM_TIMED
        return {"plan": step.plan.to_json().decode(), "step_time_s": step_time_s, "title": title(step.plan)}


def train(message: Message) -> Message:
    """So many steps by a plan, with the rate's decay: the loss in the test."""
    training = Training(Config(**message["config"]), seed=message["seed"])
    plan, num_steps, rate = (
        partita.Plan.from_json(message["plan"].encode()),
        message["steps"],
        training.config.learning_rate,
    )
    with partita.parallelize(training.model, training.optimizer, loss_fn, training.batch(), plan=plan) as step:
        step(training.batch())
        start_s = time.perf_counter()
        for number in range(1, num_steps):
            for group in training.optimizer.param_groups:
                group["lr"] = rate * decay(number, 0.0, num_steps)
            step(training.batch())
        seconds = (time.perf_counter() - start_s) * num_steps / max(1, num_steps - 1)
        step.sync_to(training.model)
    return {"test": test_loss(training.model), "seconds": seconds}


ROLES = {"search": search, "settle": settle, "train": train}


# The parent -----------------------------------------------------------------------------------------------------------


Ask = Callable[[Message], list[Row]]


@contextlib.contextmanager
def placed(resources: Resources, cache: Path) -> Iterator[Ask]:
    """Processes on some resources, asked together."""
    if resources is APART:
        with Machines((RATE, RATE)) as machines:
            field = Field(MODULE, (ROLE,), machines, cache, LIMIT_S)
            try:
                yield lambda message: _answers(field.ask(ROLE, message))
            finally:
                field.close()
    else:
        with _pinned(resources.cores) as child:
            yield lambda message: _answers([child.ask(message, LIMIT_S)])


def _answers(replies: list[Row] | str) -> list[Row]:
    """Raises RuntimeError where one has failed."""
    if isinstance(replies, str):
        raise RuntimeError(replies)
    failed = [row for row in replies if "error" in row]
    if failed:
        raise RuntimeError(what_failed(failed))
    return replies


def _pinned(cores: Sequence[int]) -> Child:
    return Child(MODULE, ROLE, prefix=["taskset", "-c", ",".join(map(str, cores))], num_threads=len(cores))


def searched(resources: Resources, options: Any, folder: Path) -> Row:
    """The best configuration of several searches, by the score that they have chosen it by."""
    found = []
    for seed in range(options.searches):
        with _pinned(resources.cores) as child:
            message = {"role": "search", "deadline_s": options.deadline, "words": resources.words, "seed": seed,
                       "folder": str(folder / f"{resources.name}-{seed}"),
                       "final_share": options.seconds / options.deadline}  # fmt: skip
            found += _answers([child.ask(message, 2 * options.deadline + 60)])
    return min(found, key=lambda row: row["score"])


def cell(ask: Ask, config: Mapping[str, Any], options: Any) -> Row:
    """One configuration on one kind of resources."""
    settled = ask({"role": "settle", "config": config})
    steps = max(1, round(options.seconds / max(row["step_time_s"] for row in settled)))
    runs = [
        ask({"role": "train", "config": config, "plan": settled[0]["plan"], "steps": steps, "seed": seed})
        for seed in range(options.seeds)
    ]
    tests = [run[0]["test"] for run in runs]
    return {
        "test": round(statistics.mean(tests), 4),
        "deviation": round(statistics.stdev(tests), 4) if len(tests) > 1 else 0.0,
        "steps": steps,
        "seconds": statistics.mean(run[0]["seconds"] for run in runs),
        "plan": settled[0]["title"],
        "tests": tests,
    }


def misses_of(rows: Sequence[Row]) -> list[str]:
    found = []
    for resources in ALL:
        there = {row["configuration"]: row["test"] for row in rows if row["resources"] == resources.name}
        best = min(there, key=lambda name: there[name], default=resources.name)
        if best != resources.name:
            found.append(f"on {resources.name} the configuration of {best} is best: {there}")
    values = {row["configuration"]: row["values"] for row in rows}
    if len(set(values.values())) < len(values):
        found.append(f"two configurations are the same: {values}")
    return found


def main() -> int:
    parser = option_parser("The best configuration for each kind of resources, run on all of them.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--searches", type=int, default=1, help="of each kind of resources; the best one counts")
    parser.add_argument("--deadline", type=float, default=150.0, help="of each search, seconds")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each training")
    options = parser.parse_args()
    if options.child:
        serve(lambda message: ROLES[message["role"]](message))
        return 0
    names = ("seeds", "searches", "deadline", "seconds")
    settings = {name: getattr(options, name) for name in names} | {"decay_share": DECAY_SHARE}
    report = Report("resources_search", settings, options.json)
    with tempfile.TemporaryDirectory() as folder:
        configs = {one.name: searched(one, options, Path(folder))["config"] for one in ALL}
        for resources in ALL:
            with placed(resources, Path(folder) / "cache") as ask:
                for name, config in configs.items():
                    row = {"configuration": name, "resources": resources.name, "values": str(Config(**config))}
                    report.add(row | cell(ask, config, options))
    report.finish({name: str(Config(**config)) for name, config in configs.items()}, misses_of(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
