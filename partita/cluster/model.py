"""`Cluster`: the machines of a job as plain data. Detection, files and presets build it; nothing here touches hardware."""

from __future__ import annotations

import msgspec


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
