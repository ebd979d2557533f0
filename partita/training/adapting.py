"""Runners for other batch shapes, or the same one after something else has changed: the same split, captured anew."""

from __future__ import annotations

import warnings
from typing import Any

import msgspec

from partita.errors import CaptureError, PlanError
from partita.graph import Graph
from partita.plan import Plan
from partita.training.ahead import Preparation
from partita.training.block_runner import BlockRunner
from partita.training.events import WarningRaised, emit
from partita.training.graph_runner import GraphRunner
from partita.training.planning import TooFewRowsError, adapted_plan, block_plan
from partita.training.setup import StepSetup, make_runner

MAX_GRAPHS = 8  # batch shapes and states of the model that are captured; further ones run as one block


class Adapter:
    """Makes them, of a plan of mode "graph".

    Args:
        setup: of the step.
    """

    def __init__(self, setup: StepSetup) -> None:
        self._setup = setup
        self._overflow: BlockRunner | GraphRunner | None = None
        self._prepared: tuple[object, Preparation] | None = None  # of which kind of batch

    def make(self, plan: Plan, graph: Graph | None) -> GraphRunner | BlockRunner:
        """The runner of a plan."""
        return make_runner(self._setup, plan, graph, self._setup.model, self._setup.optimizer)

    def adapt(
        self, plan: Plan, batch: Any, graph: Graph | None, *, compiled: bool, num_known: int
    ) -> GraphRunner | BlockRunner:
        """A runner for such a batch; `graph` is the step captured with it, if it was. `num_known`: how many there are
        already."""
        if self._overflow is not None:
            return self._overflow
        if num_known >= MAX_GRAPHS:
            reason = f"more than {MAX_GRAPHS} batch shapes or states of the model were seen"
            self._overflow = self.make(self._block(reason), None)
            return self._overflow
        try:
            graph = graph or self._setup.capture(batch)
            return self.make(msgspec.structs.replace(adapted_plan(plan, graph), compiled=compiled), graph)
        except TooFewRowsError as error:  # the rest of an epoch: nothing that the user should care about
            return self.make(block_plan(self._setup.cluster, graph=None, reasons=(str(error),)), None)
        except (CaptureError, PlanError) as error:
            return self.make(self._block(str(error)), None)

    def prepare(self, plan: Plan, batch: Any, kind: object) -> None:
        """Makes ready, beside the steps, what the runner for such a batch needs. The job must be of one process.

        Raises:
            CaptureError, PlanError: the plan cannot be had for it.
        """
        self.close()
        graph = self._setup.capture(batch)
        adapted = msgspec.structs.replace(adapted_plan(plan, graph), compiled=plan.compiled)
        self._prepared = kind, Preparation(self._setup.facts, graph, adapted, process=0)

    @property
    def is_prepared(self) -> bool:
        """Whether nothing is waited for."""
        return self._prepared is None or self._prepared[1].is_ready

    def prepared(self, kind: object) -> tuple[Plan, GraphRunner | BlockRunner] | None:
        """The plan and runner that were prepared for this kind of batch; None if they were not."""
        if self._prepared is None or self._prepared[0] != kind:
            return None
        made = self._prepared[1]
        runner = self.make(made.plan, made.graph)
        self.close()
        return made.plan, runner

    def close(self) -> None:
        """Ends what is being made ready."""
        if self._prepared is not None:
            self._prepared[1].close()
            self._prepared = None

    def _block(self, reason: str) -> Plan:
        message = (
            "from this step on, batches of this kind run as one block of plain PyTorch, which is right but not split: "
            f"{reason}. Pad or bucket batches to few shapes, and pass what changes from step to step as a tensor in "
            "the batch"
        )
        warnings.warn(message, stacklevel=7)
        emit(WarningRaised(subject="batch", message=message))
        return block_plan(self._setup.cluster, graph=None, reasons=(reason,))
