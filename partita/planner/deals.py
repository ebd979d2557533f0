"""Orders of processes, numbers of workers and shares of rows on unequal machines.

A pipeline's workers lie on the processes in contiguous runs, so what is open is the order of the processes, and how
many workers each has. Processes of equal hardware are exchangeable, so only orders and numbers that differ by kind are
candidates: on equal machines there is one of each. The processes of a machine stay together. With more than
`MAX_ORDERS` orders the candidates are those of `partita.planner.inter.orders` (kinds together, fast links together).

The rows of a batch are shared over the data axis, in all stages alike. The workers of a data coordinate, one in each
stage, form a column; columns of equal hardware get equally many rows, and the candidates for the others are those of
`partita.planner.inter.shares`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import product

import numpy as np

from partita.cluster.model import Cluster, Machine, Process
from partita.plan import Worker
from partita.planner.inter.orders import candidate_orders
from partita.planner.inter.problem import InterDevice, Links
from partita.planner.inter.shares import share_candidates
from partita.planner.layout import Deal, dealt_evenly, room
from partita.units import proportional, split_evenly

MAX_ORDERS = 6
MAX_COUNTS = 4  # ways of dividing the workers between kinds of processes, those nearest to the kinds' speeds
MAX_SHARES = 16  # without a pipeline; with one MAX_PIPELINE_SHARES
MAX_PIPELINE_SHARES = 1


def deals(cluster: Cluster, num_workers: int, threads_per_worker: int, *, ordered: bool) -> tuple[Deal, ...]:
    """The candidate deals of `num_workers`; `ordered`: whether the order of the processes matters. The first is the
    one by rank with equally many workers each."""
    processes = sorted(cluster.processes, key=lambda process: process.rank)
    even = dealt_evenly(processes, num_workers, threads_per_worker)
    by_rank = tuple(process.rank for process in processes)
    orders = process_orders(cluster) if ordered else (by_rank,)
    result = []
    for counts in [even, *_counts(cluster, processes, num_workers, threads_per_worker)]:
        of_rank = dict(zip(by_rank, counts, strict=True))
        result += [tuple((rank, of_rank[rank]) for rank in order) for order in orders]
    return tuple(dict.fromkeys(result))


def process_orders(cluster: Cluster) -> tuple[tuple[int, ...], ...]:
    """Candidate orders of the processes' ranks, first by rank.

    Example: a fast and a slow machine of one process each: ``((0, 1), (1, 0))``; two equal ones: ``((0, 1),)``.
    """
    processes = sorted(cluster.processes, key=lambda process: process.rank)
    by_rank = tuple(process.rank for process in processes)
    machines: dict[int, list[int]] = {}
    for process in processes:
        machines.setdefault(process.machine, []).append(process.rank)
    kind = {p.rank: (process_kind(cluster, p), len(machines[p.machine])) for p in processes}
    if len(set(kind.values())) == 1 and _evenly_spread(processes):
        return (by_rank,)
    found = {tuple(kind[rank] for rank in by_rank): by_rank} if _evenly_spread(processes) else {}
    for order in _arranged(list(machines.values()), kind):
        found.setdefault(tuple(kind[rank] for rank in order), order)
        if len(found) > MAX_ORDERS:
            return tuple(dict.fromkeys((by_rank, *_clustered(cluster, processes, kind))))
    return tuple(dict.fromkeys((by_rank, *found.values())))


def process_kind(cluster: Cluster, process: Process) -> Hashable:
    """Equal for processes of equal hardware."""
    machine = cluster.machines[process.machine]
    gpus = tuple((machine.gpus[gpu].name, machine.gpus[gpu].memory_bytes) for gpu in process.gpus)
    rates = (machine.cpu, len(machine.cores), machine.flops_per_s_per_core, machine.memory_bytes_per_s)
    return (*rates, len(process.cores), process.memory_bytes, gpus)


def share_vectors(
    cluster: Cluster, workers: Sequence[Worker], data: int, batch_size: int, num_microbatches: int
) -> tuple[tuple[int, ...], ...]:
    """Candidate rows of each data coordinate, the even ones first; () alone where the batch has no rows."""
    if not batch_size:
        return ((),)
    even = split_evenly(batch_size, data)
    processes = {process.rank: process for process in cluster.processes}
    columns = [
        tuple(process_kind(cluster, processes[w.process]) for w in workers if w.data == coordinate)
        for coordinate in range(data)
    ]
    if len(set(columns)) == 1:
        return (even,)
    speeds = [_speed(cluster, [w for w in workers if w.data == coordinate]) for coordinate in range(data)]
    rows = -(-batch_size // num_microbatches)
    found = [even]
    most = MAX_PIPELINE_SHARES if any(worker.stage for worker in workers) else MAX_SHARES
    for share in share_candidates(columns, speeds, rows, most):
        if min(share) >= 1:
            whole = tuple(num_microbatches * own for own in share)
            found.append(whole if sum(whole) == batch_size else proportional(batch_size, share))
    return tuple(dict.fromkeys(found))


def _speed(cluster: Cluster, column: Sequence[Worker]) -> float:
    """Of a column whose workers follow one another: FLOP/s as far as they are told, else cores."""
    rates = [
        _rate(cluster.machines[worker.machine], () if worker.gpu is None else (worker.gpu,), len(worker.cores))
        for worker in column
    ]
    return len(rates) / sum(1.0 / rate for rate in rates)


def _rate(machine: Machine, gpus: Sequence[int], num_cores: int) -> float:
    """FLOP/s of the GPUs, else of the cores; at least 1, as it is divided by."""
    if gpus:
        return max(sum(machine.gpus[gpu].flops_per_s.get("float32", 0.0) for gpu in gpus), 1.0)
    return num_cores * (machine.flops_per_s_per_core or 1.0)


def _evenly_spread(processes: Sequence[Process]) -> bool:
    """Whether the ranks of every machine follow one another."""
    machines = [process.machine for process in processes]
    return all(machines[i] == machines[i - 1] or machines[i] not in machines[:i] for i in range(1, len(machines)))


def _arranged(groups: list[list[int]], kind: Mapping[int, Hashable]) -> Iterator[tuple[int, ...]]:
    """Orders of the machines, and of the processes in each, that differ by kind."""
    if not groups:
        yield ()
        return
    seen = set()
    for place, group in enumerate(groups):
        for first in _permuted(group, kind):
            kinds = tuple(kind[rank] for rank in first)
            if kinds in seen:
                continue
            seen.add(kinds)
            for rest in _arranged(groups[:place] + groups[place + 1 :], kind):
                yield (*first, *rest)


def _permuted(ranks: list[int], kind: Mapping[int, Hashable]) -> Iterator[tuple[int, ...]]:
    if not ranks:
        yield ()
        return
    seen = set()
    for place, rank in enumerate(ranks):
        if kind[rank] not in seen:
            seen.add(kind[rank])
            for rest in _permuted(ranks[:place] + ranks[place + 1 :], kind):
                yield (rank, *rest)


def _clustered(
    cluster: Cluster, processes: Sequence[Process], kind: Mapping[int, Hashable]
) -> tuple[tuple[int, ...], ...]:
    names = {one: str(number) for number, one in enumerate(dict.fromkeys(kind.values()))}
    devices = [
        InterDevice(name=str(p.rank), kind=names[kind[p.rank]], memory_bytes=float(p.memory_bytes or np.inf))
        for p in processes
    ]
    machine = np.array([process.machine for process in processes])
    same = machine[:, None] == machine[None, :]
    links = Links(
        latency_s=np.where(same, cluster.process_link.latency_s, cluster.network.latency_s),
        bytes_per_s=np.where(same, cluster.process_link.bytes_per_s, cluster.network.bytes_per_s),
    )
    speed = {names[kind[p.rank]]: _process_rate(cluster, p) for p in processes}
    orders = candidate_orders(devices, links, speed, limit=MAX_ORDERS - 1)
    return tuple(tuple(processes[place].rank for place in order) for order in orders)


def _process_rate(cluster: Cluster, process: Process) -> float:
    return _rate(cluster.machines[process.machine], process.gpus, len(process.cores))


def _counts(cluster: Cluster, processes: Sequence[Process], num_workers: int, threads: int) -> list[tuple[int, ...]]:
    """Workers of every process: all ways of dividing them between the kinds that need no shared cores, even inside a
    kind; at most `MAX_COUNTS`."""
    kinds: dict[Hashable, list[int]] = {}
    for place, process in enumerate(processes):
        kinds.setdefault(process_kind(cluster, process), []).append(place)
    members = list(kinds.values())
    rooms = [sum(max(room(processes[i], threads), 1) for i in group) for group in members]
    if len(members) == 1 or num_workers > sum(rooms):
        return []
    rates = [sum(_process_rate(cluster, processes[i]) for i in group) for group in members]
    ideal = [num_workers * rate / sum(rates) for rate in rates]
    window = num_workers
    while (2 * window + 1) ** (len(members) - 1) > 64 * MAX_COUNTS and window > 1:
        window //= 2
    spans = [
        range(max(len(group), int(best) - window), min(most, int(best) + window) + 1)
        for group, most, best in zip(members, rooms, ideal, strict=True)
    ]
    totals = []
    for first in product(*spans[:-1]):
        last = num_workers - sum(first)
        if last in spans[-1]:
            totals.append((*first, last))
    totals.sort(key=lambda total: sum(abs(a - b) for a, b in zip(total, ideal, strict=True)))
    return [_per_process(processes, members, total, threads) for total in totals[:MAX_COUNTS]]


def _per_process(
    processes: Sequence[Process], members: list[list[int]], totals: tuple[int, ...], threads: int
) -> tuple[int, ...]:
    counts = [0] * len(processes)
    for group, total in zip(members, totals, strict=True):
        for place, count in zip(group, dealt_evenly([processes[i] for i in group], total, threads), strict=True):
            counts[place] = count
    return tuple(counts)
