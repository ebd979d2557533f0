"""Measuring this machine: arithmetic and memory rates, thread hand-over, in-process sums, and links of a running job.

Rates are measured twice: by one core alone, and by all cores at once, each with its own pinned thread and its own data;
medians of short windows. In a job one process of each host measures the host's rates (its other processes keep still),
then pairs of hosts measure the network. The result is kept in the cache, where `partita.cluster.detect` finds it.

Sources: bandwidth is counted as in STREAM's "copy" (bytes read + bytes written; McCalpin 1995), arithmetic as 2 n^3
floating-point operations for a product of n x n matrices.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from partita.cache import read_json, write_json
from partita.cluster.detect import exchange, look, profile_name, shared_store
from partita.cluster.hardware import busy_cores
from partita.cluster.job import Job, current_job
from partita.cluster.links import PingPong, decode, encode, measure_process_link, slowest, undisturbed
from partita.cluster.model import Cluster, Link, Machine
from partita.errors import ClusterError
from partita.units import MIB

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MATRIX = 768  # 3 x 2.25 MiB: larger than L1, small enough for an L2 or L3 share, as blocked products are
WINDOW_S = 0.1
NUM_WINDOWS = 5
NUM_HANDOVERS = 400
MAX_BUSY_SHARE = 0.25  # of the cores: more than this taken by others disturbs measurements


class SumTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds in which `num_workers` threads of one process add up one tensor of `num_bytes` of each."""

    num_bytes: int
    num_workers: int
    time_s: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one machine. `flops_per_s_per_core` is float32 with all cores busy (as in training).

    `network` is the slowest link between hosts of the job that measured, None if there was one host;
    `process_link` joins two processes of this machine.
    """

    flops_per_s_per_core: float
    flops_per_s_one_core: float
    memory_bytes_per_s: float
    memory_bytes_per_s_one_core: float
    handover_s: float
    all_reduce: tuple[SumTime, ...]
    num_cores: int = 1
    process_link: Link | None = None
    network: Link | None = None
    torch_version: str = ""
    time_s: float = 0.0  # that the measurement took
    busy_cores: float = 0.0  # that other programs kept busy when it began

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs took so much of the machine that the rates are too low to plan by."""
        return self.busy_cores > MAX_BUSY_SHARE * self.num_cores


def profile(*, again: bool = False, timeout_s: float = 120.0) -> Profile:
    """This machine's profile: from the cache if it was measured with this version of torch, else measured and kept.

    In a job every process must call it. Takes under ten seconds on an idle machine.

    Args:
        again: measure even if the cache has it.
        timeout_s: limit of every wait for another process.

    Example:
        >>> profile().flops_per_s_per_core > 0
        True

    Raises:
        ClusterError: another process of the job does not answer.
    """
    job = current_job()
    machine = look(0).machine
    kept = None if again else _kept(machine)
    if job is None:
        if kept is not None:
            return kept
        measured = _measure_alone(machine, timeout_s)
    else:
        measured_in_job = _measure_in_job(machine, job, kept, timeout_s)
        if measured_in_job is None:
            assert kept is not None
            return kept
        measured = measured_in_job
    before = _kept(machine)
    if measured.network is None and before is not None:
        measured = msgspec.structs.replace(measured, network=before.network)
    write_json(profile_name(machine), msgspec.to_builtins(measured))
    return measured


def _kept(machine: Machine) -> Profile | None:
    import torch

    try:
        kept = msgspec.convert(read_json(profile_name(machine)), Profile)
    except msgspec.ValidationError:
        return None
    return kept if kept.torch_version == torch.__version__ else None


def _measure_alone(machine: Machine, timeout_s: float) -> Profile:
    start = time.perf_counter()
    rates = measure_rates(machine)
    link = measure_process_link(timeout_s=timeout_s)
    return msgspec.structs.replace(rates, process_link=link, time_s=time.perf_counter() - start)


