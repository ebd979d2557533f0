"""Starts the processes of trials, and ends them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from partita.errors import InputError, SearchError
from partita.search.messages import FromTrial, Go, Order, Stop, Suggested
from partita.search.trial_process import main

VARIABLE = "PARTITA_SEARCH_PRELOAD"
KILLED_LIMIT_S, ENDED_LIMIT_S = 0.5, 2.0  # for a process that was killed, or has said that it ends, to be gone


class TrialProcess:
    """A trial's process, and the line to it."""

    def __init__(self, order: Order, modules: list[str]) -> None:
        context = _context()
        self.link, far = context.Pipe()
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self._process: Any = context.Process(  # type: ignore[attr-defined]
            target=main, args=(order, far, lifeline), name=f"trial-{order.number}"
        )
        with _told_to_server(modules):
            self._process.start()
        far.close()
        lifeline.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def waits_for(self) -> tuple[Connection, int]:
        """What becomes ready when the process has told something, or is gone."""
        return self.link, self._process.sentinel

    def send(self, message: Go | Stop | Suggested) -> None:
        """Tells the process something; one that is gone is noticed when it is listened to."""
        with contextlib.suppress(OSError):
            self.link.send(message)

    def receive(self) -> FromTrial | None:
        """What it has told, if anything; None if it has not.

        Raises:
            EOFError: it will not tell anything any more.
        """
        try:
            return self.link.recv() if self.link.poll() else None
        except OSError as error:
            raise EOFError from error

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended, and has nothing left to tell."""
        return self._process.exitcode is not None and not self.link.poll()

    def end(self, *, kill: bool) -> str:
        """Ends the process, and says how it went: "" as it should. One that was killed is not waited for long: there is
        a deadline, and nothing keeps it alive."""
        if kill:
            self._process.kill()
        self._process.join(KILLED_LIMIT_S if kill else ENDED_LIMIT_S)
        if self._process.exitcode is None:
            self._process.kill()
        code = self._process.exitcode
        for line in (self.link, self._lifeline):
            line.close()
        if code is None or code >= 0:
            return "" if not code else f"its process has ended with code {code}"
        reason = f"its process was killed by signal {-code}"
        return reason + (", as the system does when memory is short" if code == -9 else "")


class Server:
    """The server of trials, started in the background, so that the first trial begins as fast as all others. It imports
    the user's script, which may do anything.

    Args:
        modules: what it is to import besides partita.
    """

    def __init__(self, modules: list[str]) -> None:
        self._modules = modules
        self._error: BaseException | None = None
        self._starter = threading.Thread(target=self._start, name="server-of-trials", daemon=True)
        self._starter.start()

    def _start(self) -> None:
        try:
            first: Any = _context().Process(target=_nothing, name="warm-up")  # type: ignore[attr-defined]
            with _told_to_server(self._modules):
                first.start()
            first.join()
            if first.exitcode:
                raise SearchError(
                    "the modules of the functions given must be imported by other processes, but one that did so has "
                    f"ended with code {first.exitcode}; what it wrote to standard error says why"
                )
        except BaseException as error:
            self._error = error

    def trial(self, order: Order) -> TrialProcess:
        """Starts a trial."""
        return TrialProcess(order, self._modules)

    def is_ready(self, limit_s: float) -> bool:
        """Whether it has started, for which it has so long.

        Raises:
            SearchError: it cannot.
        """
        self._starter.join(max(0.0, limit_s))
        if self._error is not None:
            raise self._error
        return not self._starter.is_alive()


def _nothing() -> None:
    pass


@dataclass
class _Role:
    is_server: bool = False


role = _Role()  # of this process: the server sets it, and trials inherit it


def _context() -> BaseContext:
    """Trials are forked from a server that has imported everything, where there is one (not on Windows). What it
    imports is decided when the first trial of this process is started."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["partita.search.preload"])
    return context


@contextlib.contextmanager
def _told_to_server(modules: list[str]) -> Iterator[None]:
    """What the server is to import is in the environment while it may be started."""
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None) if main.__spec__ is None else None
    wish = {"path": sys.path, "main": os.path.abspath(script) if script else None, "modules": modules}
    os.environ[VARIABLE] = json.dumps(wish)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def refuse_nested() -> None:
    """Raises InputError in the process of a trial, and in the server: the user's script is only imported there."""
    if role.is_server or multiprocessing.parent_process() is not None:
        raise InputError(
            "partita.search was called while a trial imports the script. Put the call under "
            '`if __name__ == "__main__":`, so that the script can be imported without searching'
        )
