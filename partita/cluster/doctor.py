"""The doctor: is this machine ready to train? Each finding says what was seen and, unless it is fine, the cure.

Findings only look; nothing is changed, nothing is printed. Every check reads its facts from a `Scene`, so that tests
can make one up.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from partita.cluster.detect import profile_name
from partita.cluster.hardware import affinity, busy_cores, cpu_quota, network_interface, read_machine
from partita.cluster.job import Job, current_job
from partita.cluster.measure import MAX_BUSY_SHARE
from partita.cluster.model import Machine
from partita.errors import ClusterError
from partita.units import GIB, MIB, format_bytes

Status = Literal["OK", "WARN", "FAIL"]
OLDEST_TORCH = (2, 11)
SMALL_SHM_BYTES = 256 * MIB
CONNECT_LIMIT_S = 3.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing the doctor looked at. `cure` is empty where there is nothing to do."""

    status: Status
    subject: str
    detail: str
    cure: str = ""


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks look at: the machine, the file tree below `root`, and the environment as it was at the start."""

    machine: Machine
    allowed: tuple[int, ...]
    root: Path = Path("/")
    environment: Mapping[str, str]


def diagnose(*, environment: Mapping[str, str] | None = None) -> tuple[Finding, ...]:
    """All findings about this machine and the running job, in a fixed order. A check that breaks is itself a finding.

    Args:
        environment: default: the one that this process was started with (see `start_environment`).

    Example:
        >>> [finding.subject for finding in diagnose() if finding.status == "FAIL"]
        []
    """
    variables = start_environment() if environment is None else environment
    return examine(Scene(machine=read_machine(), allowed=affinity(), environment=variables))


def start_environment() -> dict[str, str]:
    """The environment that this process was started with, where the system tells (Linux), else the present one.

    `import partita` sets defaults in `os.environ`. They would hide what a script that loads torch first would get.
    """
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def examine(scene: Scene) -> tuple[Finding, ...]:
    """The findings about `scene`."""
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check(scene)
        except Exception as error:  # a broken check must not hide the others
            subject = check.__name__.removeprefix("_check_").replace("_", " ")
            detail = f"the check itself failed: {type(error).__name__}: {error}"
            findings.append(_warn(subject, detail, "Report this with the whole output of `partita doctor`."))
    return tuple(findings)


def _ok(subject: str, detail: str) -> Finding:
    return Finding(status="OK", subject=subject, detail=detail)


def _warn(subject: str, detail: str, cure: str) -> Finding:
    return Finding(status="WARN", subject=subject, detail=detail, cure=cure)


def _fail(subject: str, detail: str, cure: str) -> Finding:
    return Finding(status="FAIL", subject=subject, detail=detail, cure=cure)


def _check_versions(scene: Scene) -> list[Finding]:
    import torch

    python = ".".join(map(str, sys.version_info[:3]))
    version = str(torch.__version__)
    parts = version.split("+")[0].split(".")
    detail = f"torch {version}, Python {python}, {sys.platform}"
    if tuple(int(part) for part in parts[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return [_fail("versions", detail, f"Install torch>={oldest}: `pip install -U torch`.")]
    return [_ok("versions", detail)]


def _check_compiler(scene: Scene) -> list[Finding]:
    wished = scene.environment.get("CXX")
    names = [wished] if wished else ["g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        what = f"CXX names {wished!r}, which is not there" if wished else "neither g++ nor clang++ is on the PATH"
        cure = "Install one (`apt install g++`), or set CXX to it; until then plans run uncompiled, often slower."
        return [_warn("C++ compiler", what, cure)]
    return [_ok("C++ compiler", f"{found}, for compiled segments")]


def _check_cores(scene: Scene) -> list[Finding]:
    machine, quota = scene.machine, cpu_quota(scene.root)
    total = psutil.cpu_count() or len(scene.allowed)
    detail = (
        f"{len(machine.cores)} used of {len(scene.allowed)} allowed hardware threads of {total}; "
        f"{machine.num_sockets} socket(s), {max(len(machine.numa_nodes), 1)} NUMA node(s); {machine.cpu}"
    )
    if quota is None:
        return [_ok("cores", detail)]
    detail += f"; CPU quota of the cgroup: {quota:g} cores"
    if quota < 1 or quota != int(quota):
        cure = "Give the container a whole number of CPUs: a fraction stalls the threads in the middle of a step."
        return [_warn("cores", detail, cure)]
    return [_ok("cores", detail)]


def _check_threads(scene: Scene) -> list[Finding]:
    text = scene.environment.get("OMP_NUM_THREADS")
    num_cores = len(scene.machine.cores)
    if text is None:
        return [_ok("OMP_NUM_THREADS", "not set: plain PyTorch uses all cores; partita sets each worker's threads")]
    first = text.split(",")[0].strip()
    if not first.isdigit() or int(first) < 1:
        cure = "Set it to a positive number or unset it."
        return [_fail("OMP_NUM_THREADS", f"is {text!r}, not a positive whole number", cure)]
    job = _job_or_none(scene)
    wanted = int(first) * (job.local_world_size if job else 1)
    if wanted > num_cores:
        detail = f"{first} threads x {wanted // int(first)} process(es) on {num_cores} cores: they take turns"
        return [_warn("OMP_NUM_THREADS", detail, f"Set OMP_NUM_THREADS={max(1, num_cores * int(first) // wanted)}.")]
    return [_ok("OMP_NUM_THREADS", text)]


def _check_spinning(scene: Scene) -> list[Finding]:
    if sys.platform != "linux":
        return []
    policy, spin = scene.environment.get("OMP_WAIT_POLICY", ""), scene.environment.get("GOMP_SPINCOUNT", "")
    detail = f"OMP_WAIT_POLICY={policy or '(not set)'}, GOMP_SPINCOUNT={spin or '(not set)'}"
    if policy.lower() == "passive" or spin == "0":
        return [_ok("waiting threads", detail)]
    cure = (
        "Waiting OpenMP threads spin, so a busy neighbour slows steps many times over: `import partita` before torch, "
        "or `export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0`."
    )
    return [_warn("waiting threads", detail, cure)]


def _check_memory(scene: Scene) -> list[Finding]:
    total = scene.machine.memory_bytes
    available = min(int(psutil.virtual_memory().available), total)
    detail = f"{format_bytes(available)} free of {format_bytes(total)} that this process may use"
    if available < min(GIB, total // 4):
        cure = "End other programs or raise the container's memory limit: plans count on the whole."
        return [_warn("memory", detail, cure)]
    return [_ok("memory", detail)]


def _check_shared_memory(scene: Scene) -> list[Finding]:
    folder = scene.root / "dev/shm"
    if not folder.is_dir():
        return []
    usage = shutil.disk_usage(folder)
    detail = f"/dev/shm: {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if usage.free < SMALL_SHM_BYTES:
        cure = "Data loaders with several workers need it: `docker run --shm-size=8g`, or remount with a larger size."
        return [_warn("shared memory", detail, cure)]
    return [_ok("shared memory", detail)]


def _check_huge_pages(scene: Scene) -> list[Finding]:
    text = _text(scene.root / "sys/kernel/mm/transparent_hugepage/enabled")
    if text is None:
        return []
    chosen = text.partition("[")[2].partition("]")[0] or text
    if chosen == "never":
        cure = "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`; large tensors then fault less."
        return [_warn("huge pages", "transparent huge pages: never", cure)]
    return [_ok("huge pages", f"transparent huge pages: {chosen}")]


def _check_governor(scene: Scene) -> list[Finding]:
    governors = {
        _text(scene.root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor") for core in scene.machine.cores
    } - {None}
    if not governors:
        return []  # virtual machines do not say
    detail = "CPU governor: " + ", ".join(sorted(filter(None, governors)))
    if "powersave" in governors and not (scene.root / "sys/devices/system/cpu/intel_pstate").is_dir():
        return [_warn("clock rate", detail, "`sudo cpupower frequency-set -g performance`.")]
    return [_ok("clock rate", detail)]


def _check_load(scene: Scene) -> list[Finding]:
    busy, num_cores = busy_cores(scene.machine.cores, sample_s=0.3), len(scene.machine.cores)
    detail = f"other processes keep {busy:.1f} of {num_cores} cores busy"
    if busy > MAX_BUSY_SHARE * num_cores:
        cure = "End them (`top` shows them), or measured times and chosen plans will mislead."
        return [_warn("load", detail, cure)]
    return [_ok("load", detail)]


def _check_profile(scene: Scene) -> list[Finding]:
    from partita.cache import cache_dir, read_json

    measured = read_json(profile_name(scene.machine)) or {}
    where = f"cache: {cache_dir()}"
    if not measured.get("flops_per_s_per_core"):
        return [_warn("measurements", f"this machine was not measured; {where}", "Run `partita profile` once.")]
    rates = (
        f"{measured['flops_per_s_per_core'] / 1e9:.0f} GFLOP/s per core, "
        f"{measured.get('memory_bytes_per_s', 0.0) / 1e9:.0f} GB/s memory"
    )
    return [_ok("measurements", f"{rates}; {where}")]


def _check_gloo(scene: Scene) -> list[Finding]:
    """Forms a group of one process: this fails exactly where a job's would, on the choice of the interface."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return [
            _fail("gloo", "this torch has no gloo", "Install a torch with distributed support for several machines.")
        ]
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported, but not declared so

    from partita.cluster.links import PingPong

    try:
        PingPong(HashStore(), 0, 1, timeout_s=5)
    except ClusterError as error:
        cure = "Set GLOO_SOCKET_IFNAME to an interface that is up (`ip -br address` lists them); see /etc/hosts."
        return [_fail("gloo", str(error), cure)]
    return [_ok("gloo", "can listen for other processes")]


