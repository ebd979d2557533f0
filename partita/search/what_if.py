"""How the best configuration would change with other resources.

What is measured: each candidate's learning curve in samples, and its step time on the cores that it was trained on.
Exact plans keep the mathematics, so the curve holds for any of them. What is predicted: the step time under the best
plan of each cluster, by the planner from times of ops on this machine and the link that the cluster names; it is
multiplied by what this machine needs for the measured step in place of its prediction. So

    samples on a cluster = (time of the final training) (rows of a batch) / (predicted step time x measured / predicted)

and the score is read from the curve there, or extrapolated (`curves`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from partita.cluster import Cluster
from partita.errors import CaptureError, PlanError
from partita.graph import Graph, capture
from partita.plan import Plan
from partita.planner.describe import title
from partita.search.candidates import Candidate
from partita.search.curves import score_at
from partita.search.parts import first_batch
from partita.search.pricing import best_plan, one_plan
from partita.search.report import values_of
from partita.search.resources import cores_of
from partita.search.trials import SearchTrial
from partita.units import format_time

if TYPE_CHECKING:
    from partita.search.result import SearchResult

NUM_COMPARED = 6


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A candidate on a cluster: the plan's step time there, and its score with that many samples."""

    candidate: int
    plan: str
    step_time_s: float
    samples: float
    score: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """By name of the resources, the outcomes of the compared candidates, best first. `ratios`: by candidate, the
    measured step time divided by its prediction. `left_out`: candidates that could not be compared, and why."""

    train_s: float
    outcomes: dict[str, tuple[Outcome, ...]]
    ratios: dict[int, float]
    left_out: dict[int, str]
    values: dict[int, str]

    def __str__(self) -> str:
        rows = [("resources", "best", "score", "step", "samples", "plan", "values")]
        for name, found in self.outcomes.items():
            if found:
                best = found[0]
                rows.append(
                    (
                        name,
                        str(best.candidate),
                        f"{best.score:.4g} +-{best.deviation:.1g}",
                        format_time(best.step_time_s),
                        f"{best.samples:,.0f}",
                        best.plan,
                        self.values[best.candidate],
                    )
                )
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = ["  ".join([*map(str.ljust, row[:6], widths), row[6]]).rstrip() for row in rows]
        chosen = {found[0].candidate for found in self.outcomes.values() if found}
        verdict = "The best candidate is another one" if len(chosen) > 1 else "The best candidate is the same"
        compared = ", ".join(f"{number} (x {ratio:.2g})" for number, ratio in self.ratios.items())
        told = (
            f"{verdict} with other resources. {format_time(self.train_s)} of training each. Measured: learning curves "
            "by samples, and step times here. Predicted: step times (the planner's, times measured over predicted ones "
            f"here), and scores beyond what was trained. Compared: candidates {compared}"
        )
        left = [f"candidate {number} is left out: {why}" for number, why in self.left_out.items()]
        return "\n".join([*lines, "", told, *left])


def what_if(result: SearchResult, clusters: Mapping[str, Cluster]) -> WhatIf:
    """How the candidates of a search would do on other clusters in the time of its final training.

    Example:
        >>> from partita.search.resources import resources
        >>> print(what_if(result, resources("1,2,4 machines", partita.Cluster.detect())))
    """
    train_s = result.budget.final_s
    ratios: dict[int, float] = {}
    left_out: dict[int, str] = {}
    found: dict[str, list[Outcome]] = {name: [] for name in clusters}
    for candidate in _compared(result):
        try:
            step = _Step(result, candidate)
            ratios[candidate.number] = step.ratio
            for name, cluster in clusters.items():
                found[name].append(_outcome(result, candidate, step, step.best_plan(cluster), train_s))
        except (CaptureError, PlanError) as error:
            left_out[candidate.number] = str(error)
    sign = result.aims.sign
    return WhatIf(
        train_s=train_s,
        outcomes={name: tuple(sorted(rows, key=lambda row: sign * row.score)) for name, rows in found.items()},
        ratios=ratios,
        left_out=left_out,
        values={one.number: values_of(one) for one in result.trials},
    )


def _compared(result: SearchResult) -> Sequence[Candidate]:
    """Those of the Pareto front, and the ones with the best scores: other resources choose among them."""
    judged = [one for one in result.trials if len(one.points) > 1 and one.samples_per_s > 0]
    sign = result.aims.sign
    best = sorted(judged, key=lambda one: sign * result.predicted(one))[: NUM_COMPARED // 2]
    front = [one for one in result.pareto if one in judged and one not in best]
    return [*best, *front][:NUM_COMPARED]


class _Step:
    """A candidate's training step, to be planned for clusters."""

    def __init__(self, result: SearchResult, candidate: Candidate) -> None:
        task, trial = result.task, SearchTrial(candidate.number, candidate.params)
        model = task.build(trial)
        self._optimizer = task.optimizer(trial, model)
        batch = first_batch(task.parts()[0], candidate.batch_size)
        with torch.random.fork_rng(devices=[]):
            self._graph: Graph = capture(model, task.loss_fn, batch)
        here = Cluster.detect()
        own = cores_of(here, min(candidate.num_cores, here.num_cores))
        same = one_plan(self._graph, own, self._optimizer, num_threads=own.num_cores)
        self.ratio = candidate.step_time_s / same.step_time_s

    def best_plan(self, cluster: Cluster) -> Plan:
        return best_plan(self._graph, cluster, self._optimizer)


def _outcome(result: SearchResult, candidate: Candidate, step: _Step, plan: Plan, train_s: float) -> Outcome:
    if plan.prediction is None:
        raise PlanError("its plan has no prediction")
    step_time_s = plan.prediction.step_time_s * step.ratio
    rows = candidate.samples_per_s * candidate.step_time_s
    samples = train_s * rows / step_time_s
    score = score_at(candidate.points, samples, maximize=result.aims.maximize, bound=result.aims.bound)
    return Outcome(
        candidate=candidate.number,
        plan=title(plan),
        step_time_s=step_time_s,
        samples=samples,
        score=score.score,
        deviation=score.deviation,
    )
