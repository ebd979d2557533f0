"""What was adopted in earlier runs: a step that was planned and measured before is not planned again.

Kept are the candidates as they were planned and, once all were tried, the fastest by measured step times. They are
choices, not results: a plan that is read is held against the graph and the cluster of now like one that a user gives,
and it is measured again before it is adopted.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from partita.cache import read_json, write_json
from partita.cluster import Cluster
from partita.errors import PartitaError
from partita.graph import Graph
from partita.plan import Constraints, Plan, cluster_fingerprint
from partita.training.optimizers import OptimizerFacts
from partita.units import fingerprint

FORMAT = 2
NUM_KEPT = 3
RECALLED = "among the fastest candidates of an earlier run on these machines"
CLOSE_RATIO = 1.15  # further ones are measured again if they took at most this times the fastest


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    plan: Plan
    step_time_s: float | None  # None: not measured yet


class _File(msgspec.Struct, frozen=True, kw_only=True):
    question: str
    kept: tuple[_Kept, ...]


class Memory:
    """The plans of one step: of a graph, a cluster, constraints, an optimizer and a synchronisation method."""

    def __init__(
        self, graph: Graph, cluster: Cluster, constraints: Constraints, facts: OptimizerFacts, sync: str
    ) -> None:
        self._graph, self._cluster = graph, cluster
        # Part of the name and of the content, where it must be equal: a name is only a hash.
        self._question = " | ".join(
            [
                f"format {FORMAT}, torch {torch.__version__}",
                f"graph {graph.fingerprint}",
                f"cluster {cluster_fingerprint(cluster)}",
                f"machines {[(m.cpu, m.cores, m.cache_bytes, [g.name for g in m.gpus]) for m in cluster.machines]}",
                f"constraints {msgspec.json.encode(constraints, order='sorted').decode()}",
                f"optimizer {facts.name} {facts.kind} {facts.state_bytes_per_element} {facts.update_values}",
                f"sync {sync}",
                f"threads {torch.get_num_threads()}",
            ]
        )
        self._name = f"plans/{fingerprint([self._question])}.json"

    def recall(self) -> tuple[Plan, ...]:
        """The fastest plan of earlier runs, those that came close or are predicted to be faster, and plain PyTorch,
        fastest first; all candidates if no run has tried them all; empty if nothing is known that can be used now."""
        content = read_json(self._name)
        if content is None:
            return ()
        try:
            found = msgspec.convert(content, _File)
            for one in found.kept:
                one.plan.validate(self._graph if one.plan.mode == "graph" else None, self._cluster)
        except (msgspec.ValidationError, PartitaError):
            return ()
        if found.question != self._question or not found.kept:
            return ()
        best_s = min((one.step_time_s for one in found.kept if one.step_time_s is not None), default=0.0)
        return tuple(
            _as_measured(one)
            for one in found.kept
            if one.step_time_s is None or one.step_time_s <= CLOSE_RATIO * best_s or _is_due(one.plan, best_s)
        )

    def remember_candidates(self, plans: Sequence[Plan]) -> None:
        """Keep what was planned, best first. Raises OSError."""
        self._write([(plan, None) for plan in plans])

    def remember(self, measured: Sequence[tuple[Plan, float]]) -> None:
        """Keep the fastest of `measured` (plans and seconds a step, fastest first). Raises OSError."""
        best_s = measured[0][1] if measured else 0.0
        self._write([pair for index, pair in enumerate(measured) if index < NUM_KEPT or _is_due(pair[0], best_s)])

    def _write(self, chosen: Sequence[tuple[Plan, float | None]]) -> None:
        kept = tuple(
            _Kept(
                plan=msgspec.structs.replace(plan, measured_step_time_s=None, alternatives=()),
                step_time_s=time_s,
            )
            for plan, time_s in chosen
        )
        write_json(self._name, msgspec.to_builtins(_File(question=self._question, kept=kept)))


def _as_measured(kept: _Kept) -> Plan:
    """The plan with the step time of the earlier run, which stands until this one has measured it again."""
    if kept.step_time_s is None:
        return kept.plan
    others = [reason for reason in kept.plan.reasons if reason != RECALLED]
    return msgspec.structs.replace(kept.plan, measured_step_time_s=kept.step_time_s, reasons=(*others, RECALLED))


def _is_due(plan: Plan, best_s: float) -> bool:
    """Whether a plan is measured again whatever it took: plain PyTorch, not compiled, which every plan must beat; and
    what is predicted to be faster than the best, since the machine may have been busy when it was measured."""
    if plan.mode == "block":
        return not plan.compiled
    return plan.prediction is not None and plan.prediction.step_time_s < best_s
