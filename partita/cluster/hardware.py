"""The facts of this machine: cores, caches, NUMA nodes, memory, GPUs.

On Linux they are read from `/proc` and `/sys` (below `root`, so that tests can hand in a tree of files); elsewhere from
psutil, with fewer facts. Reading only: nothing is measured here.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from partita.cluster.model import Gpu, Link, Machine
from partita.cluster.presets import gpu_by_name


def read_machine(
    *, root: Path = Path("/"), allowed: Iterable[int] | None = None, name: str | None = None, gpus: bool = True
) -> Machine:
    """This machine as this process may use it.

    Cores are those that the affinity mask and the cgroup CPU quota leave; of several hardware threads that share one
    physical core, one counts, because they share its arithmetic units (if only one physical core is left, its hardware
    threads count as cores, so that parallel plans can still be tried). A quota of q cores keeps the first floor(q), at
    least one. Memory is the smaller of the machine's and every enclosing cgroup's limit.

    Args:
        root: where `/proc` and `/sys` lie.
        allowed: core numbers that may be used; default: this process's affinity mask.
        name: of the machine; default: the host name.
        gpus: whether to ask torch for GPUs.
    """
    permitted = tuple(sorted(allowed)) if allowed is not None else affinity()
    cores = physical_cores(permitted, root)
    quota = cpu_quota(root)
    if quota is not None:
        cores = cores[: max(1, int(quota))]
    found_gpus, gpu_link = read_gpus() if gpus else ((), None)
    return Machine(
        name=name or socket.gethostname(),
        cores=cores,
        memory_bytes=memory_bytes(root),
        cpu=cpu_name(root),
        num_sockets=num_sockets(cores, root),
        numa_nodes=numa_nodes(cores, root),
        cache_bytes=cache_bytes(cores[0], root),
        gpus=found_gpus,
        gpu_link=gpu_link,
    )


def affinity() -> tuple[int, ...]:
    """The core numbers on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def physical_cores(allowed: tuple[int, ...], root: Path) -> tuple[int, ...]:
    """One hardware thread of every physical core among `allowed`, the lowest; all of them if only one core is there."""
    seen: set[frozenset[int]] = set()
    chosen: list[int] = []
    for core in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{core}/topology"
        text = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        siblings = frozenset(parse_list(text)) if text else frozenset((core,))
        if siblings not in seen:
            seen.add(siblings)
            chosen.append(core)
    if not (root / "sys/devices/system/cpu").is_dir():
        # macOS and Windows do not say which numbers are siblings; the count of physical cores is known.
        physical = psutil.cpu_count(logical=False) or len(allowed)
        chosen = list(allowed[:physical])
    return tuple(chosen) if len(chosen) > 1 else allowed


