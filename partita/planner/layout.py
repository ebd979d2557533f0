"""Which process and cores each worker of a mesh gets."""

from __future__ import annotations

from collections.abc import Sequence

from partita.cluster.model import Cluster, Machine, Process
from partita.errors import InfeasibleError
from partita.plan import Worker

Deal = tuple[tuple[int, int], ...]  # (rank of a process, its number of workers), in the order of the workers


def worker_layout(
    cluster: Cluster,
    data: int,
    pipeline: int,
    num_workers: int,
    threads_per_worker: int,
    tensor: int = 1,
    deal: Deal | None = None,
) -> tuple[Worker, ...]:
    """Place the ``pipeline * data * tensor`` workers on the processes of `cluster`; worker
    ``(stage * data + d) * tensor + t`` is (stage, d, t): the tensor axis exchanges most and has the nearest workers.

    Workers are dealt to processes in that order in contiguous runs, so with several processes the stages land in
    different processes and a stage's data group stays inside one where it fits. Every process gets at least one worker.
    `deal` says in which order the processes come and how many workers each gets (see `partita.planner.deals`); by
    default they come by rank and get equally many.
    Within a process, workers get consecutive cores and stay inside a NUMA node where possible. More workers than cores
    share cores (see `oversubscribed`). Raises `InfeasibleError` where a process would stay without a worker, or a
    worker needs more threads than its process has cores.

    Example: 4 workers as pipeline 2 x data 2 on two processes: stage 0 on process 0, stage 1 on process 1.
    """
    if data * pipeline * tensor != num_workers:
        raise InfeasibleError(
            f"data * pipeline * tensor must equal num_workers, but got {data} * {pipeline} * {tensor} and "
            f"num_workers={num_workers}."
        )
    processes = sorted(cluster.processes, key=lambda process: process.rank)
    if num_workers < len(processes):
        raise InfeasibleError(
            f"Every process must have a worker, but the job has {len(processes)} processes and the plan {num_workers} "
            f"worker(s). Use at least {len(processes)} workers, or start fewer processes."
        )
    for process in processes:
        if not process.gpus and len(process.cores) < threads_per_worker:
            raise InfeasibleError(
                f"threads_per_worker must be at most the cores of every process, but got {threads_per_worker} and "
                f"process "
                f"{process.rank} has {len(process.cores)}. Set threads_per_worker={len(process.cores)}."
            )
    if deal is None:
        counts = dealt_evenly(processes, num_workers, threads_per_worker)
        deal = tuple((process.rank, count) for process, count in zip(processes, counts, strict=True))
    of_rank = {process.rank: process for process in processes}
    workers: list[Worker] = []
    for rank, count in deal:
        process = of_rank[rank]
        machine = cluster.machines[process.machine]
        chunks = core_chunks(process, machine, threads_per_worker)
        for slot in range(count):
            index = len(workers)
            cores = chunks[slot % len(chunks)] if chunks else ()
            gpu = process.gpus[slot % len(process.gpus)] if process.gpus else None
            rest, along_tensor = divmod(index, tensor)
            stage, coordinate = divmod(rest, data)
            workers.append(
                Worker(
                    index=index,
                    process=process.rank,
                    machine=process.machine,
                    cores=cores,
                    stage=stage,
                    data=coordinate,
                    tensor=along_tensor,
                    gpu=gpu,
                )
            )
    return tuple(workers)


def room(process: Process, threads_per_worker: int) -> int:
    """How many workers fit into the process without sharing a core or GPU."""
    return len(process.gpus) if process.gpus else len(process.cores) // threads_per_worker


def oversubscribed(cluster: Cluster, num_workers: int, threads_per_worker: int) -> bool:
    """Whether `num_workers` workers have to share cores or GPUs."""
    return num_workers > sum(room(process, threads_per_worker) for process in cluster.processes)


def core_chunks(process: Process, machine: Machine, size: int) -> list[tuple[int, ...]]:
    """Disjoint groups of `size` cores of the process: first groups inside one NUMA node, then groups of what is
    left."""
    nodes = [tuple(core for core in node if core in process.cores) for node in machine.numa_nodes] or [process.cores]
    listed = {core for node in nodes for core in node}
    nodes.append(tuple(core for core in process.cores if core not in listed))
    chunks: list[tuple[int, ...]] = []
    rest: list[int] = []
    for node in nodes:
        whole = len(node) // size * size
        chunks += [node[start : start + size] for start in range(0, whole, size)]
        rest += node[whole:]
    chunks += [tuple(rest[start : start + size]) for start in range(0, len(rest) // size * size, size)]
    return chunks


def dealt_evenly(processes: Sequence[Process], num_workers: int, threads_per_worker: int) -> list[int]:
    """Workers of each process: one in turn while there is room, then (oversubscribed) one in turn regardless."""
    counts = [1] * len(processes)
    for _ in range(num_workers - len(processes)):
        open_places = [i for i, process in enumerate(processes) if counts[i] < room(process, threads_per_worker)]
        candidates = open_places or range(len(processes))
        counts[min(candidates, key=lambda i: (counts[i], i))] += 1
    return counts
