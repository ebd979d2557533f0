"""Costs of a stage from a few rates: a roofline for ops, alpha-beta for exchanges (see `partita.cost.roofline`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partita.sharding.calls import Op, OpCall
from partita.sharding.conversions import conversion_kind
from partita.sharding.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins the workers of one mesh axis."""

    size: int
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class StageRates:
    """Every worker alike; satisfies `partita.planner.intra.from_graph.StageCosts`.

    Attributes:
        links: by axis name.
        update_bytes_per_element: what the optimizer reads and writes (Adam in float32: 28).
    """

    flops_per_s: float
    memory_bytes_per_s: float
    links: Mapping[str, Link]
    op_latency_s: float = 0.0
    update_bytes_per_element: float = 28.0

    def op_time_s(self, op: Op, local: OpCall, share: float) -> float:
        """The larger of arithmetic and traffic; no time for views."""
        if getattr(local.target, "is_view", False):
            return 0.0
        num_bytes = sum(spec.num_bytes for spec in (*local.inputs, *local.outputs) if spec is not None)
        flops = (op.info.flops if op.info is not None else 0) * share
        return self.op_latency_s + max(flops / self.flops_per_s, num_bytes / self.memory_bytes_per_s)

    def conversion_time_s(self, source: Placement, target: Placement, num_bytes: int, axis: str) -> float:
        """Ring algorithms: ``rounds (p - 1) a + passes (p - 1) / p B / b``; local work by the bytes that it writes."""
        link, kind = self.links[axis], conversion_kind(source, target)
        rounds_s = (link.size - 1) * link.latency_s
        ring_s = rounds_s + (link.size - 1) / link.size * num_bytes / link.bytes_per_s
        local_s = num_bytes / self.memory_bytes_per_s
        return {
            "none": 0.0,
            "slice": 0.0,
            "keep": local_s,
            "pad": local_s,
            "all_reduce": 2 * ring_s,
            "reduce_scatter": ring_s,
            "all_gather": ring_s,
            "all_to_all": rounds_s + (ring_s - rounds_s) / link.size,
            "gather_slice": ring_s + local_s / link.size,
        }[kind]

    def update_time_s(self, num_elements: int) -> float:
        """The optimizer's traffic."""
        return num_elements * self.update_bytes_per_element / self.memory_bytes_per_s

    def load_time_s(self, num_bytes: int) -> float:
        """Read once."""
        return num_bytes / self.memory_bytes_per_s
