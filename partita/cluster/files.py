"""Cluster files: TOML that names exactly the fields of `partita.cluster.model`.

    [network]                      # joins the machines; message time = latency_s + bytes / bytes_per_s
    bytes_per_s = 1.25e9           # > 0
    latency_s = 5e-5               # >= 0, default 0

    [process_link]                 # joins processes of one machine; the same two keys
    bytes_per_s = 2e9

    [[machines]]
    name = "alice"
    cores = [0, 1, 2, 3]           # every core number once
    memory_bytes = 34359738368
    cpu = "cpu"                    # model name
    num_sockets = 1
    numa_nodes = [[0, 1], [2, 3]]  # default: one node; else every core exactly once
    cache_bytes = { L1d = 32768, L2 = 1048576, L3 = 33554432 }
    flops_per_s_per_core = 9.6e10  # float32; 0: unknown
    memory_bytes_per_s = 2.5e10    # whole machine; 0: unknown
    gpu_link = { bytes_per_s = 4.5e11, latency_s = 5e-6 }   # between its GPUs
    [[machines.gpus]]
    name = "H100"
    memory_bytes = 85899345920
    flops_per_s = { float32 = 6.7e13, bfloat16 = 9.895e14 }
    memory_bytes_per_s = 3.35e12

    [[processes]]                  # default: one process a machine, or one a GPU
    rank = 0                       # 0, 1, 2, ... in the order of the file
    machine = 0                    # index into machines
    cores = [0, 1, 2, 3]           # of its machine, no core in two processes
    gpus = [0]                     # indices into the machine's gpus
    memory_bytes = 34359738368     # its share; 0: unknown

Required: `network`, `process_link`, and of every machine `name`, `cores`, `memory_bytes`.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from partita.cluster.model import Cluster, Gpu, Link, Machine, Process
from partita.errors import ClusterError
from partita.files import replacing
from partita.units import split_evenly

# Keys of a table and, of those that hold tables again, the struct inside.
_INNER: dict[type[msgspec.Struct], dict[str, type[msgspec.Struct]]] = {
    Cluster: {"machines": Machine, "processes": Process, "network": Link, "process_link": Link},
    Machine: {"gpus": Gpu, "gpu_link": Link},
    Process: {},
    Link: {},
    Gpu: {},
}
_NOT_IN_FILES = {"is_here"}


def load(path: Path) -> Cluster:
    """The cluster that the TOML file at `path` describes.

    Raises:
        ClusterError: the file is absent, is not TOML, or an entry is unknown (names the nearest key), of the wrong type
            or impossible (names its place).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"a cluster file must be readable text, but {str(path)!r} is not: {error}") from error
    return parse(text, source=str(path))


def parse(text: str, *, source: str = "<text>") -> Cluster:
    """The cluster described by TOML text; `source` names it in errors. Raises as `load`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(f"{source} must be TOML, but it is not: {error}. See `partita.cluster.files`.") from error
    _refuse_unknown_keys(table, Cluster, "", source)
    with_processes = "processes" in table
    try:
        cluster = msgspec.convert({"processes": [], **table}, Cluster)
    except msgspec.ValidationError as error:
        place = str(error).replace("`$.", "`")
        raise ClusterError(f"{source}: {place}. See the schema in `partita.cluster.files`.") from error
    if not with_processes:
        cluster = msgspec.structs.replace(cluster, processes=default_processes(cluster.machines))
    validate(cluster, source=source)
    return cluster


def save(cluster: Cluster, path: Path) -> None:
    """Write `cluster` to `path` atomically.

    Raises:
        ClusterError: the cluster is impossible (such a file could not be loaded), or the path cannot be written.
    """
    validate(cluster, source="the cluster to save")
    text = to_toml(cluster)
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ClusterError(f"the cluster file must be writable, but {str(path)!r} is not: {error}") from error


def to_toml(cluster: Cluster) -> str:
    """The text of the cluster's file; `parse` gives the same cluster back, but for `is_here`."""
    table = msgspec.to_builtins(cluster)
    return tomli_w.dumps(_without_none({key: value for key, value in table.items() if key not in _NOT_IN_FILES}))


def default_processes(machines: tuple[Machine, ...]) -> tuple[Process, ...]:
    """One process for every GPU, or one for a machine without; each takes its even share of cores and memory."""
    processes: list[Process] = []
    for index, machine in enumerate(machines):
        count = min(max(1, len(machine.gpus)), max(1, len(machine.cores)))
        gpu_sizes = split_evenly(len(machine.gpus), count)
        for local, cores in enumerate(split_cores(machine, count)):
            first = sum(gpu_sizes[:local])
            processes.append(
                Process(
                    rank=len(processes),
                    machine=index,
                    cores=cores,
                    gpus=tuple(range(first, first + gpu_sizes[local])),
                    memory_bytes=machine.memory_bytes // count,
                )
            )
    return tuple(processes)


def split_cores(machine: Machine, count: int) -> tuple[tuple[int, ...], ...]:
    """The cores of `count` processes on `machine`: contiguous runs in the order of its NUMA nodes, so that a process
    spans as few nodes as its share allows. With more processes than cores, they take turns on single cores."""
    ordered = tuple(core for node in machine.numa_nodes or (machine.cores,) for core in node)
    if count > len(ordered):
        return tuple((ordered[local % len(ordered)],) for local in range(count))
    sizes = split_evenly(len(ordered), count)
    starts = [sum(sizes[:local]) for local in range(count)]
    return tuple(ordered[start : start + size] for start, size in zip(starts, sizes, strict=True))


