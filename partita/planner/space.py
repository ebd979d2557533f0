"""The corners of the plan space: everything but the stage boundaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from partita.cluster.model import Cluster
from partita.errors import InfeasibleError
from partita.plan import Constraints, Schedule, Worker
from partita.planner.deals import deals, share_vectors
from partita.planner.layout import room, worker_layout


@dataclass(frozen=True, kw_only=True)
class Corner:
    """A plan without stage boundaries."""

    data: int
    pipeline: int
    tensor: int
    threads_per_worker: int
    num_microbatches: int
    schedule: Schedule
    compiled: bool
    workers: tuple[Worker, ...]
    shares: tuple[int, ...] = ()  # rows of the batch by data coordinate; () where it has none


def corners(
    cluster: Cluster, constraints: Constraints, *, batch_size: int, num_ops: int, microbatches: bool
) -> tuple[Corner, ...]:
    """All corners within `constraints`. Workers share cores only if the constraints force it.

    Raises `InfeasibleError`, with the reason of the nearest miss, if there is none.
    """
    reasons: list[str] = []
    found: list[Corner] = []
    for threads, data, pipeline, tensor in _meshes(cluster, constraints, num_ops, batch_size):
        if data > max(batch_size, 1):
            reasons.append(
                f"data must be at most the {batch_size} rows of the batch, but got data={data}. Use a larger batch."
            )
            continue
        try:
            layouts = _layouts(cluster, data, pipeline, tensor, threads)
        except InfeasibleError as error:
            reasons.append(str(error))
            continue
        rows = batch_size // data
        for num_microbatches in _microbatch_counts(constraints, rows, microbatches):
            if num_microbatches > max(rows, 1):
                reasons.append(
                    f"num_microbatches must be at most the {rows} rows of a worker, but got {num_microbatches}."
                )
                continue
            placed = [
                (workers, shares)
                for workers in layouts
                for shares in share_vectors(cluster, workers, data, batch_size, num_microbatches)
            ]
            schedules = _schedules(constraints, pipeline, num_microbatches)
            kinds = (True, False) if constraints.compiled is None else (constraints.compiled,)
            for schedule, compiled, (workers, shares) in product(schedules, kinds, placed):
                found.append(
                    Corner(
                        data=data,
                        pipeline=pipeline,
                        tensor=tensor,
                        threads_per_worker=threads,
                        num_microbatches=num_microbatches,
                        schedule=schedule,
                        compiled=compiled,
                        workers=workers,
                        shares=shares,
                    )
                )
    if not found:
        raise InfeasibleError(reasons[0] if reasons else "No mesh satisfies the constraints: free one of them.")
    return tuple(found)


def _layouts(cluster: Cluster, data: int, pipeline: int, tensor: int, threads: int) -> list[tuple[Worker, ...]]:
    """The ways of placing a mesh on the processes (one on equal machines)."""
    total = data * pipeline * tensor
    first = worker_layout(cluster, data, pipeline, total, threads, tensor)  # refuses what cannot be
    if len(cluster.processes) == 1:
        return [first]
    candidates = deals(cluster, total, threads, ordered=pipeline > 1)
    return [worker_layout(cluster, data, pipeline, total, threads, tensor, deal) for deal in candidates]


def _meshes(
    cluster: Cluster, constraints: Constraints, num_ops: int, batch_size: int
) -> Iterator[tuple[int, int, int, int]]:
    """(threads a worker, data, pipeline, tensor)."""
    limit = min((len(process.cores) for process in cluster.processes if not process.gpus), default=1)
    thread_counts = range(1, limit + 1) if constraints.threads_per_worker is None else (constraints.threads_per_worker,)
    for threads in thread_counts:
        most = max(sum(room(process, threads) for process in cluster.processes), len(cluster.processes))
        for tensor in _tensor_extents(constraints, batch_size, most):
            yield from _meshes_of(cluster, constraints, num_ops, threads, most, tensor)


def _tensor_extents(constraints: Constraints, batch_size: int, most: int) -> tuple[int, ...]:
    """A tensor axis is placed by an integer programme of seconds, so where nobody asks for one it is only looked at if
    the batch has too few rows for the workers."""
    if constraints.tensor is not None:
        return (constraints.tensor,)
    if constraints.data is None and 1 <= batch_size < most:
        return (1, *(extent for extent in range(2, most + 1) if most % extent == 0))
    return (1,)


def _meshes_of(
    cluster: Cluster, constraints: Constraints, num_ops: int, threads: int, most: int, tensor: int
) -> Iterator[tuple[int, int, int, int]]:
    if constraints.num_workers is not None:
        totals: tuple[int, ...] = (constraints.num_workers,)
    elif constraints.data is not None and constraints.pipeline is not None:
        totals = (constraints.data * constraints.pipeline * tensor,)
    else:
        least = max(constraints.data or 1, constraints.pipeline or 1) * tensor
        totals = tuple(range(len(cluster.processes), most + 1)) if least <= most else (least,)
    for total in totals:
        if total > most and threads > 1 and constraints.threads_per_worker is None:
            continue  # more workers than cores are forced: more threads each would only share them further
        for pipeline in range(1, total + 1):
            data, rest = divmod(total, pipeline * tensor)
            if data < 1:
                continue
            wanted = constraints.pipeline in (None, pipeline) and constraints.data in (None, data)
            named = constraints.stage_starts is None or len(constraints.stage_starts) == pipeline - 1
            if not rest and wanted and named and pipeline <= max(num_ops, 1):
                yield threads, data, pipeline, tensor


def _microbatch_counts(constraints: Constraints, rows: int, allowed: bool) -> tuple[int, ...]:
    if constraints.num_microbatches is not None:
        return (constraints.num_microbatches,)
    if not allowed:
        return (1,)
    return tuple(2**power for power in range(0, 7) if 2**power <= max(rows, 1))


def _schedules(constraints: Constraints, pipeline: int, num_microbatches: int) -> tuple[Schedule, ...]:
    if constraints.schedule is not None:
        return (constraints.schedule,)
    return ("1f1b", "gpipe") if pipeline > 1 and num_microbatches > 1 else ("1f1b",)
