"""The processes of a benchmark on emulated machines, one of each role a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import Row, first_line
from benchmarks.processes import ChildError, Group, Message, free_port, job_environment
from benchmarks.slow_machines import PORT, Machines

CONSEQUENCES = ("StepError", "WaitTimeoutError", "PeerLostError")
"""Errors of processes that waited for one that had failed; the first says most of it."""


def what_failed(failed: Sequence[Row]) -> str:
    """The cause among the errors of the processes of a job, and the types of all of them.

    Example:
        >>> what_failed([{"error_type": "PeerLostError", "error": "..."}, {"error_type": "KeyError", "error": "'w'"}])
        "KeyError: 'w' (of PeerLostError, KeyError)"
    """
    types = [str(row["error_type"]) for row in failed]
    order = {name: place for place, name in enumerate(CONSEQUENCES, start=1)}
    cause = min(failed, key=lambda row: order.get(row["error_type"], 0))
    told = f"{cause['error_type']}: {first_line(cause['error'])}"
    return told if len(failed) == 1 else f"{told} (of {', '.join(types)})"


class Field:
    """Processes of several roles on the machines of one network; they start when they are first asked.

    Args:
        module: whose `--child ROLE` they are.
        roles: that may be asked; each has a port of its own.
        machines: emulated ones, or so many processes of this one.
        cache: folder of partita's caches, one for each machine.
        timeout_s: for one answer.
        interpreters: of roles that need another Python.
    """

    def __init__(
        self,
        module: str,
        roles: Sequence[str],
        machines: Machines | int,
        cache: Path,
        timeout_s: float,
        interpreters: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.roles, self.machines, self.cache = module, tuple(roles), machines, cache
        self.timeout_s, self._interpreters = timeout_s, dict(interpreters or {})
        self._groups: dict[str, Group] = {}

    @property
    def num(self) -> int:
        """Of machines."""
        return self.machines if isinstance(self.machines, int) else len(self.machines)

    def ask(self, role: str, message: Message) -> list[Row] | str:
        """The replies of all machines, or what went wrong; the role starts anew then."""
        try:
            if role not in self._groups:
                self._groups[role] = self._start(role)
            replies = self._groups[role].ask(message, self.timeout_s)
        except ChildError as error:
            self.end(role)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"{first_line(error, 80)} {lines[-1][:200]}"
        failed = [reply for reply in replies if "error" in reply]
        if failed:
            self.end(role)
            return what_failed(failed)
        return replies

    def _start(self, role: str) -> Group:
        places = [
            (prefix, environment | {"PARTITA_CACHE": str(self.cache / str(machine))})
            for machine, (prefix, environment) in enumerate(self._places(role))
        ]
        return Group(
            self.module, role, num_processes=len(places), places=places, interpreter=self._interpreters.get(role)
        )

    def _places(self, role: str) -> list[tuple[list[str], dict[str, str]]]:
        if isinstance(self.machines, int):
            port = free_port()
            return [([], job_environment(rank, self.machines, port)) for rank in range(self.machines)]
        port = PORT + self.roles.index(role)
        return [
            (self.machines.prefix(machine), self.machines.environment(machine) | {"MASTER_PORT": str(port)})
            for machine in range(len(self.machines))
        ]

    def end(self, role: str) -> None:
        """Ends the processes of a role, if there are any."""
        if role in self._groups:
            self._groups.pop(role).close()

    def close(self) -> None:
        for role in list(self._groups):
            self.end(role)
