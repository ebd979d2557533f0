"""Detection: this machine, and all machines of the running job.

A process that runs alone reads files and does no networking at all. In a job, every process writes what it sees into a
key-value store (torch's TCPStore at the job's master address, or the initialised process group) and reads what the
others wrote; all compute the same cluster from the same descriptions.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from partita.cache import read_json
from partita.cluster.files import split_cores, validate
from partita.cluster.hardware import interface_bytes_per_s, network_interface, read_machine
from partita.cluster.job import Job, bound_alone, current_job
from partita.cluster.model import Cluster, Link, Machine, Process, machine_fingerprint
from partita.cluster.presets import CPU_NETWORK, LOOPBACK
from partita.errors import ClusterError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """What one process sees: its machine as far as it may use it, and which host that is."""

    rank: int
    host: str  # equal for processes of one host and one container
    machine: Machine
    network: Link
    process_link: Link


def detect(*, timeout_s: float = 60.0) -> Cluster:
    """This machine as a cluster of one process, or all machines of the job that this process belongs to.

    In a job every process must call it. Rates that `partita profile` has measured on this hardware are filled in; links
    that were never measured get the rate that the network driver reports, else a nominal one (10 Gbit/s between
    machines).

    Raises:
        ClusterError: the environment of the launcher is contradictory, the master cannot be reached within `timeout_s`,
            or the processes of one host are bound to cores that overlap in part.
    """
    job = current_job()
    if bound_alone():
        warnings.warn(
            f"Open MPI has bound this process to {len(os.sched_getaffinity(0))} of {os.cpu_count()} hardware threads, "
            "and partita uses no others. Start it with `mpirun --bind-to none ...` to use the whole machine",
            stacklevel=3,
        )
    sighting = look(0 if job is None else job.rank)
    sightings = (sighting,) if job is None else exchange(sighting, job, timeout_s=timeout_s)
    return assemble(sightings)


def look(rank: int, *, root: Path = Path("/")) -> Sighting:
    """This process's sighting, with the measured rates of the cache where there are any."""
    machine = read_machine(root=root)
    measured = read_json(profile_name(machine)) or {}
    machine = msgspec.structs.replace(
        machine,
        flops_per_s_per_core=_rate(measured, "flops_per_s_per_core"),
        memory_bytes_per_s=_rate(measured, "memory_bytes_per_s"),
    )
    return Sighting(
        rank=rank,
        host=_host_key(machine.name, root),
        machine=machine,
        network=_measured_link(measured, "network") or _nominal_network(root),
        process_link=_measured_link(measured, "process_link") or LOOPBACK,
    )


def profile_name(machine: Machine) -> str:
    """The cache entry that holds the measurements of `machine`."""
    return f"machine/{machine_fingerprint(machine)}.json"