def _measure_in_job(machine: Machine, job: Job, kept: Profile | None, timeout_s: float) -> Profile | None:
    """The job's measurement, or None if every process already has its own (with a network, where there is one)."""
    start = time.perf_counter()
    sightings = exchange(look(job.rank), job, timeout_s=timeout_s)
    hosts = list(dict.fromkeys(sighting.host for sighting in sightings))
    by_host = [[s.rank for s in sightings if s.host == host] for host in hosts]
    store = _Board(shared_store(job, timeout_s=timeout_s), job, timeout_s)
    missing = kept is None or (len(hosts) > 1 and kept.network is None)
    if not any(text == b"1" for text in store.gather("missing", "1" if missing else "0")):
        return None
    mine = next(ranks for ranks in by_host if job.rank in ranks)
    # Processes that share their cores would disturb each other: the first measures. Bound ones measure their own cores.
    shared = len({sightings[rank].machine.cores for rank in mine}) == 1
    measures = job.rank == mine[0] or not shared
    told = store.gather("rates", msgspec.json.encode(measure_rates(machine)).decode() if measures else "")
    rates = of_host([msgspec.json.decode(told[rank], type=Profile) for rank in mine if told[rank]])
    group = PingPong(store.prefixed("gloo"), job.rank, job.world_size, timeout_s=timeout_s)
    near = _pairs_link(group, store, "near", [[(ranks[0], ranks[1])] for ranks in by_host if len(ranks) > 1])
    leaders = [ranks[0] for ranks in by_host]
    pairs = list(itertools.pairwise(leaders))
    # Neighbours in turn, every second pair at a time: each host is in one pair at once, so that none shares its wire.
    far = _pairs_link(group, store, "far", [pairs[0::2], pairs[1::2]])
    if near is None:
        near = measure_process_link(timeout_s=timeout_s)
    return msgspec.structs.replace(
        rates,
        process_link=near,
        network=far,
        time_s=time.perf_counter() - start,
    )


def measure_network(cluster: Cluster, *, timeout_s: float = 120.0) -> Cluster:
    """`cluster` with the slowest link between its machines as it is now; every process of the job must call this.

    A profile keeps what a machine is, but not which network it will be on tomorrow, and a driver's nominal rate says
    little of what is between two machines. Takes about two seconds for every second pair of neighbouring machines,
    less on fast links. A cluster of one machine, or one that is only described, comes back as it is.

    Raises:
        ClusterError: a process does not answer within `timeout_s`.
    """
    job = current_job()
    if job is None or not cluster.is_here or len(cluster.machines) < 2:
        return cluster
    leaders: dict[int, int] = {}
    for process in cluster.processes:
        leaders.setdefault(process.machine, process.rank)
    board = _Board(shared_store(job, timeout_s=timeout_s), job, timeout_s)
    group = PingPong(board.prefixed("network"), job.rank, job.world_size, timeout_s=timeout_s)
    pairs = list(itertools.pairwise(leaders.values()))
    link = _pairs_link(group, board, "network", [pairs[0::2], pairs[1::2]])
    return cluster if link is None else msgspec.structs.replace(cluster, network=link)


def of_host(parts: Sequence[Profile]) -> Profile:
    """One host's rates from those of its bound processes, which measured their own cores at the same time."""
    return msgspec.structs.replace(
        parts[0],
        flops_per_s_per_core=statistics.mean(part.flops_per_s_per_core for part in parts),
        num_cores=sum(part.num_cores for part in parts),
        busy_cores=sum(part.busy_cores for part in parts),
        memory_bytes_per_s=sum(part.memory_bytes_per_s for part in parts),
    )


