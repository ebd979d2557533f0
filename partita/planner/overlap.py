"""Buckets of gradients that are exchanged between processes in the background of the backward phase: of which size?

With a backward phase of B seconds, an exchange of all gradients of C seconds and a latency of a seconds for each
bucket (what it takes of a worker whose process has no core left for it included), k equal buckets leave

    exchange-bound (C > B)    B/k + k a + C          the first bucket has to be made before anything is sent
    compute-bound  (C < B)    B + C/k + a            the last one is sent when all is over

so k = sqrt(min(B, C) / a) or a few more buckets are best (the least of B/k + k a; below it, latencies are hidden as
well). Real buckets are not equal, and segments that are cut take longer: half, once and twice as many are simulated,
and taken only if that predicts a gain. Source of the question: Li et al. 2020, PyTorch Distributed, section 3.2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from partita.cost.model import CostModel
from partita.plan import Plan, Worker
from partita.units import format_bytes, format_time

LEAST_SHARE = 0.05  # of the step that an exchange must take to be worth hiding
LEAST_GAIN = 0.02  # of the predicted step
MOST_BUCKETS = 64
LEAST_BUCKET_BYTES = 16 * 1024
BACKWARD_SHARE = 2 / 3  # of the time of forward and backward phase


def bucket_sizes(plan: Plan, step_time_s: float, gradient_bytes: int, cost: CostModel) -> tuple[int, ...]:
    """The sizes that are worth a simulation, of a plan that is predicted to take `step_time_s` without buckets; none
    where nothing is exchanged between processes, or next to no time would be saved.

    Example:
        >>> bucket_sizes(plan, 0.2, 8_000_000, cost)                                           # doctest: +SKIP
        (1333333, 666666, 333333)
    """
    group = _one_of_each_process(plan)
    if plan.mode != "graph" or plan.axes.get("pipeline", 1) > 1 or len(group) < 2 or not gradient_bytes:
        return ()
    latency_s = cost.gradient_sum_time_s(0, group)
    exchange_s = cost.gradient_sum_time_s(gradient_bytes, group) - latency_s
    if exchange_s < LEAST_SHARE * step_time_s:
        return ()
    backward_s = BACKWARD_SHARE * max(step_time_s - exchange_s, 0.0)
    used, num = plan.used_cores, len(group)
    taken_s = max(cost.interruption_s(0, w, num_processes=num, num_busy=used[w.process]) for w in group)
    count = math.sqrt(min(backward_s, exchange_s) / max(latency_s + taken_s, 1e-9))
    most = min(MOST_BUCKETS, gradient_bytes // LEAST_BUCKET_BYTES)
    counts = {min(max(round(factor * count), 2), most) for factor in (0.5, 1.0, 2.0)}
    return tuple(gradient_bytes // number for number in sorted(counts) if number >= 2)


def best_buckets(
    plan: Plan,
    gradient_bytes: int,
    cost: CostModel,
    evaluate: Callable[[Plan], Plan | None],
    *,
    keeps_microbatches: bool = False,
) -> Plan:
    """The plan, or one with buckets that `evaluate` predicts to be faster by `LEAST_GAIN`. `evaluate` gives a plan with
    its prediction, or None where it cannot be. Sums over microbatches are complete at the end only, so a plan with
    buckets has one microbatch, unless the caller fixed their number (`keeps_microbatches`)."""
    assert plan.prediction is not None
    plain_s = plan.prediction.step_time_s
    if keeps_microbatches and plan.num_microbatches > 1:
        return plan
    best, best_s = plan, plain_s * (1 - LEAST_GAIN)
    for num_bytes in bucket_sizes(plan, plain_s, gradient_bytes, cost):
        found = evaluate(msgspec.structs.replace(plan, num_microbatches=1, bucket_bytes=num_bytes))
        if found is not None and found.prediction is not None and found.prediction.step_time_s < best_s:
            best, best_s = found, found.prediction.step_time_s
    if best is plan:
        return plan
    reason = (
        f"gradients are exchanged in buckets of {format_bytes(best.bucket_bytes)} in the background of the backward "
        f"phase, which is predicted to save {format_time(plain_s - best_s)} a step"
    )
    return msgspec.structs.replace(best, reasons=(*best.reasons, reason))


def _one_of_each_process(plan: Plan) -> tuple[Worker, ...]:
    return tuple({worker.process: worker for worker in reversed(plan.workers)}.values())