def assemble(sightings: tuple[Sighting, ...]) -> Cluster:
    """The cluster that follows from all processes' sightings, in rank order. Pure."""
    hosts = list(dict.fromkeys(sighting.host for sighting in sightings))
    machines: list[Machine] = []
    processes: dict[int, Process] = {}
    for index, host in enumerate(hosts):
        members = [sighting for sighting in sightings if sighting.host == host]
        machine, shares = _share(members)
        gpu_count = len(machine.gpus)
        for local, (member, cores) in enumerate(zip(members, shares, strict=True)):
            processes[member.rank] = Process(
                rank=member.rank,
                machine=index,
                cores=cores,
                gpus=tuple(range(local * gpu_count // len(members), (local + 1) * gpu_count // len(members))),
                memory_bytes=machine.memory_bytes // len(members),
            )
        machines.append(machine)
    # The slowest link bounds an exchange among all machines.
    cluster = Cluster(
        machines=tuple(machines),
        processes=tuple(processes[rank] for rank in sorted(processes)),
        network=min((sighting.network for sighting in sightings), key=lambda link: link.bytes_per_s),
        process_link=min((sighting.process_link for sighting in sightings), key=lambda link: link.bytes_per_s),
        is_here=True,
    )
    validate(cluster, source="the detected cluster")
    return cluster


def _share(members: list[Sighting]) -> tuple[Machine, tuple[tuple[int, ...], ...]]:
    """One host's machine and each member's cores: those it was bound to, or an even share of common ones."""
    first = members[0].machine
    bound = [member.machine.cores for member in members]
    if all(cores == first.cores for cores in bound):
        return first, split_cores(first, len(members))
    union = tuple(sorted({core for cores in bound for core in cores}))
    if sum(len(cores) for cores in bound) != len(union):
        raise ClusterError(
            "the processes of one host must be bound either all to the same cores or to separate ones, but on "
            f"{first.name!r} they may use {', '.join(str(list(cores)) for cores in bound)}. Change the launcher's "
            "binding, e.g. `mpirun --bind-to none` or `srun --cpu-bind=none`."
        )
    # NUMA nodes of the union: merge the members' nodes by the order in which the members list them.
    nodes = tuple(node for member in members for node in member.machine.numa_nodes)
    sockets = max(member.machine.num_sockets for member in members)
    return msgspec.structs.replace(first, cores=union, numa_nodes=nodes, num_sockets=sockets), tuple(bound)


def exchange(sighting: Sighting, job: Job, *, timeout_s: float) -> tuple[Sighting, ...]:
    """All processes' sightings, in rank order; every process of the job must call it.

    Raises:
        ClusterError: the master is unknown or unreachable, or some process did not report within `timeout_s` (named).
    """
    store = shared_store(job, timeout_s=timeout_s)
    turn = int(store.add(f"partita/turn/{job.rank}", 1))  # each counts its own calls: keys never repeat
    store.set(f"partita/cluster/{turn}/{job.rank}", msgspec.json.encode(sighting).decode())
    sightings: list[Sighting] = []
    for rank in range(job.world_size):
        key = f"partita/cluster/{turn}/{rank}"
        try:
            store.wait([key], timedelta(seconds=timeout_s))
            sightings.append(msgspec.json.decode(store.get(key), type=Sighting))
        except (RuntimeError, msgspec.DecodeError) as error:
            raise ClusterError(
                f"every process of the job must describe its machine, but rank {rank} of {job.world_size} did not "
                f"within {timeout_s:g} s ({error}). See whether it started, and whether every process calls "
                "Cluster.detect()."
            ) from error
    return tuple(sightings)


def shared_store(job: Job, *, timeout_s: float = 60.0) -> Store:
    """The store of the process group if one is initialised, else `job_store`. Raises as that."""
    return _initialised_store() or job_store(job, timeout_s=timeout_s)


@functools.cache
def job_store(job: Job, *, timeout_s: float = 60.0) -> Store:
    """The job's key-value store, one for the life of this process; the first caller of each process connects.

    Under torchrun the launcher's agent serves it; otherwise rank 0 does. It may be shared with
    `torch.distributed.init_process_group` (the server is multi-tenant: the same port serves both).

    Raises:
        ClusterError: the master address is unknown or cannot be reached within `timeout_s`.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

    if job.master_address is None:
        raise ClusterError(
            f"{job.launcher} does not tell where rank 0 runs, so MASTER_ADDR must name its host, but it is not set. "
            f"Pass it on, e.g. `{_passing_on(job.launcher)}`."
        )
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            job.master_address,
            job.master_port,
            job.world_size,
            is_master=job.rank == 0 and not served_by_agent,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise ClusterError(
            f"the job's master must be reachable, but {job.master_address}:{job.master_port} is not within "
            f"{timeout_s:g} s ({error}). Check MASTER_ADDR, MASTER_PORT and the firewall; `partita doctor` tests them."
        ) from error
    # torchrun restarts a job on the same store; its attempt number keeps the attempts apart.
    return PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _passing_on(launcher: str) -> str:
    """How the launcher gives its processes a variable."""
    if launcher == "Open MPI":
        return "mpirun -x MASTER_ADDR=host0 -x MASTER_PORT=29500 ..."
    if launcher in ("MPICH", "MVAPICH"):
        return "mpirun -genv MASTER_ADDR host0 -genv MASTER_PORT 29500 ..."
    return "export MASTER_ADDR=host0 MASTER_PORT=29500"


def _initialised_store() -> Store | None:
    """The store of the process group that is already initialised, if torch is loaded and there is one."""
    if "torch.distributed" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed import distributed_c10d

    store: Store = distributed_c10d._get_default_store()  # no public way to the store of the default group (torch 2.13)
    return store


def _host_key(name: str, root: Path) -> str:
    """Equal for two processes exactly if they share a kernel and a host name: containers of one host stay apart."""
    try:
        boot = (root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        boot = ""
    return f"{name}/{boot}"


def _nominal_network(root: Path) -> Link:
    interface = network_interface(root)
    speed = interface_bytes_per_s(interface, root) if interface else None
    return Link(bytes_per_s=speed, latency_s=CPU_NETWORK.latency_s) if speed else CPU_NETWORK


def _rate(measured: dict[str, Any], key: str) -> float:
    value = measured.get(key)
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


def _measured_link(measured: dict[str, Any], key: str) -> Link | None:
    value = measured.get(key)
    try:
        link = msgspec.convert(value, Link)
    except msgspec.ValidationError:
        return None
    return link if link.bytes_per_s > 0 and link.latency_s >= 0 else None