def validate(cluster: Cluster, *, source: str) -> None:
    """Raise ClusterError if `cluster` cannot exist; the message starts with `source` and names the entry."""
    _need(len(cluster.machines) > 0, source, "machines", "there must be at least one machine", 0)
    _need(len(cluster.processes) > 0, source, "processes", "there must be at least one process", 0)
    _check_link(cluster.network, source, "network")
    _check_link(cluster.process_link, source, "process_link")
    for index, machine in enumerate(cluster.machines):
        _check_machine(machine, source, f"machines[{index}]")
    for index, process in enumerate(cluster.processes):
        _check_process(process, index, cluster.machines, source, f"processes[{index}]")
    for index, machine in enumerate(cluster.machines):
        members = [process for process in cluster.processes if process.machine == index]
        cores = [core for process in members for core in process.cores]
        if len(members) <= len(machine.cores):  # more processes than cores have to share them
            _need(_distinct(cores), source, "processes", f"no core of machines[{index}] may be in two processes", cores)
        gpus = [gpu for process in members for gpu in process.gpus]
        _need(_distinct(gpus), source, "processes", f"no GPU of machines[{index}] may be in two processes", gpus)
        total = sum(process.memory_bytes for process in members)
        rule = f"the processes' memory must fit into machines[{index}].memory_bytes = {machine.memory_bytes}"
        _need(total <= machine.memory_bytes, source, "processes", rule, total)


def _check_machine(machine: Machine, source: str, place: str) -> None:
    cores = machine.cores
    _need(len(cores) > 0, source, f"{place}.cores", "there must be at least one core", cores)
    rule = "core numbers must be distinct and >= 0"
    _need(_distinct(cores) and min(cores) >= 0, source, f"{place}.cores", rule, cores)
    if machine.numa_nodes:
        flat = sorted(core for node in machine.numa_nodes for core in node)
        rule = "every core must be in exactly one NUMA node"
        _need(flat == sorted(cores), source, f"{place}.numa_nodes", rule, machine.numa_nodes)
    _need(machine.memory_bytes > 0, source, f"{place}.memory_bytes", "must be > 0", machine.memory_bytes)
    _need(machine.num_sockets > 0, source, f"{place}.num_sockets", "must be > 0", machine.num_sockets)
    for key, size in machine.cache_bytes.items():
        _need(size > 0, source, f"{place}.cache_bytes.{key}", "must be > 0", size)
    _check_rate(machine.flops_per_s_per_core, source, f"{place}.flops_per_s_per_core")
    _check_rate(machine.memory_bytes_per_s, source, f"{place}.memory_bytes_per_s")
    for index, gpu in enumerate(machine.gpus):
        where = f"{place}.gpus[{index}]"
        _need(gpu.memory_bytes > 0, source, f"{where}.memory_bytes", "must be > 0", gpu.memory_bytes)
        _check_rate(gpu.memory_bytes_per_s, source, f"{where}.memory_bytes_per_s")
        for dtype, rate in gpu.flops_per_s.items():
            _check_rate(rate, source, f"{where}.flops_per_s.{dtype}")
    if machine.gpu_link is not None:
        _check_link(machine.gpu_link, source, f"{place}.gpu_link")


def _check_process(process: Process, index: int, machines: tuple[Machine, ...], source: str, place: str) -> None:
    rule = f"ranks must count up from 0, so this must be {index}"
    _need(process.rank == index, source, f"{place}.rank", rule, process.rank)
    rule = f"must be the index of one of the {len(machines)} machines"
    _need(0 <= process.machine < len(machines), source, f"{place}.machine", rule, process.machine)
    machine = machines[process.machine]
    rule = f"must be distinct cores of machines[{process.machine}], at least one"
    fits = len(process.cores) > 0 and _distinct(process.cores) and set(process.cores) <= set(machine.cores)
    _need(fits, source, f"{place}.cores", rule, process.cores)
    rule = f"must be indices of the {len(machine.gpus)} GPUs of machines[{process.machine}]"
    _need(set(process.gpus) <= set(range(len(machine.gpus))), source, f"{place}.gpus", rule, process.gpus)
    _need(process.memory_bytes >= 0, source, f"{place}.memory_bytes", "must be >= 0", process.memory_bytes)


def _check_link(link: Link, source: str, place: str) -> None:
    good = math.isfinite(link.bytes_per_s) and link.bytes_per_s > 0
    _need(good, source, f"{place}.bytes_per_s", "must be finite and > 0", link.bytes_per_s)
    _check_rate(link.latency_s, source, f"{place}.latency_s")


def _check_rate(value: float, source: str, place: str) -> None:
    _need(math.isfinite(value) and value >= 0, source, place, "must be finite and >= 0", value)


def _need(condition: bool, source: str, place: str, rule: str, given: object) -> None:
    if not condition:
        raise ClusterError(f"{source}: {place}: {rule}, but it is {given!r}. Correct that entry.")


def _distinct(values: Iterable[int]) -> bool:
    listed = list(values)
    return len(listed) == len(set(listed))


def _refuse_unknown_keys(table: Mapping[str, Any], kind: type[msgspec.Struct], place: str, source: str) -> None:
    known = [name for name in kind.__struct_fields__ if name not in _NOT_IN_FILES]
    for key, value in table.items():
        where = f"{place}.{key}" if place else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys there: {', '.join(known)}."
            raise ClusterError(f"{source}: unknown key {where!r}. {hint} See the schema in `partita.cluster.files`.")
        inner = _INNER[kind].get(key)
        if inner is None:
            continue
        if isinstance(value, Mapping):
            _refuse_unknown_keys(value, inner, where, source)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    _refuse_unknown_keys(item, inner, f"{where}[{index}]", source)


def _without_none(value: Any) -> Any:
    """TOML has no null: a None is an absent key."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value