def _check_interface(scene: Scene) -> list[Finding]:
    wished = scene.environment.get("GLOO_SOCKET_IFNAME")
    known = sorted(psutil.net_if_addrs())
    if wished:
        absent = [name for name in wished.split(",") if name not in known]
        if absent:
            cure = f"Set it to one of: {', '.join(known)}."
            return [_fail("network", f"GLOO_SOCKET_IFNAME names {absent[0]!r}, which is not there", cure)]
        return [_ok("network", f"GLOO_SOCKET_IFNAME={wished}")]
    default = network_interface(scene.root, scene.environment)
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = ""
    detail = f"default route through {default or 'nothing'}, host name resolves to {address or 'nothing'}"
    job = _job_or_none(scene)
    if job is not None and job.local_world_size < job.world_size and (not address or address.startswith("127.")):
        cure = f"Other machines cannot reach that address: `export GLOO_SOCKET_IFNAME={default or 'eth0'}` on each."
        return [_fail("network", detail, cure)]
    return [_ok("network", detail)]


def _check_job(scene: Scene) -> list[Finding]:
    try:
        job = current_job(scene.environment)
    except ClusterError as error:
        return [_fail("job", str(error), "Start all processes with one launcher (torchrun, mpirun or srun).")]
    if job is None:
        return [_ok("job", "none: this process runs alone")]
    detail = (
        f"{job.launcher}: rank {job.rank} of {job.world_size}, local rank {job.local_rank} of {job.local_world_size}, "
        f"master {job.master_address}:{job.master_port}"
    )
    if job.master_address is None:
        cure = "Pass it on: `mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 ...`."
        return [_fail("job", f"{detail}; MASTER_ADDR is not set", cure)]
    problem = _unreachable(job)
    if problem:
        return [_fail("job", f"{detail}; {problem}", "Check MASTER_ADDR, the name service and the firewall.")]
    findings = [_ok("job", detail)]
    if job.local_world_size > len(scene.machine.cores):
        detail = f"{job.local_world_size} processes of this host share {len(scene.machine.cores)} cores"
        findings.append(_warn("job size", detail, "Start one process a machine; partita's threads use all its cores."))
    return findings


