"""The process in which rules are tried: started once, fed with op calls, started again if a kernel brings it down.

Some kernels corrupt memory when shapes do not fit together, so guesses never run in the process that trains. Messages
are pickled and framed by their length (8 bytes). Up: one list of calls. Down: ``("guess", text)`` before a guess runs,
``("found", index, Found)`` after each call, ``("done",)`` at the end. If the process dies or hangs, the call is tried
again, with every guess in a fork of its own: corrupted memory often shows only some guesses later, so the guess that
ran last need not be the culprit.

    python -c "from partita.sharding.helper import serve; serve()"     # what the child runs
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from partita.sharding.calls import OpCall, TensorSpec
from partita.sharding.rules import Rule
from partita.sharding.search import Found, find_rules

MAX_CRASHES = 3  # of one call, before its op is given up: but for the first, they are not due to guesses
GUESS_LIMIT_S = 20.0  # without a sign of life for so long, a guess hangs
FORK_LIMIT_S = 10  # for a guess in a fork of its own
START_LIMIT_S = 120.0  # importing torch on a busy machine


@dataclass(frozen=True)
class Request:
    """An `OpCall` as it can be pickled, and whether each of its guesses runs in a fork of its own."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec | None, ...]
    returns_tuple: bool
    forked: bool = False

    @classmethod
    def of(cls, call: OpCall, forked: bool = False) -> Request:
        name = f"{call.target._schema.name}.{call.overload}"  # type: ignore[attr-defined]
        return cls(name, call.args, dict(call.kwargs), call.inputs, call.outputs, call.returns_tuple, forked)

    def call(self) -> OpCall | None:
        """The call; None if this process knows no such op (the user's own ops are not registered here)."""
        target = find_op(self.name)
        if target is None:
            return None
        return OpCall(target, self.args, self.kwargs, self.inputs, self.outputs, self.returns_tuple)


def find_op(name: str) -> Any:
    """The op named like ``aten::mm.default``, or None."""
    import torch

    import partita.graph.block_ops
    import partita.graph.custom_ops  # noqa: F401  (registers this project's ops)

    space, _, rest = name.partition("::")
    packet, _, overload = rest.rpartition(".")
    return getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)


class Helper:
    """The client's side. Use as a context, or `close` it.

    Example:
        >>> with Helper() as helper:
        ...     helper.find([call], limit_s=30.0)
        [Found(ran=True, rules=('S0 R -> S0', ...))]
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def find(self, calls: Sequence[OpCall], *, limit_s: float) -> list[Found | None]:
        """The rules of each call; None where the time was up first.

        Of ops that the process does not know, or that crash it again and again, nothing is found (``ran`` is False).
        """
        results: dict[int, Found | None] = {}
        crashes = [0] * len(calls)
        deadline_s = time.monotonic() + limit_s
        while len(results) < len(calls) and time.monotonic() < deadline_s:
            todo = [index for index in range(len(calls)) if index not in results]
            self._send([Request.of(calls[index], crashes[index] > 0) for index in todo])
            failed = self._receive(todo, results, deadline_s)
            if failed is None:
                continue
            self.close()
            crashes[failed] += 1
            if crashes[failed] >= MAX_CRASHES:
                results[failed] = Found(False, ())
        if len(results) < len(calls):
            self.close()  # it is still at work on what nobody waits for
        return [results.get(index) for index in range(len(calls))]

    def _receive(self, todo: Sequence[int], results: dict[int, Found | None], deadline_s: float) -> int | None:
        """Read answers until done or out of time; the call at which the process died or hung, if so."""
        position, first = 0, True
        while True:
            wait_s = min(START_LIMIT_S if first else GUESS_LIMIT_S, deadline_s - time.monotonic())
            try:
                message = self._messages.get(timeout=max(wait_s, 0.0))
            except queue.Empty:
                return None if time.monotonic() >= deadline_s else todo[position]
            first = False
            if message[0] == "done":
                return None
            if message[0] == "end":
                return todo[min(position, len(todo) - 1)]
            if message[0] == "found":
                results[todo[message[1]]] = message[2]
                position = message[1] + 1

    def _send(self, requests: list[Request]) -> None:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # if it has just died, the reader says so
            write_message(self._process.stdin, requests)

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self._messages = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from partita.sharding.helper import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # kernels that crash have much to say
            env=environment,
        )
        assert self._process.stdout is not None
        threading.Thread(target=_pump, args=(self._process.stdout, self._messages), daemon=True).start()

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _pump(stream: IO[bytes], messages: queue.Queue[Any]) -> None:
    while True:
        try:
            message = read_message(stream)
        except (OSError, ValueError, EOFError, pickle.UnpicklingError):
            message = None
        messages.put(("end",) if message is None else message)
        if message is None:
            return


def write_message(stream: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def read_message(stream: IO[bytes]) -> Any:
    """The next message; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    data = stream.read(length)
    return None if len(data) < length else pickle.loads(data)


def serve() -> None:
    """What the child runs: answer requests from standard input until it ends."""
    import torch

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print must not get between the messages
    torch.set_num_threads(1)
    # Memory that a kernel leaves unset becomes NaN, so that it is not taken for a result.
    torch.use_deterministic_algorithms(True, warn_only=True)
    write_message(answers, ("guess", ""))
    while (requests := read_message(sys.stdin.buffer)) is not None:
        for index, request in enumerate(requests):
            call = request.call()
            found = Found(False, ())
            if call is not None:
                found = find_rules(
                    call,
                    begin=lambda text: write_message(answers, ("guess", text)),
                    attempt=in_fork if request.forked else lambda run: run(),
                )
            write_message(answers, ("found", index, found))
        write_message(answers, ("done",))


def in_fork(run: Callable[[], Rule | None]) -> Rule | None:
    """What ``run`` returns in a fork of this process; None if that dies, or is not done within ``FORK_LIMIT_S``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the child
            signal.alarm(FORK_LIMIT_S)
            with os.fdopen(writer, "wb") as stream:
                stream.write(pickle.dumps(run()))
        finally:
            os._exit(0)  # nothing of the parent's is finished twice
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read()
    os.waitpid(child, 0)
    try:
        found: Rule | None = pickle.loads(told)
    except (EOFError, pickle.UnpicklingError):
        return None
    return found


__all__ = ["Found", "Helper", "find_op", "serve"]
