"""Measured child processes: started once with a pinned environment, then asked by JSON messages.

A benchmark program is its own child: `python -m benchmarks.NAME --child ROLE` calls `serve(handler)`. The parent
holds a `Child`, or a `Group` of children that form one job (RANK, WORLD_SIZE, ...), and asks them. Replies have a
pipe of their own, so whatever a model prints cannot disturb them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

Message = dict[str, Any]
Handler = Callable[[Message], Message]
REPLY_PIPE = "BENCHMARK_REPLY_PIPE"

# Waiting OpenMP threads must sleep: spinning ones would slow whatever else is measured on the same cores.
PINNED_ENVIRONMENT: Mapping[str, str] = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ChildError(RuntimeError):
    """A child ended, or did not answer in time; the message ends with the tail of its standard error."""


class Child:
    """One process that runs `python -m MODULE --child ROLE`.

    `environment` is added to the parent's, on top of the pinned variables; `num_threads` sets OMP_NUM_THREADS;
    `interpreter` is a Python executable, the running one by default; `prefix` is a command that runs the rest of its
    command line, elsewhere.
    """

    def __init__(
        self,
        module: str,
        role: str,
        *,
        num_threads: int = 1,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        interpreter: str | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = f"{module} --child {role}"
        reading, writing = os.pipe()
        inherited = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
        own = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads), REPLY_PIPE: str(writing)}
        self._errors = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            [*prefix, interpreter or sys.executable, "-m", module, "--child", role, *arguments],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            env={**inherited, **PINNED_ENVIRONMENT, **own, **(environment or {})},
            pass_fds=(writing,),
            start_new_session=True,  # so that `close` reaches the processes that the child starts
        )
        os.close(writing)
        self._replies = reading
        self._received = b""

    @property
    def process_id(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Hand `message` over without waiting for the reply.

        Raises:
            ChildError: the child has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, OSError) as error:
            raise ChildError(self._explain("ended before it was asked")) from error

    def receive(self, timeout_s: float) -> Message:
        """The next reply.

        Raises:
            ChildError: the child ended, or did not answer within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise ChildError(self._explain(f"did not answer within {timeout_s:.0f} s"))
                piece = os.read(self._replies, 1 << 16)
                if not piece:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(5)
                    raise ChildError(self._explain(f"ended with exit status {self._process.poll()}"))
                self._received += piece
        line, self._received = self._received.split(b"\n", 1)
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    def ask(self, message: Message, timeout_s: float) -> Message:
        self.send(message)
        return self.receive(timeout_s)

    def close(self, grace_s: float = 5.0) -> None:
        """End the child and all processes it started; asks first, then kills."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with contextlib.suppress(OSError):
            os.close(self._replies)
            self._replies = -1
        self._errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _explain(self, what: str, num_lines: int = 15) -> str:
        self._errors.flush()
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace").splitlines()[-num_lines:]
        return "\n".join([f"{self.name} (process {self.process_id}) {what}; the end of what it printed:", *tail])


class Group:
    """`num_processes` children that form one job and are asked together: on this machine, or, where `places` gives the
    command prefix and environment of each, where these run them."""

    def __init__(
        self,
        module: str,
        role: str,
        *,
        num_processes: int,
        num_threads: int = 1,
        arguments: Sequence[str] = (),
        places: Sequence[tuple[Sequence[str], Mapping[str, str]]] | None = None,
        interpreter: str | None = None,
    ) -> None:
        if places is None:
            port = free_port()
            places = [((), job_environment(rank, num_processes, port)) for rank in range(num_processes)]
        self.children: list[Child] = []
        try:
            for prefix, environment in places:
                child = Child(
                    module,
                    role,
                    num_threads=num_threads,
                    environment=environment,
                    arguments=arguments,
                    prefix=prefix,
                    interpreter=interpreter,
                )
                self.children.append(child)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Message, timeout_s: float) -> list[Message]:
        """Replies by rank; all members get the message before any reply is awaited."""
        for child in self.children:
            child.send(message)
        deadline_s = time.monotonic() + timeout_s
        return [child.receive(max(1.0, deadline_s - time.monotonic())) for child in self.children]

    def close(self) -> None:
        for child in self.children:
            with contextlib.suppress(OSError):
                if child._process.stdin is not None:
                    child._process.stdin.close()
        for child in self.children:
            child.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def job_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What a launcher such as torchrun tells a process of a one-machine job."""
    values = (rank, num_processes, rank, num_processes, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(JOB_VARIABLES, values, strict=True)}


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve(handler: Handler) -> None:
    """The child's loop: one reply for each message, until the parent closes the pipe.

    An exception of `handler` becomes the reply `{"error": first line, "error_type": class name, "traceback": text}`.
    """
    _end_with_parent()
    replies = os.fdopen(int(os.environ[REPLY_PIPE]), "w")
    for line in sys.stdin:
        try:
            reply = handler(json.loads(line))
        except Exception as error:
            text = traceback.format_exc()
            traceback.print_exc()
            reply = {"error": str(error), "error_type": type(error).__name__, "traceback": text}
        replies.write(json.dumps(reply, default=str) + "\n")
        replies.flush()


def _end_with_parent() -> None:
    """Have Linux end this process when its parent is killed while a message is answered."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
