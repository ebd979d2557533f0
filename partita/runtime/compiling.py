"""Compiling segments: on disk across runs, and in the background while steps run.

What was compiled is kept in a folder of Inductor's own cache, in a file named by the hash of all that it depends on:
the graph op by op, the layouts of its inputs, device, number of threads, torch, the processor and the compiler. The
file begins with the whole of that text, which must be equal when it is read.

In the background, segments are compiled by processes of slightly lower priority (`os.nice`): compiling is mostly
Python, and a thread of this process would hold the interpreter's lock against the steps. This process only loads the
results. What compiling takes from the steps is its processor time, soon or late; what it gains depends on how soon it
ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import platform
import queue
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import fx

from partita.cluster.hardware import cpu_name
from partita.files import replacing
from partita.runtime import block_products, products
from partita.runtime.ending import Order, close_at_end
from partita.runtime.portable import Entry, NotPortableError, from_entries, to_entries
from partita.runtime.torch_adapter import (
    Compiled,
    Layout,
    compile_graph,
    compiler_cache_dir,
    load_compiled,
)
from partita.units import fingerprint

FORMAT = 1  # of the files; another number leaves old ones alone
NICENESS = 2  # two fifths of a core that a step wants as well
MAX_HELPERS = 4
END_TIME_S = 2.0
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Request:
    """A graph to compile, as plain data."""

    entries: tuple[Entry, ...]
    layouts: tuple[Layout, ...]
    device: torch.device
    num_threads: int

    @classmethod
    def of(
        cls, module: fx.GraphModule, layouts: Sequence[Layout], *, device: torch.device, num_threads: int
    ) -> Request:
        """Raises `NotPortableError` for graphs that only this process can compile."""
        exact = tuple((tuple(shape), tuple(strides), dtype) for shape, strides, dtype in layouts)
        return cls(to_entries(module.graph), exact, device, num_threads)

    @property
    def text(self) -> str:
        """Canonical: everything that the compiled code depends on."""
        lines = [*_surroundings(), f"{self.device} {self.num_threads}", *map(repr, self.layouts)]
        return "\n".join([*lines, *map(repr, self.entries), ""])

    def compile(self) -> Compiled:
        return compile_graph(from_entries(self.entries), self.layouts, device=self.device, num_threads=self.num_threads)


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """What else compiled code depends on."""
    return (
        f"format {FORMAT}",
        f"torch {torch.__version__} {torch.version.git_version}",
        f"{platform.machine()} {cpu_name(Path('/'))} {torch.backends.cpu.get_cpu_capability()}",
        f"compiler {os.environ.get('CXX', '')}",
        f"products {products.CODE} {block_products.CODE}",
    )


# On disk -------------------------------------------------------------------------------------------------------------


def kept_path(request: Request) -> Path:
    """Where the request's compiled code is kept."""
    return Path(compiler_cache_dir()) / "partita" / f"{fingerprint([request.text])}.bin"


def load_kept(request: Request) -> Compiled | None:
    """The compiled code of an equal request, of this run or an earlier one; None if there is none that can be read."""
    try:
        with kept_path(request).open("rb") as stream:
            if _read(stream) != request.text.encode():
                return None
            content = _read(stream)
    except (OSError, EOFError, struct.error, MemoryError, OverflowError):
        return None
    with tempfile.TemporaryDirectory(prefix="partita-") as folder:
        path = Path(folder) / "artifact"
        path.write_bytes(content)
        try:
            return load_compiled(str(path))
        except Exception:  # damaged, or what it refers to is gone: it is compiled again
            return None


