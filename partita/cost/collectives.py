"""Times of transfers and collectives: alpha-beta, hierarchical.

With p participants, B bytes of the whole tensor, latency a and bandwidth b:

    all_reduce        2 (p-1) a + 2 (p-1)/p B / b      (ring; Thakur et al. 2005, section 3.5)
    reduce_scatter      (p-1) a +   (p-1)/p B / b
    all_gather          (p-1) a +   (p-1)/p B / b
    all_to_all          (p-1) a +   (p-1)/p B / b / p  (each worker holds B/p and keeps 1/p of it)

Inside a process of k workers nothing is sent: the workers meet, then each sums its slice of k tensors in shared memory,
(k+1) B bytes in all over the bandwidth of memory; gathers read and write B. Where the result is put together by all
members (gathers, sums of more than `SMALL_BYTES`) they meet once more. Across processes: reduce inside, exchange
between processes once, share the result.
"""

from __future__ import annotations

from collections import Counter

from partita.cluster.model import Cluster, Link
from partita.cost.model import CollectiveKind, Place
from partita.cost.overheads import Overheads
from partita.cost.roofline import DEFAULT_CORE_BYTES_PER_S, DEFAULT_MEMORY_BYTES_PER_S
from partita.cost.sums import EXACT_SUM, SumCost

SMALL_BYTES = 32 * 1024  # up to this size every member of a process sums everything itself


def link_between(cluster: Cluster, source: Place, target: Place) -> Link | None:
    """The connection of two places; None inside one process."""
    if source.process == target.process:
        return None
    return cluster.process_link if source.machine == target.machine else cluster.network


def link_time_s(link: Link, kind: CollectiveKind, num_bytes: float, num_processes: int) -> float:
    """Time of a collective over `num_processes` ends of equal links."""
    if num_processes < 2:
        return 0.0
    rounds = (num_processes - 1) * (2 if kind == "all_reduce" else 1)
    moved = rounds / num_processes * num_bytes
    if kind == "all_to_all":
        moved /= num_processes
    return rounds * link.latency_s + moved / link.bytes_per_s


def inside_time_s(
    kind: CollectiveKind, num_bytes: float, num_workers: int, bytes_per_s: float, overheads: Overheads, num_tensors: int
) -> float:
    """Time of a collective of the workers of one process through shared memory."""
    if num_workers < 2:
        return 0.0
    passes = {"all_reduce": num_workers + 1, "reduce_scatter": num_workers + 1, "all_gather": 2, "all_to_all": 2}[kind]
    meetings = 2 if kind == "all_gather" or (kind == "all_reduce" and num_bytes > SMALL_BYTES) else 1
    tensors_s = (num_tensors - 1) * overheads.tensor_s
    return meetings * overheads.meeting_s + tensors_s + passes * num_bytes / bytes_per_s


def collective_time_s(
    cluster: Cluster,
    kind: CollectiveKind,
    num_bytes: int,
    group: tuple[Place, ...],
    *,
    overheads: Overheads,
    num_tensors: int = 1,
    sums: SumCost = EXACT_SUM,
) -> float:
    """Hierarchical time of a collective of `group`; the fullest process and the slowest link decide. `sums`: what the
    part between processes costs, where it is a sum of gradients."""
    per_process = Counter(place.process for place in group)
    inside_s = 0.0
    for place in {place.process: place for place in group}.values():
        count = per_process[place.process]
        whole = cluster.machines[place.machine].memory_bytes_per_s or DEFAULT_MEMORY_BYTES_PER_S
        num_cores = sum(max(len(p.cores), 1) for p in group if p.process == place.process)
        bandwidth = overheads.sum_bytes_per_s or min(whole, DEFAULT_CORE_BYTES_PER_S * num_cores)
        inside_s = max(inside_s, inside_time_s(kind, num_bytes, count, bandwidth, overheads, num_tensors))
    crosses = len({place.machine for place in group}) > 1
    link = cluster.network if crosses else cluster.process_link
    if len(per_process) < 2:
        return inside_s
    across_s = link_time_s(link, kind, num_bytes * sums.sent_share, len(per_process))
    return inside_s + across_s + num_bytes * sums.compute_s_per_byte