def _pairs_link(group: PingPong, board: _Board, name: str, rounds: list[list[tuple[int, int]]]) -> Link | None:
    """The slowest link of all pairs, measured round by round; every process of the job gets the same answer."""
    found: list[Link] = []
    for number, pairs in enumerate(rounds):
        mine: Link | None = None
        for first, second in pairs:
            if group.rank in (first, second):
                leads = group.rank == first
                mine = group.link(second if leads else first, leads=leads) or mine
        links = [decode(text) for text in board.gather(f"{name}{number}", encode(mine))]
        found += [link for link in links if link is not None]
    return slowest(found)


class _Board:
    """Texts of all processes of a job by name; `gather` is a barrier as well."""

    def __init__(self, store: Store, job: Job, timeout_s: float) -> None:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not declared so

        turn = int(store.add(f"partita/profile/{job.rank}", 1))  # each counts its own calls: keys never repeat
        self._store, self._prefix_store = PrefixStore(f"partita/profile/{turn}", store), PrefixStore
        self._job, self._limit = job, timedelta(seconds=timeout_s)

    def prefixed(self, name: str) -> Store:
        prefixed: Store = self._prefix_store(name, self._store)
        return prefixed

    def gather(self, name: str, text: str) -> list[bytes]:
        """Every rank's text under `name`, in rank order.

        Raises:
            ClusterError: some rank did not write within the limit (named).
        """
        self._store.set(f"{name}/{self._job.rank}", text)
        texts: list[bytes] = []
        for rank in range(self._job.world_size):
            key = f"{name}/{rank}"
            try:
                self._store.wait([key], self._limit)
                texts.append(self._store.get(key))
            except RuntimeError as error:
                raise ClusterError(
                    f"every process of the job must take part in the measurement, but rank {rank} of "
                    f"{self._job.world_size} did not within {self._limit.total_seconds():g} s ({error}). "
                    "See whether it still runs, and whether every process calls profile()."
                ) from error
        return texts


def measure_rates(machine: Machine) -> Profile:
    """The rates of `machine`'s cores, by pinned threads of this process. No networking, nothing is kept."""
    import torch

    start = time.perf_counter()
    cores = machine.cores
    busy = busy_cores(cores, sample_s=0.3)
    num_elements = _copy_elements(machine)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        one_flops = rate(cores[:1], _matmul)
        all_flops = rate(cores, _matmul) if len(cores) > 1 else one_flops
        one_bytes = rate(cores[:1], lambda: _copy(num_elements))
        all_bytes = rate(cores, lambda: _copy(num_elements)) if len(cores) > 1 else one_bytes
        sums = [measure_sum(cores, num_bytes) for num_bytes in (MIB, 8 * MIB)] if len(cores) > 1 else []
        return Profile(
            flops_per_s_per_core=all_flops / len(cores),
            flops_per_s_one_core=one_flops,
            memory_bytes_per_s=all_bytes,
            memory_bytes_per_s_one_core=one_bytes,
            handover_s=measure_handover_s(cores),
            all_reduce=tuple(sums),
            num_cores=len(cores),
            busy_cores=busy,
            torch_version=str(torch.__version__),
            time_s=time.perf_counter() - start,
        )


