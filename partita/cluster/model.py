"""`Cluster`: the machines of a job as plain data. Detection, files and presets build it; nothing here asks hardware."""

from __future__ import annotations

from pathlib import Path

import msgspec

from partita.arguments import path_of, told
from partita.errors import InputError
from partita.units import GIB, fingerprint


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU (or other accelerator). Peak rates are the vendor's dense figures; 0 means unknown."""

    name: str
    memory_bytes: int
    flops_per_s: dict[str, float] = {}  # by dtype name: "float32", "bfloat16", ...
    memory_bytes_per_s: float = 0.0


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One host. `numa_nodes` lists the core numbers of each NUMA node; all cores of the machine appear exactly once."""

    name: str
    cores: tuple[int, ...]
    memory_bytes: int
    cpu: str = "cpu"
    num_sockets: int = 1
    numa_nodes: tuple[tuple[int, ...], ...] = ()
    cache_bytes: dict[str, int] = {}  # "L1d", "L2" per core, "L3" per socket
    flops_per_s_per_core: float = 0.0  # float32; 0: unknown, measured by `partita profile`
    memory_bytes_per_s: float = 0.0  # of the whole machine; 0: unknown
    gpus: tuple[Gpu, ...] = ()
    gpu_link: Link | None = None  # between the GPUs of this machine


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A connection: the time of a message of n bytes is ``latency_s + n / bytes_per_s``."""

    bytes_per_s: float
    latency_s: float = 0.0


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One OS process of the job: the cores (numbers on its machine) and GPUs that belong to it."""

    rank: int
    machine: int  # index into Cluster.machines
    cores: tuple[int, ...]
    gpus: tuple[int, ...] = ()
    memory_bytes: int = 0  # its share of the machine's memory


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """All machines of a job and the processes on them. Build it with `detect`, `load` or `preset`.

    `network` joins the machines; `process_link` joins processes of one machine (loopback). `is_here` tells a detected
    cluster, on which plans can be measured and run, from a described one.
    """

    machines: tuple[Machine, ...]
    processes: tuple[Process, ...]
    network: Link
    process_link: Link
    is_here: bool = False

    @property
    def num_cores(self) -> int:
        return sum(len(process.cores) for process in self.processes)

    @property
    def fingerprint(self) -> str:
        """A hash of what a plan relies on: machines (hardware), processes, their cores and GPUs.

        Names of machines and measured rates do not enter, so that a plan stays valid on the same hardware after a new
        measurement or under another host name; memory counts in whole GiB, because kernels keep varying bits of it.
        """
        machines = [
            (machine.cpu, machine.cores, machine.num_sockets, round(machine.memory_bytes / GIB), _gpu_facts(machine))
            for machine in self.machines
        ]
        processes = [(process.rank, process.machine, process.cores, process.gpus) for process in self.processes]
        return fingerprint([machines, processes])

    @staticmethod
    def detect(*, timeout_s: float = 60.0) -> Cluster:
        """This machine, or all machines of the running torchrun, mpirun or srun job (then every process must call it).

        Args:
            timeout_s: limit of the wait for the job's master and for each other process, seconds.

        Example:
            >>> Cluster.detect().num_cores >= 1
            True

        Raises:
            ClusterError: the launcher's environment is contradictory, or the other processes cannot be reached.
        """
        from partita.cluster.detect import detect

        return detect(timeout_s=timeout_s)

    @staticmethod
    def load(path: str | Path) -> Cluster:
        """The cluster described by a TOML file (schema: `partita.cluster.files`).

        Raises:
            ClusterError: the file is absent, is not TOML, or an entry is unknown, of the wrong type or impossible.
        """
        from partita.cluster.files import load

        return load(path_of(path, "the path of Cluster.load"))

    @staticmethod
    def preset(name: str) -> Cluster:
        """A cluster by name: machines x processes x kind, e.g. ``"4x8xH100"`` or ``"2x1xcpu-16"``.

        Raises:
            ClusterError: the name is unknown (names the nearest kinds and the grammar).
        """
        from partita.cluster.presets import preset

        if not isinstance(name, str):
            raise InputError(f'the name of a preset must be a text such as "4x8xH100", but got {told(name)}.')
        return preset(name)

    def save(self, path: str | Path) -> None:
        """Write this cluster as a TOML file that `load` reads back equal (but for `is_here`: a file only describes)."""
        from partita.cluster.files import save

        save(self, path_of(path, "the path of Cluster.save"))


def _gpu_facts(machine: Machine) -> list[tuple[str, int]]:
    return [(gpu.name, round(gpu.memory_bytes / GIB)) for gpu in machine.gpus]


def machine_fingerprint(machine: Machine) -> str:
    """A hash of one machine's hardware, without its name and measured rates: the key of measurements made on it."""
    return fingerprint(
        [
            machine.cpu,
            machine.cores,
            machine.num_sockets,
            machine.numa_nodes,
            sorted(machine.cache_bytes.items()),
            round(machine.memory_bytes / GIB),
            _gpu_facts(machine),
        ]
    )
