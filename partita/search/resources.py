"""Resources in words: "2 machines at 100 Mbit/s" as a cluster of machines such as this one."""

from __future__ import annotations

import re

import msgspec

from partita.cluster import Cluster
from partita.cluster.model import Link
from partita.errors import InputError

_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
_FORM = (
    'resources must be like "1,2,4 machines", "1,2,4 machines at 100 Mbit/s" or "1,2 cores", machines being such as '
    "this one"
)


def resources(text: str, here: Cluster) -> dict[str, Cluster]:
    """Clusters by name, of machines such as this one.

    Raises:
        InputError: the text says nothing of the kind, or more cores than there are.

    >>> list(resources("1,2 machines", Cluster.detect()))
    ['1 machine', '2 machines']
    """
    match = re.fullmatch(
        r"(\d+(?:,\d+)*)(machines?|cores?)(?:at([\d.]+)([kMG])bit/s)?", re.sub(r"\s+", "", text).strip()
    )
    if match is None:
        raise InputError(f"{_FORM}, but got {text!r}")
    counts, what, rate, unit = match.groups()
    link = None if rate is None else Link(bytes_per_s=float(rate) * _UNITS[unit] / 8, latency_s=here.network.latency_s)
    names = [f"{count} {what.removesuffix('s') if count == '1' else what}" for count in counts.split(",")]
    if what.startswith("core"):
        made = [cores_of(here, int(count)) for count in counts.split(",")]
    else:
        made = [machines_of(here, int(count), link) for count in counts.split(",")]
    return dict(zip(names, made, strict=True))


def machines_of(here: Cluster, count: int, link: Link | None = None) -> Cluster:
    """So many machines such as this one, joined by `link`."""
    if count < 1:
        raise InputError(f"{_FORM}, but there must be at least one machine")
    process = here.processes[0]
    return msgspec.structs.replace(
        here,
        machines=(here.machines[process.machine],) * count,
        processes=tuple(msgspec.structs.replace(process, rank=rank, machine=rank) for rank in range(count)),
        network=link or here.network,
    )


def cores_of(here: Cluster, count: int) -> Cluster:
    """The first cores of this machine."""
    process = here.processes[0]
    if not 1 <= count <= len(process.cores):
        raise InputError(f"{_FORM}, but this machine has {len(process.cores)} cores, not {count}")
    return msgspec.structs.replace(here, processes=(msgspec.structs.replace(process, cores=process.cores[:count]),))