def _copy_elements(machine: Machine) -> int:
    """Elements of one thread's array: all threads' arrays together exceed the last cache four times, and use at most
    an eighth of the memory."""
    wanted = max(32 * MIB, 4 * machine.cache_bytes.get("L3", 0) * machine.num_sockets // (2 * len(machine.cores)))
    limit = machine.memory_bytes // (16 * len(machine.cores))
    return max(min(wanted, limit, 256 * MIB), MIB) // 4


def _matmul() -> Callable[[], int]:
    """One product; the call returns the floating-point operations that it did."""
    import torch

    left, right, out = (torch.ones(MATRIX, MATRIX) for _ in range(3))

    def call() -> int:
        torch.mm(left, right, out=out)
        return 2 * MATRIX**3

    return call


def _copy(num_elements: int) -> Callable[[], int]:
    """One copy; the call returns the bytes read and written."""
    import torch

    source, target = torch.ones(num_elements), torch.zeros(num_elements)

    def call() -> int:
        target.copy_(source)
        return 2 * 4 * num_elements

    return call


def rate(cores: Sequence[int], make: Callable[[], Callable[[], int]]) -> float:
    """Work per second of one pinned thread on each of `cores` at once: the median over windows of the threads' sum.

    `make` is called in each thread (so that its memory lies near the core) and returns the call, which returns its
    work.
    """
    barrier = threading.Barrier(len(cores))
    rates = [[0.0] * NUM_WINDOWS for _ in cores]

    def run(place: int, core: int) -> None:
        with pinned(core):
            call = make()
            call()
            for window in range(NUM_WINDOWS):
                barrier.wait()
                start, work = time.perf_counter(), 0
                while (elapsed := time.perf_counter() - start) < WINDOW_S or not work:
                    work += call()
                rates[place][window] = work / elapsed

    _in_threads(barrier, [functools.partial(run, place, core) for place, core in enumerate(cores)])
    sums = [sum(window) for window in zip(*rates, strict=True)]
    return float(statistics.median(sums))


def measure_sum(cores: Sequence[int], num_bytes: int) -> SumTime:
    """An in-process all-reduce: each thread adds up its slice of all threads' tensors, between two waits."""
    import torch

    num_workers, num_rounds = len(cores), 9
    tensors = [torch.ones(num_bytes // 4) for _ in cores]
    total = torch.zeros(num_bytes // 4)
    bounds = [place * (num_bytes // 4) // num_workers for place in range(num_workers + 1)]
    barrier = threading.Barrier(num_workers)
    times_s: list[float] = []

    def run(place: int, core: int) -> None:
        piece = slice(bounds[place], bounds[place + 1])
        with pinned(core):
            for _ in range(num_rounds):
                barrier.wait()
                start = time.perf_counter()
                torch.add(tensors[0][piece], tensors[1][piece], out=total[piece])
                for tensor in tensors[2:]:
                    total[piece] += tensor[piece]
                barrier.wait()
                if place == 0:
                    times_s.append(time.perf_counter() - start)

    _in_threads(barrier, [functools.partial(run, place, core) for place, core in enumerate(cores)])
    return SumTime(num_bytes=num_bytes, num_workers=num_workers, time_s=statistics.median(times_s[1:]))


def measure_handover_s(cores: Sequence[int]) -> float:
    """Seconds until a thread that waits for a value has it: half an undisturbed round trip of two threads."""
    there: queue.SimpleQueue[int] = queue.SimpleQueue()
    back: queue.SimpleQueue[int] = queue.SimpleQueue()

    def echo() -> None:
        with pinned(cores[-1]):
            for _ in range(NUM_HANDOVERS):
                back.put(there.get())

    thread = threading.Thread(target=echo, name="partita-echo", daemon=True)
    times_s: list[float] = []

    def ask() -> None:
        with pinned(cores[0]):
            for number in range(NUM_HANDOVERS):
                start = time.perf_counter()
                there.put(number)
                back.get()
                times_s.append(time.perf_counter() - start)

    thread.start()
    asking = threading.Thread(target=ask, name="partita-ask", daemon=True)
    asking.start()
    asking.join()
    thread.join()
    return undisturbed(times_s) / 2


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Runs the calling thread on `core` alone, with one intra-op thread; where the system cannot pin, it does not."""
    import torch

    # Per thread: torch's number of threads is OpenMP's, which each thread has for itself. Threads end afterwards.
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):  # a core that was taken away meanwhile: measure where the system puts us
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _in_threads(barrier: threading.Barrier, calls: Sequence[Callable[[], None]]) -> None:
    """Run all calls, each in its own thread; the first exception is raised here, and none is left waiting."""
    failures: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    # No daemons: after an interruption here, the interpreter must wait until they have left their ops before it ends.
    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