def _unreachable(job: Job) -> str:
    """Why the master cannot be reached; "" if it can. An open port is only there once rank 0 or the launcher's agent
    listens, so a refused connection proves the way to the host, which is what can be known before the job runs."""
    assert job.master_address is not None
    try:
        addresses = socket.getaddrinfo(job.master_address, job.master_port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"the name {job.master_address!r} does not resolve ({error})"
    problem = ""
    for family, kind, protocol, _, end in addresses:
        with socket.socket(family, kind, protocol) as connection:
            connection.settimeout(CONNECT_LIMIT_S)
            try:
                connection.connect(end)
                return ""
            except ConnectionRefusedError:
                return ""
            except OSError as error:
                problem = f"no connection to {job.master_address}:{job.master_port} ({error})"
    return problem


def _check_gpus(scene: Scene) -> list[Finding]:
    driver = any((scene.root / "dev").glob("nvidia[0-9]*"))
    if not scene.machine.gpus:
        if driver:
            cure = "Install a torch built for CUDA and a driver that it accepts; `nvidia-smi` shows the driver."
            return [_warn("GPUs", "an NVIDIA driver device is there, but torch cannot use it", cure)]
        return [_ok("GPUs", "none: plans use the CPU cores")]
    import torch.distributed as dist

    detail = ", ".join(f"{gpu.name} ({format_bytes(gpu.memory_bytes)})" for gpu in scene.machine.gpus)
    if len(scene.machine.gpus) > 1 and not (dist.is_available() and dist.is_nccl_available()):
        return [_warn("GPUs", f"{detail}; no NCCL", "Install a torch build with NCCL: messages between GPUs need it.")]
    return [_ok("GPUs", detail)]


def _job_or_none(scene: Scene) -> Job | None:
    try:
        return current_job(scene.environment)
    except ClusterError:
        return None  # `_check_job` reports it


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


_CHECKS: tuple[Callable[[Scene], list[Finding]], ...] = (
    _check_versions,
    _check_compiler,
    _check_cores,
    _check_threads,
    _check_spinning,
    _check_memory,
    _check_shared_memory,
    _check_huge_pages,
    _check_governor,
    _check_load,
    _check_profile,
    _check_gloo,
    _check_interface,
    _check_job,
    _check_gpus,
)
