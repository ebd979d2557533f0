"""Elastic jobs on this machine or on emulated ones, for `benchmarks.faults`: processes that are started, killed and
stopped, and what they log."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import Row
from benchmarks.fault_job import plain_losses
from benchmarks.slow_machines import INTERFACE, Machines

NAMES = ("a", "b", "c")
JOIN_S = {"exact": 1.0, "diloco": 5.0}  # that a living process is waited for which is not ready
LIMIT_S = 120.0  # of any wait here


class Hung(Exception):
    """Something did not happen within the limit."""


class Job:
    """A lighthouse and processes, on this machine or on emulated ones."""

    def __init__(self, machines: Machines | None = None, method: str = "exact") -> None:
        self._method = method
        self.folder = Path(tempfile.mkdtemp(prefix="partita-faults-"))
        self._machines = machines
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        command = [
            sys.executable,
            "-m",
            "partita",
            "lighthouse",
            "--port",
            "0",
            "--json",
            "--join-s",
            str(JOIN_S[method]),
        ]
        host = machines.address(0) if machines else "127.0.0.1"
        self._lighthouse = subprocess.Popen([*self._prefix(0), *command, "--host", host], stdout=subprocess.PIPE)
        assert self._lighthouse.stdout is not None
        told = b""
        while b"}" not in told:
            told += self._lighthouse.stdout.readline()
        self._address = f"http://{host}:{urlsplit(json.loads(told[told.index(b'{') :])['address']).port}"

    def _prefix(self, machine: int) -> list[str]:
        return self._machines.prefix(machine) if self._machines else []

    def start(self, name: str, slowness: float = 0.0) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.fault_job",
            str(self.folder),
            name,
            self._address,
            str(slowness),
            self._method,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self._machines:
            environment["GLOO_SOCKET_IFNAME"] = INTERFACE
        with (self.folder / f"{name}.txt").open("a") as output:
            self.processes[name] = subprocess.Popen(
                [*self._prefix(NAMES.index(name)), *command], stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def signal(self, name: str, number: int) -> None:
        os.killpg(self.processes[name].pid, number)
        if number == signal.SIGKILL:
            self.processes[name].wait()

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )

    def last(self, name: str) -> dict[str, Any]:
        found = self.lines(name)
        return found[-1] if found else {"step": 0, "num": 0, "end_s": 0.0}

    def until(self, ready: Callable[[], bool], what: str) -> float:
        """Waits; the time at which it was so."""
        deadline_s = time.monotonic() + LIMIT_S
        while not ready():
            for name, process in self.processes.items():
                if process.poll() not in (None, 0, -signal.SIGKILL):
                    raise Hung(f"{name} failed: {(self.folder / f'{name}.txt').read_text()[-400:]}")
            if time.monotonic() > deadline_s:
                raise Hung(f"{what} took more than {LIMIT_S:g} s")
            time.sleep(0.01)
        return time.time()

    def all_take_part(self, names: Sequence[str] = NAMES) -> None:
        self.until(lambda: all(self.last(name)["num"] == len(names) for name in names), f"a step by {names}")

    def stepped_after(self, name: str, moment_s: float, num: int = 0) -> float:
        """When the first step of a process after that moment, made with so many or more, was over."""

        def ends_s() -> list[float]:
            return [line["end_s"] for line in self.lines(name) if line["end_s"] > moment_s and line["num"] >= num]

        self.until(lambda: bool(ends_s()), f"a step of {name} after a fault")
        return ends_s()[0]

    def finish(self, more_steps: int = 20) -> Row:
        """Ends the job some steps later; what its steps have come to."""
        end = max(self.last(name)["step"] for name in self.processes) + more_steps
        self.end_at(end)
        lines = [line for name in self.processes for line in self.lines(name)]
        wanted = plain_losses(max(line["step"] for line in lines))
        seen = {line["step"] for line in lines}
        return {
            "steps": len(wanted),
            "deviation": max(abs(line["loss"] - wanted[line["step"] - 1]) for line in lines),
            "lost_steps": sum(number not in seen for number in range(1, len(wanted) + 1)),
            "longest_s": max(line["time_s"] for line in lines),
        }

    def end_at(self, end: int) -> None:
        """Has all that live end after that step."""
        names = [name for name, process in self.processes.items() if process.poll() is None]
        (self.folder / "end").write_text(str(end))
        for name in names:
            try:
                self.processes[name].wait(LIMIT_S)
            except subprocess.TimeoutExpired as error:
                raise Hung(f"{name} did not end at step {end}") from error

    def close(self) -> None:
        for process in (*self.processes.values(), self._lighthouse):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if process is not self._lighthouse else process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running(names: Sequence[str] = NAMES, machines: Machines | None = None, method: str = "exact") -> Iterator[Job]:
    """A job whose processes all take part."""
    job = Job(machines, method)
    try:
        for name in names:
            job.start(name)
        job.all_take_part(names)
        yield job
    finally:
        job.close()
