"""Emulated machines on slow links: a network namespace each, joined by veth pairs and (from three on) a bridge.

Every machine has a namespace of its own with one interface `net0`, whose sending side is limited by a token bucket
(`tc tbf`), a host name of its own (a UTS namespace), and a share of one core: the cores are dealt in turn, and where
several machines share one, each process group gets an equal part of it by the quota of a cpu cgroup, over periods of
10 ms. So the processes are real, their messages cross the kernel's TCP stack, and no machine is faster for another
one's waiting. Needs root and Linux.

Bytes are read from the interfaces' counters. A frame counts with its Ethernet, IPv4 and TCP headers (`HEADER_BYTES`,
the TCP timestamps included); `payload_since` takes them off, so acknowledgements count as nothing. Segmentation offload
counts a large frame once, with one header, and is seen by the counters in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

INTERFACE = "net0"
HEADER_BYTES = 14 + 20 + 32  # Ethernet, IPv4, TCP with timestamps
BURST_BYTES = 32 * 1024
QUEUE_TIME_MS = 400  # a queue that drops packets would measure TCP's recovery, not the link
PERIOD_US = 10_000
PORT = 29_500
_CGROUP = Path("/sys/fs/cgroup/cpu")


@dataclass(frozen=True)
class Traffic:
    """What an interface has sent: bytes with headers, and packets."""

    num_bytes: int
    num_packets: int

    def payload_since(self, before: Traffic) -> int:
        """Bytes without headers that were sent since `before`."""
        sent = self.num_bytes - before.num_bytes
        return max(sent - HEADER_BYTES * (self.num_packets - before.num_packets), 0)


def why_not() -> str | None:
    """The reason why machines cannot be emulated here; None if they can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "emulated machines need root: network namespaces and traffic limits are made"
    missing = [name for name in ("ip", "tc", "unshare", "taskset") if shutil.which(name) is None]
    if missing:
        return f"emulated machines need the programs {', '.join(missing)}"
    return None


class Machines:
    """`len(rates)` machines whose interfaces send `rates[i]` bytes a second.

    Names carry this process's id; namespaces of processes that are gone (a crash) are removed first.

    Example:
        >>> with Machines((12.5e6, 12.5e6)) as machines:                                       # doctest: +SKIP
        ...     subprocess.run([*machines.prefix(0), "ping", "-c1", machines.address(1)])

    Raises:
        RuntimeError: not root, or a tool is missing (`why_not`), or one of them fails; says what it said.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        self.rates = tuple(rates)
        self._base = f"ptt{os.getpid()}"
        self._groups: list[Path] = []
        self._bridge = ""
        remove_left_over()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.rates)

    def name(self, machine: int) -> str:
        return f"{self._base}m{machine}"

    def address(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def prefix(self, machine: int) -> list[str]:
        """The start of a command line whose program runs on the machine."""
        cores = sorted(os.sched_getaffinity(0))
        core = cores[machine % len(cores)]
        enter = f"echo $$ > {shlex.quote(str(self._groups[machine] / 'cgroup.procs'))}; " if self._groups else ""
        inside = f'hostname {self.name(machine)}; exec taskset -c {core} "$@"'
        return [
            *("sh", "-c", f'{enter}exec "$@"', "enter"),
            *("ip", "netns", "exec", self.name(machine), "unshare", "--uts"),
            *("sh", "-c", inside, "inside"),
        ]

    def environment(self, machine: int) -> dict[str, str]:
        """What a launcher such as torchrun tells the only process of a machine."""
        return {
            "RANK": str(machine),
            "WORLD_SIZE": str(len(self)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
        }

    def traffic(self) -> list[Traffic]:
        """What every machine has sent so far."""
        found = []
        for machine in range(len(self)):
            text = _run("ip", "-n", self.name(machine), "-j", "-s", "link", "show", INTERFACE)
            sent = json.loads(text)[0]["stats64"]["tx"]
            found.append(Traffic(sent["bytes"], sent["packets"]))
        return found

    def retransmissions(self) -> int:
        """TCP segments that were sent again, on all machines."""
        total = 0
        for machine in range(len(self)):
            text = _run("ip", "netns", "exec", self.name(machine), "cat", "/proc/net/snmp")
            names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
            total += int(values[names.index("RetransSegs")])
        return total

    def close(self) -> None:
        """Removes everything; processes on the machines are ended. Calling it again is harmless."""
        for machine in range(len(self)):
            _remove_namespace(self.name(machine))
        if self._bridge:
            _try("ip", "link", "del", self._bridge)
            self._bridge = ""
        for group in self._groups:
            with contextlib.suppress(OSError):
                group.rmdir()
        self._groups = []

    def __enter__(self) -> Machines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Building --------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        for machine in range(len(self)):
            _run("ip", "netns", "add", self.name(machine))
            _run("ip", "-n", self.name(machine), "link", "set", "lo", "up")
        self._join()
        for machine, rate in enumerate(self.rates):
            name = self.name(machine)
            _run("ip", "-n", name, "addr", "add", f"{self.address(machine)}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run(
                *("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf"),
                *("rate", f"{int(rate * 8)}bit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_TIME_MS}ms"),
            )
        self._share_cores()

    def _join(self) -> None:
        """Two machines by one veth pair, more by a pair each and a bridge in the namespace of none."""
        if len(self) == 2:
            first, second = self.name(0), self.name(1)
            _run(
                *("ip", "link", "add", INTERFACE, "netns", first, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", second),
            )
            return
        self._bridge = f"{self._base}b"[-15:]
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "link", "set", self._bridge, "up")
        for machine in range(len(self)):
            port = f"{self._base}p{machine}"[-15:]
            name = self.name(machine)
            _run("ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _run("ip", "link", "set", port, "master", self._bridge)
            _run("ip", "link", "set", port, "up")

    def _share_cores(self) -> None:
        per_core = -(-len(self) // len(os.sched_getaffinity(0)))
        if per_core == 1:
            return
        for machine in range(len(self)):
            group = _CGROUP / self.name(machine)
            group.mkdir()
            self._groups.append(group)
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(PERIOD_US // per_core))


def remove_left_over() -> None:
    """Removes what processes that are gone have left."""
    for line in _try("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.strip() else ""
        owner = name.removeprefix("ptt").partition("m")[0]
        if name.startswith("ptt") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove_namespace(name)
            _try("ip", "link", "del", f"ptt{owner}b"[-15:])
            with contextlib.suppress(OSError):
                (_CGROUP / name).rmdir()


def _remove_namespace(name: str) -> None:
    """A namespace lives as long as processes in it do: they are ended first. Its link is removed now; with the
    namespace it would go when the kernel gets round to that."""
    _try("ip", "-n", name, "link", "del", INTERFACE)
    for process in _try("ip", "netns", "pids", name).split():
        with contextlib.suppress(OSError):
            os.kill(int(process), signal.SIGKILL)
    _try("ip", "netns", "del", name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _try(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout
