"""Ranked plans that all processes share: rank 0 searches."""

from __future__ import annotations

from torch import nn

from partita import errors
from partita.cost.table import CostTable
from partita.errors import PartitaError, StepError
from partita.graph import Graph
from partita.plan import Constraints, Plan
from partita.training.inputs import BatchLeaves
from partita.training.measuring import StepValues
from partita.training.planning import ranked_plans
from partita.training.setup import StepSetup


def step_values(model: nn.Module, graph: Graph, leaves: BatchLeaves) -> StepValues:
    """The real tensors of a step."""
    return StepValues(
        parameters=dict(model.named_parameters()),
        buffers=dict(model.named_buffers()),
        constants=graph.constants,
        leaves=leaves.tensors,
    )


def shared_plans(
    setup: StepSetup, graph: Graph, constraints: Constraints, values: StepValues | None, *, refines: bool = True
) -> tuple[Plan, ...]:
    """Plans best first (`ranked_plans`), on all processes, which call it alike.

    Raises:
        PlanError: there is none; on all of them.
    """
    plans: tuple[Plan, ...] = ()
    error: Exception | None = None
    if setup.team.rank == 0:
        try:
            cost = CostTable(setup.cluster, sums=setup.sums)
            plans = ranked_plans(graph, setup.cluster, cost, constraints, setup.facts, values=values, refines=refines)
        except Exception as found:
            error = found
    if error is not None and setup.team.is_alone:
        raise error
    told = type(error).__name__, str(error)
    (kind, problem), texts = setup.team.from_first((told, [plan.to_json() for plan in plans]))
    if kind != "NoneType":
        raise error or _error_of(kind, problem)
    return tuple(Plan.from_json(text) for text in texts)


def _error_of(kind: str, problem: str) -> PartitaError:
    """The error that planning met on rank 0, elsewhere."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, PartitaError):
        return found(problem)
    return StepError(f"process rank 0 failed while it planned: {kind}: {problem}")