def cpu_quota(root: Path) -> float | None:
    """The tightest CPU quota, in cores, of this process's cgroup and those around it; None without one.

    Source: cgroup v2 `cpu.max` ("quota period" or "max period"), v1 `cpu.cfs_quota_us` / `cpu.cfs_period_us`.
    """
    limits: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        text = _read(folder / "cpu.max")
        parts = text.split() if text else [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(parts) == 2 and parts[0] and parts[1] and parts[0] not in ("max", "-1") and int(parts[1]) > 0:
            limits.append(int(parts[0]) / int(parts[1]))
    return min(limits, default=None)


def memory_bytes(root: Path) -> int:
    """Memory that this process may use: the machine's, or the tightest cgroup limit if that is smaller."""
    total = None
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    if total is None:
        total = int(psutil.virtual_memory().total)
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text and text.isdigit():
                total = min(total, int(text))
    return total


def cpu_name(root: Path) -> str:
    """The model name of the CPU, e.g. ``"AMD EPYC 9354"``; the architecture where it is not told."""
    fields: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine() or "cpu"


def num_sockets(cores: tuple[int, ...], root: Path) -> int:
    """Sockets that `cores` lie on; at least 1."""
    packages = {_read(root / f"sys/devices/system/cpu/cpu{core}/topology/physical_package_id") for core in cores}
    return max(1, len(packages - {None}))


def numa_nodes(cores: tuple[int, ...], root: Path) -> tuple[tuple[int, ...], ...]:
    """The numbers of `cores` by NUMA node, every core exactly once, empty nodes left out."""
    nodes: list[tuple[int, ...]] = []
    rest = set(cores)
    folder = root / "sys/devices/system/node"
    paths = [path for path in folder.glob("node*") if path.name[4:].isdigit()] if folder.is_dir() else []
    for path in sorted(paths, key=lambda path: int(path.name[4:])):
        members = rest & set(parse_list(_read(path / "cpulist") or ""))
        if members:
            nodes.append(tuple(core for core in cores if core in members))
            rest -= members
    if rest:
        nodes.append(tuple(core for core in cores if core in rest))
    return tuple(nodes)


def cache_bytes(core: int, root: Path) -> dict[str, int]:
    """Sizes of the data caches that `core` uses: ``{"L1d": 32768, "L2": 1048576, "L3": 33554432}``."""
    sizes: dict[str, int] = {}
    for path in sorted((root / f"sys/devices/system/cpu/cpu{core}/cache").glob("index*")):
        level, kind, text = _read(path / "level"), _read(path / "type"), _read(path / "size")
        if level is None or text is None or kind == "Instruction":
            continue
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes["L1d" if level == "1" else f"L{level}"] = int(digits) * scale
    return sizes


def read_gpus() -> tuple[tuple[Gpu, ...], Link | None]:
    """The GPUs that torch can use, with the vendor's rates where the kind is known, and the link between them.

    The link is NVLink's rate for kinds that are sold on NVLink boards when torch reports peer access; else PCIe.
    """
    if "torch" not in sys.modules and not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return (), None  # no driver device: loading torch (seconds) could not find a GPU either
    import torch

    if not torch.cuda.is_available():
        return (), None
    gpus: list[Gpu] = []
    link: Link | None = None
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        known = gpu_by_name(properties.name, int(properties.total_memory))
        gpus.append(
            Gpu(
                name=properties.name,
                memory_bytes=int(properties.total_memory),
                flops_per_s=dict(known.gpu.flops_per_s) if known else {},
                memory_bytes_per_s=known.gpu.memory_bytes_per_s if known else 0.0,
            )
        )
        link = link or (known.link if known else None)
    peers = len(gpus) > 1 and torch.cuda.can_device_access_peer(0, 1)
    if len(gpus) < 2:
        return tuple(gpus), None
    return tuple(gpus), link if peers and link else PCIE_LINK


# PCI Express 4.0 x16: 31.5 GB/s a direction (PCI-SIG, 16 GT/s, 128b/130b, 16 lanes); latency of a peer copy about 10
# us.
PCIE_LINK = Link(bytes_per_s=31.5e9, latency_s=1e-5)


def network_interface(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> str | None:
    """The interface that messages between machines take: `GLOO_SOCKET_IFNAME`, else the one of the default route."""
    variables = os.environ if environment is None else environment
    wished = variables.get("GLOO_SOCKET_IFNAME")
    if wished:
        return wished.split(",")[0]
    for line in (_read(root / "proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 1 and fields[1] == "00000000":
            return fields[0]
    return None


def interface_bytes_per_s(interface: str, root: Path = Path("/")) -> float | None:
    """The speed that the driver of `interface` reports; None where it does not know (virtual interfaces)."""
    text = _read(root / f"sys/class/net/{interface}/speed")  # Mbit/s
    try:
        speed = int(text) if text else -1
    except ValueError:
        return None
    return speed * 1e6 / 8 if speed > 0 else None


def busy_cores(cores: Iterable[int], *, sample_s: float) -> float:
    """How many of `cores` others kept busy while this process slept for `sample_s` seconds (1.5 = one and a half)."""
    shares: list[float] = psutil.cpu_percent(interval=sample_s, percpu=True)
    return sum(shares[core] for core in cores if core < len(shares)) / 100.0


def parse_list(text: str) -> tuple[int, ...]:
    """The numbers of a kernel list: ``"0-2,8"`` -> ``(0, 1, 2, 8)``."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.strip().isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders that hold `controller`'s limits for this process, innermost first, of cgroup v2 and v1.

    In a container `/proc/self/cgroup` may name a path of the host that is not mounted here; then only the mounted root,
    which is the container's own group, is read.
    """
    folders: list[Path] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        for mount in mounts:
            if not mount.is_dir():
                continue
            inner = mount / path.strip().lstrip("/")
            while inner != mount and mount in inner.parents:
                folders.append(inner)
                inner = inner.parent
            folders.append(mount)
    return [folder for folder in folders if folder.is_dir()]


def _read(path: Path) -> str | None:
    """The stripped text of a file, or None if it cannot be read (absent facts are normal in containers)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
