"""`SearchResult`: what `partita.search` returns."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from partita.search.allocation import front
from partita.search.candidates import Aims, Candidate
from partita.search.deadline import Budget
from partita.search.delivery import with_weights
from partita.search.parts import CAPTURED_ROWS, first_batch
from partita.search.report import Range, report
from partita.search.task import Task
from partita.search.trials import SearchTrial

LEAST_JUDGED = 8  # candidates, below which importances are chance
OBJECTIVES = ("score", "parameters", "step_time")


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The network that a search has found and trained, and what was learnt on the way.

    Args:
        best: the candidate that was delivered.
        score: of the delivered weights, on the judged part of the data.
        trials: all candidates, in the order in which they were proposed.
        weights: the file of the delivered weights (safetensors).
        folder: of the search, with its study, checkpoints and results.
        study: Optuna's, e.g. for its visualisations.

    Example:
        >>> result = partita.search(build, data, deadline="20m")
        >>> print(result.explain())
        >>> result.model(inputs)
    """

    best: Candidate
    score: float
    trials: tuple[Candidate, ...]
    weights: Path
    folder: Path
    budget: Budget
    delivered_s: float
    aims: Aims
    task: Task = field(repr=False)
    study: optuna.Study = field(repr=False)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The delivered network, built once more with the delivered weights, in evaluation mode."""
        return with_weights(self.task.build(SearchTrial(self.best.number, self.best.params)), self.weights)

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the delivered network as files that load without partita (`partita.search.structure.save_network`):
        ``model.py`` with plain classes, as it is in evaluation mode, and ``weights.safetensors``; where connections
        were learnt, ``masks.safetensors`` as well.

        Args:
            folder: where the files go.

        Returns:
            the folder.

        Raises:
            InputError: `torch.export` cannot capture the network.
        """
        from partita.search.around import call_of
        from partita.search.structure import Network, save_network  # they take long to import, and few need them

        args, kwargs = call_of(self.model, self.task.loss_fn, first_batch(self.task.parts()[0], CAPTURED_ROWS))
        network = Network(self.model, args, kwargs)
        masks = {name: tensor != 0 for name, tensor in network.parameters.items() if bool((tensor == 0).any())}
        return save_network(network, Path(folder), masks if self._has_learnt_connections else None)

    @property
    def _has_learnt_connections(self) -> bool:
        connections = self.task.connections
        return connections is not None and connections(SearchTrial(self.best.number, self.best.params)) is not None

    def predicted(self, candidate: Candidate) -> float:
        """The score that a candidate could be relied on to have at the deadline, had it been chosen for the final
        training (`Aims.relied_on`); of the delivered one, the score that it has."""
        if candidate.number == self.best.number:
            return self.score
        return self.aims.relied_on(candidate, self.budget, self.budget.explore_end_s)

    @property
    def pareto(self) -> tuple[Candidate, ...]:
        """Candidates that no other one dominates in (predicted) score, parameters and step time, best score first."""
        aims = Aims(objectives=OBJECTIVES, maximize=self.aims.maximize, bound=self.aims.bound)
        judged = [one for one in self.trials if one.points]
        values = [aims.turned(one, self.predicted(one)) for one in judged]
        return tuple(judged[i] for i in sorted(front(values), key=lambda i: values[i]))

    @functools.cached_property
    def importance(self) -> dict[str, float]:
        """How much each suggested value mattered for the score, adding up to 1; empty where too few trials tell."""
        if sum(bool(one.points) for one in self.trials) < LEAST_JUDGED:
            return {}
        sign = self.aims.sign  # it asks what the trials with the lowest values share
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it does so
                found = optuna.importance.get_param_importances(self.study, target=lambda trial: sign * trial.values[0])
        except (ValueError, RuntimeError):
            return {}
        return {name: float(share) for name, share in found.items()}

    @functools.cached_property
    def ranges(self) -> dict[str, Range]:
        """What each value was suggested from."""
        found: dict[str, Range] = {}
        for trial in self.study.get_trials(deepcopy=False):
            for name, kind in trial.distributions.items():
                if isinstance(kind, CategoricalDistribution):
                    found[name] = Range(choices=tuple(kind.choices))
                elif isinstance(kind, (IntDistribution, FloatDistribution)):
                    found[name] = Range(low=float(kind.low), high=float(kind.high), log=kind.log)
        return found

    def explain(self) -> str:
        """The long text: the best network, the Pareto front, which values mattered, and what to try next."""
        return report(self)

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "best": self.best,
            "score": self.score,
            "params": self.best.params,
            "weights": str(self.weights),
            "folder": str(self.folder),
            "deadline_s": self.budget.deadline_s,
            "delivered_s": self.delivered_s,
            "pareto": [{"candidate": one.number, "score": self.predicted(one)} for one in self.pareto],
            "importance": self.importance,
            "trials": self.trials,
        }
