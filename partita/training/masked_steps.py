"""The steps of a model in blocks after which connections are chosen by the gradients of all elements.

Such gradients exist in the masked form of the step only, so that one makes these steps, every so many: from the user's
dense weights, which have zeros where nothing is, and with the same split of the batch, so that all processes have the
rows that they need. It is captured and planned once, and not compiled: what is saved in so few steps would not pay.
"""

from __future__ import annotations

import warnings
from typing import Any

import msgspec

from partita.errors import CaptureError, PlanError
from partita.graph import Graph
from partita.plan import Constraints, Plan
from partita.training.block_runner import BlockRunner
from partita.training.events import WarningRaised, emit
from partita.training.graph_runner import GraphRunner
from partita.training.planning import block_plan
from partita.training.setup import StepSetup, make_runner
from partita.training.shared_plans import shared_plans


def masked_runner(setup: StepSetup, plan: Plan, batch: Any) -> GraphRunner | BlockRunner:
    """The runner of the masked form for such a batch.

    Args:
        setup: of the step without blocks.
        plan: by which the steps in blocks are made.
        batch: a global batch.
    """
    if plan.mode == "block":
        plan = msgspec.structs.replace(plan, compiled=False)
        return make_runner(setup, plan, None, setup.model, setup.optimizer)
    try:
        graph = setup.capture(batch)
        return make_runner(setup, _split_alike(setup, plan, graph), graph, setup.model, setup.optimizer)
    except (CaptureError, PlanError) as error:
        message = (
            "the steps after which connections are chosen run as one block of plain PyTorch, since the plan of the "
            f"others cannot be had for masked weights: {error}"
        )
        warnings.warn(message, stacklevel=6)
        emit(WarningRaised(subject="connections", message=message))
        return make_runner(
            setup, block_plan(setup.cluster, graph=None, reasons=(str(error),)), None, setup.model, setup.optimizer
        )


def _split_alike(setup: StepSetup, plan: Plan, graph: Graph) -> Plan:
    """The plan of another graph of the same batch, by the same workers with the same rows."""
    wanted = Constraints(
        data=plan.axes.get("data", 1),
        tensor=plan.axes.get("tensor", 1),
        pipeline=plan.axes.get("pipeline", 1),
        num_workers=len(plan.workers),
        threads_per_worker=plan.threads_per_worker,
        num_microbatches=plan.num_microbatches,
        schedule="gpipe" if plan.schedule == "gpipe" else "1f1b",
        compiled=False,
        local_statistics=plan.local_statistics,
        fully_sharded=any("data" in by_axis for by_axis in plan.inputs.values()),
    )
    found = shared_plans(setup, graph, wanted, None, refines=False)[0]
    return msgspec.structs.replace(found, workers=plan.workers, shares=plan.shares)
