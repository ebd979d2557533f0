"""The job that this process belongs to, read from the environment that its launcher set. No networking here."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from partita.errors import ClusterError

DEFAULT_PORT = 29_500  # torchrun's default rendezvous port as well
FIRST_PORT, NUM_PORTS = 20_000, 12_000  # below those that Linux gives to outgoing connections (32768 and up)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process's place in a job of several processes.

    `master_address` and `master_port` say where rank 0 can be reached; the address is None where the launcher does not
    tell (only Open MPI and MPICH started without `MASTER_ADDR`, across hosts). `launcher` names who set the
    environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str | None
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ClusterError(
                f"0 <= rank < world size must hold, but the environment of {self.launcher} says rank {self.rank} of "
                f"{self.world_size}. Start every process through one launcher, or unset its variables."
            )
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise ClusterError(
                f"0 <= local rank < local world size <= world size must hold, but the environment of {self.launcher} "
                f"says local rank {self.local_rank} of {self.local_world_size}, world size {self.world_size}."
            )


@dataclass(frozen=True)
class _Launcher:
    """The variables one launcher sets; the first that is present of each tuple counts."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]


# torchrun stands first: inside an srun or mpirun allocation a torchrun started per host sets the finer variables.
_LAUNCHERS = (
    _Launcher("torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    _Launcher(
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher(
        "MVAPICH",
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher("MPICH", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)),
    _Launcher(
        "srun",
        ("SLURM_PROCID",),
        ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
        ("SLURM_LOCALID",),
        ("SLURM_NTASKS_PER_NODE",),
    ),
)


# What names a run: equal for its processes, another one for every other run on the same host.
_RUN_NAMES = {
    "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    "Open MPI": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
}
_JOB_LISTS = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
_STEP_LISTS = ("SLURM_STEP_NODELIST", *_JOB_LISTS)


def current_job(environment: Mapping[str, str] | None = None) -> Job | None:
    """The job that this process belongs to, or None for a process that runs alone.

    A job of one process is None as well: nothing has to be exchanged. `srun` counts only inside a job *step* (not in
    the batch script of an allocation, whose `SLURM_NTASKS` speaks of processes that were never started).

    Example:
        >>> current_job({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}).rank
        1

    Raises:
        ClusterError: the launcher's variables are incomplete or contradict each other.
    """
    variables = os.environ if environment is None else environment
    for launcher in _LAUNCHERS:
        if not any(variables.get(name) for name in launcher.rank):
            continue
        if launcher.name == "srun" and not _inside_step(variables):
            continue
        if launcher.name == "MPICH" and _inside_step(variables) and "MPI_LOCALRANKID" not in variables:
            continue  # srun speaks its protocol (`--mpi=pmi2`), and tells more in its own variables
        world_size = _first_int(variables, launcher.world_size)
        if world_size is None:
            raise ClusterError(
                f"{launcher.rank[0]} is set, so {launcher.world_size[0]} must be set too, but it is not. Start the "
                f"script with {launcher.name}, or unset {launcher.rank[0]} to run alone."
            )
        return None if world_size == 1 else _job(launcher, variables, world_size)
    return None


def bound_alone(environment: Mapping[str, str] | None = None) -> bool:
    """Whether Open MPI has bound this process to some cores though it is the only one of its host.

    It does so unless it is told not to: a single process then has one core of the machine, or one socket.
    """
    variables = os.environ if environment is None else environment
    alone = variables.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return alone and variables.get("OMPI_MCA_orte_bound_at_launch") == "1"


def _job(launcher: _Launcher, variables: Mapping[str, str], world_size: int) -> Job:
    rank = _first_int(variables, launcher.rank)
    assert rank is not None
    local_rank = _first_int(variables, launcher.local_rank)
    local_world_size = _slurm_local_size(variables) if launcher.name == "srun" else None
    if local_world_size is None:
        local_world_size = _first_int(variables, launcher.local_world_size)
    if local_rank is None:
        # Without local facts one process a host is assumed here; detection counts the real ones by host name.
        local_rank, local_world_size = 0, local_world_size or 1
    if local_world_size is None:
        local_world_size = local_rank + 1
    address, port = _master(launcher, variables, local_world_size, world_size)
    return Job(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=min(max(local_world_size, local_rank + 1), world_size),
        master_address=address,
        master_port=port,
        launcher=launcher.name,
    )


def _master(
    launcher: _Launcher, variables: Mapping[str, str], local_world_size: int, world_size: int
) -> tuple[str | None, int]:
    """Where rank 0 can be reached. Ports are spread by the launcher's name of the run, so that two can share a host."""
    port = _first_int(variables, ("MASTER_PORT",))
    address = variables.get("MASTER_ADDR") or None
    if address is None and local_world_size >= world_size:
        address = "127.0.0.1"
    if address is None:  # mpirun inside of a Slurm job begins on its first host as well
        lists = _STEP_LISTS if launcher.name == "srun" else _JOB_LISTS
        address = _first_host(next((variables[name] for name in lists if variables.get(name)), None))
    if port is None:
        run = [variables[name] for name in _RUN_NAMES.get(launcher.name, ()) if variables.get(name)]
        port = FIRST_PORT + zlib.crc32(" ".join(run).encode()) % NUM_PORTS if run else DEFAULT_PORT
    return address, port


def _inside_step(variables: Mapping[str, str]) -> bool:
    step = variables.get("SLURM_STEP_ID") or variables.get("SLURM_STEPID")
    interactive = variables.get("SLURM_JOB_NAME") in ("bash", "interactive")  # a shell, not a training script
    return step is not None and "SLURM_LOCALID" in variables and not interactive


def _slurm_local_size(variables: Mapping[str, str]) -> int | None:
    """Tasks on this host from e.g. ``SLURM_STEP_TASKS_PER_NODE="4(x2),3"`` and ``SLURM_NODEID``."""
    text = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE")
    node = _first_int(variables, ("SLURM_NODEID",))
    if text is None or node is None:
        return None
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else None


def _first_host(node_list: str | None) -> str | None:
    """The first host of a Slurm node list: ``"gpu[003-005,9],login"`` -> ``"gpu003"``; ``"r[2-4]n[1,7]"`` ->
    ``"r2n1"``.

    Source: Slurm's host-list expressions (`scontrol show hostnames`).
    """
    if not node_list:
        return None
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)  # up to the first comma outside of brackets
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0]) if match else None


def _first_int(variables: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        text = variables.get(name)
        if text:
            try:
                return int(text)
            except ValueError as error:
                raise ClusterError(
                    f"the environment variable {name} must be a whole number, but it is {text!r}. Correct or unset it."
                ) from error
    return None