def keep(request: Request, compiled: Compiled) -> None:
    """Write the compiled code to disk, atomically. Raises OSError where that cannot be."""
    path = kept_path(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        artifact = new.with_name("artifact")
        compiled.save(str(artifact))
        with new.open("wb") as stream:
            _write(stream, request.text.encode())
            _write(stream, artifact.read_bytes())


def compile_or_load(
    module: fx.GraphModule, layouts: Sequence[Layout], *, device: torch.device, num_threads: int
) -> Compiled:
    """The compiled graph, from disk if it was compiled before."""
    try:
        request = Request.of(module, layouts, device=device, num_threads=num_threads)
    except NotPortableError:
        return compile_graph(module, layouts, device=device, num_threads=num_threads)
    found = load_kept(request)
    if found is not None:
        return found
    compiled = request.compile()
    with contextlib.suppress(OSError):  # a full or read-only disk: it is compiled again next time
        keep(request, compiled)
    return compiled


# In the background ---------------------------------------------------------------------------------------------------


class BackgroundError(RuntimeError):
    """A segment could not be compiled in the background; the message is that of the compiler."""


class Background:
    """Compiles segments while this process does something else.

    Args:
        num_helpers: processes that compile; default: one a core that this process may use, up to `MAX_HELPERS`.

    Example:
        >>> with Background() as background:
        ...     future = background.submit(request)
        ...     future.done()
        False
    """

    def __init__(self, num_helpers: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._most = num_helpers if num_helpers is not None else max(1, min(cores, MAX_HELPERS))
        self._waiting: queue.SimpleQueue[tuple[Request, Future[Compiled]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._closed = False
        close_at_end(self, Order.WORKERS)

    def submit(self, request: Request) -> Future[Compiled]:
        """The compiled code in time; `BackgroundError` if the compiler fails, `CancelledError` after `close`."""
        future: Future[Compiled] = Future()
        self._waiting.put((request, future))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name="partita compiling", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Give up what is not compiled yet."""
        with self._lock:
            self._closed = True
            for helper in self._helpers:
                helper.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._waiting.get_nowait()
                if item is not None:
                    item[1].cancel()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(END_TIME_S)

    def at_end(self) -> None:
        self.close()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        """One thread: asks its helper for one segment after the other, until `close`."""
        helper: subprocess.Popen[bytes] | None = None
        while (item := self._waiting.get()) is not None:
            request, future = item
            try:
                found = load_kept(request)
                if found is None:
                    helper = helper or self._start()
                    found = self._ask(helper, request)
                future.set_result(found)
            except BaseException as error:  # whatever it is, the waiting side must hear of it
                self._end(helper)
                helper = None
                if self._closed:
                    future.cancel()
                else:
                    future.set_exception(error)
        self._end(helper)

    def _start(self) -> subprocess.Popen[bytes]:
        own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        with self._lock:
            if self._closed:
                raise BackgroundError("compiling was ended")
            helper = subprocess.Popen(
                [sys.executable, "-m", "partita.runtime.compiling", str(NICENESS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **own, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
            self._helpers.append(helper)
        return helper

    def _end(self, helper: subprocess.Popen[bytes] | None) -> None:
        if helper is None:
            return
        with self._lock:
            self._helpers.remove(helper)
        helper.kill()
        helper.wait()
        for stream in (helper.stdin, helper.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    @staticmethod
    def _ask(helper: subprocess.Popen[bytes], request: Request) -> Compiled:
        assert helper.stdin is not None and helper.stdout is not None
        try:
            _write(helper.stdin, pickle.dumps(request))
            reason = _read(helper.stdout).decode()
        except (OSError, EOFError) as error:
            raise BackgroundError(f"the compiling process ended with {helper.poll()}") from error
        if reason:
            raise BackgroundError(reason)
        found = load_kept(request)
        if found is None:
            raise BackgroundError(f"what was compiled could not be read back from {kept_path(request)}")
        return found


def _read(stream: BinaryIO | Any) -> bytes:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    content: bytes = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content


def _write(stream: BinaryIO | Any, content: bytes) -> None:
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def serve(reading: BinaryIO, writing: BinaryIO, compiler: Callable[[Request], None]) -> None:
    """The helper's loop: for every request an empty answer when it is kept on disk, else why not."""
    while True:
        try:
            request = pickle.loads(_read(reading))
        except EOFError:
            return
        try:
            compiler(request)
            reason = ""
        except Exception as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            reason = f"{type(error).__name__}: {lines[0]}"
        _write(writing, reason.encode())


def _compile_and_keep(request: Request) -> None:
    if not kept_path(request).exists() or load_kept(request) is None:
        keep(request, request.compile())


def main() -> None:
    """A helper process: its own output must not mix with the answers."""
    if hasattr(os, "nice"):
        os.nice(int(sys.argv[1]))
    torch.set_num_threads(1)
    writing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, writing, _compile_and_keep)


if __name__ == "__main__":
    main()
