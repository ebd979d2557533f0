"""All peers' processes, from the parent's side: started when first asked, started anew after an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from benchmarks.common import Row, first_line
from benchmarks.peers.roster import BY_NAME, Peer, num_cores
from benchmarks.processes import PINNED_ENVIRONMENT, Child, ChildError, Group, Message

MODULE = "benchmarks.peers.child"


class Field:
    """The processes of some peers.

    Args:
        names: of the peers.
        interpreters: Python executables by the package that a peer needs ("jax", "deepspeed"); others run in this one.
        timeout_s: for one preparation or turn.
    """

    def __init__(self, names: Sequence[str], *, interpreters: Mapping[str, str], timeout_s: float) -> None:
        self._interpreters, self.timeout_s = interpreters, timeout_s
        self._members: dict[str, Child | Group] = {}
        self.absent = {name: reason for name in names if (reason := self._missing(BY_NAME[name])) is not None}
        self.names = tuple(name for name in names if name not in self.absent)

    def ask(self, name: str, message: Message) -> Row:
        """The reply of the peer (of its first process); an error of any of its processes is in `error`."""
        if name not in self._members:
            self._members[name] = self._start(BY_NAME[name])
        try:
            replies = self._members[name].ask(message, self.timeout_s)
        except ChildError as error:
            self._members.pop(name).close()
            return {"error": str(error), "error_type": "ChildError"}
        if isinstance(replies, dict):
            return replies
        failed = [reply for reply in replies if "error" in reply]
        if failed:
            self._members.pop(name).close()
        return (failed or replies)[0]

    def close(self) -> None:
        for member in self._members.values():
            member.close()
        self._members.clear()

    def _interpreter(self, peer: Peer) -> str:
        return self._interpreters.get(peer.needs, sys.executable)

    def _missing(self, peer: Peer) -> str | None:
        """Why the package that the peer needs cannot be imported by its interpreter; None if it can."""
        command = [self._interpreter(peer), "-c", f"import {peer.needs}"]
        environment = {**os.environ, **PINNED_ENVIRONMENT}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{type(error).__name__}: {first_line(error)}"
        if done.returncode == 0:
            return None
        last = ([line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"])[-1]
        return f"`import {peer.needs}` by {command[0]}: {last.strip()}"

    def _start(self, peer: Peer) -> Child | Group:
        interpreter = self._interpreter(peer)
        if peer.distributed:
            return Group(MODULE, peer.name, num_processes=max(2, num_cores()), interpreter=interpreter)
        num_threads = num_cores() if peer.num_threads == "all" else 1
        return Child(MODULE, peer.name, num_threads=num_threads, interpreter=interpreter)
