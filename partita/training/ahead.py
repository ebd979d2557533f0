"""Has what a plan needs compiled in the background, before its runner is made."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch

from partita.graph.graph import Graph
from partita.plan import Plan
from partita.program.instructions import Run
from partita.runtime.compiling import Background
from partita.runtime.segments import compile_ahead
from partita.training.optimizers import OptimizerFacts


def compile_segments(
    facts: OptimizerFacts, graph: Graph, plan: Plan, process: int, background: Background
) -> list[Future[Any]]:
    """Has the segments that a process runs by the plan compiled; what is to be waited for."""
    gpu = plan.workers[0].gpu
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    programs = facts.lowered(graph, plan)
    runs = [item for p in programs.programs if p.process == process for item in p.instructions]
    keys = dict.fromkeys(item.segment for item in runs if isinstance(item, Run))
    with torch.random.fork_rng(devices=[]):  # kernels may be measured, on random values
        futures = [
            compile_ahead(programs.segments[key], background, device=device, num_threads=plan.threads_per_worker)
            for key in keys
        ]
    return [future for future in futures if future is not None]


class Preparation:
    """What another plan's runner needs is made beside the steps, so that making the runner itself is short.

    Args:
        facts: of the optimizer.
        graph: the captured step.
        plan: of mode "graph", or "block", which needs nothing.
        process: rank of this process.
    """

    def __init__(self, facts: OptimizerFacts, graph: Graph | None, plan: Plan, process: int) -> None:
        self.graph, self.plan = graph, plan
        self._background: Background | None = None
        self._futures: list[Future[Any]] = []
        if plan.compiled and graph is not None:
            self._background = Background()
            try:
                self._futures = compile_segments(facts, graph, plan, process, self._background)
            except BaseException:
                self.close()
                raise

    @property
    def is_ready(self) -> bool:
        return all(future.done() for future in self._futures)

    def close(self) -> None:
        """Ends the compiling."""
        if self._background is not None:
            self._background.close()
            self._background = None
