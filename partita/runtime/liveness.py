"""Knowing when another process of the job is gone, or has failed, and why.

Every process writes a sign of life to the job's key-value store about once a second and watches the next two ranks
(in a ring, so that the work per process does not grow with the job). Whoever finds a rank lost writes that down for
all; a process that fails writes down its root cause before it ends.

A rank is lost if its process does not exist any more (same host), or if its sign of life stands still for
`STALE_TIME_S`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partita.errors import PeerLostError, StepError
from partita.runtime.ending import END_TIME_S, tell_unended

BEAT_TIME_S = 1.0
STALE_TIME_S = 10.0
FAREWELL_TIME_S = 3.0  # a failing process lets the others read its message this long
_NUM_WATCHED = 2


class Liveness:
    """Signs of life of all processes, and the failures of sessions.

    Args:
        store: the job's key-value store; used by one background thread and, under a lock, by `report`.
        rank, num_processes: this process's place in the job.
        store_rank: rank of the process that holds the store; None if the launcher holds it.
    """

    def __init__(self, store: Any, rank: int, num_processes: int, *, store_rank: int | None) -> None:
        self.rank = rank
        self.num_processes = num_processes
        self.lost: PeerLostError | None = None
        self.activity = "starting"  # what this process is in; the others see it with the next sign of life
        self.works_alone = False  # whether others are to wait for it without a limit
        self._store = store
        self._store_lock = threading.Lock()
        self._store_rank = store_rank
        self._is_store_host = store_rank == rank
        self._store_is_gone = False
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[StepError], None]] = {}  # by session
        self._seen: set[int] = set()  # sessions whose failure has been passed on
        self._reported: set[int] = set()
        self._beats: dict[int, tuple[int, float]] = {}  # watched rank -> last beat, when it changed
        self._found = threading.Condition()
        self._ending = threading.Event()
        self._show_life(0)
        self._store_name = self._who_holds_the_store()  # asked now: once it is gone, there is nobody to ask
        self._thread = threading.Thread(target=self._live, name="partita-liveness", daemon=True)
        self._thread.start()

    def _show_life(self, beat: int) -> None:
        sign = [beat, self._host, os.getpid(), self.activity, self.works_alone]
        self._store.set(f"alive/{self.rank}", json.dumps(sign))

    def _who_holds_the_store(self) -> str:
        if self._store_rank is None:
            return "the launcher's agent"
        _, host, pid, *_ = json.loads(self._store.get(f"alive/{self._store_rank}"))  # waits until it is written
        return _named(self._store_rank, host, pid)

    # For sessions ----------------------------------------------------------------------------------------------------

    def listen(self, session: int, listener: Callable[[StepError], None]) -> None:
        with self._lock:
            self._listeners[session] = listener
            lost = self.lost
        if lost is not None:
            listener(lost)

    def forget(self, session: int) -> None:
        with self._lock:
            self._listeners.pop(session, None)

    def report(self, session: int, error: BaseException) -> None:
        """Write down why this process ends the session; wait for the others to read it, if the store ends with it."""
        known = session in self._reported or session in self._seen or isinstance(error, PeerLostError)
        if known or self._store_is_gone:
            return
        with self._found:
            self._reported.add(session)
            self._found.notify_all()  # whoever waits for others to explain it has the reason here
        text = {
            "rank": self.rank,
            "host": self._host,
            "pid": os.getpid(),
            "message": f"{type(error).__name__}: {error}",
        }
        with contextlib.suppress(RuntimeError):  # the store is gone: the others see that themselves
            with self._store_lock:
                self._store.compare_set(f"failure/{session}", "", json.dumps(text))
            deadline_s = time.monotonic() + FAREWELL_TIME_S
            while self._is_store_host and time.monotonic() < deadline_s:
                with self._store_lock:
                    if self._store.add(f"read/{session}", 0) >= self.num_processes - 1:
                        return
                time.sleep(0.05)

    def explain(self, session: int) -> bool:
        """Wait for the reason of a broken connection; whether there is one: it has been passed to the listener, or this
        process has reported it itself."""

        def is_known() -> bool:
            return self.lost is not None or session in self._seen or session in self._reported

        with self._found:
            return self._found.wait_for(is_known, STALE_TIME_S + 2 * BEAT_TIME_S)

    def last_reports(self) -> str:
        """What the other processes last reported to be in, for messages."""
        signs = self._signs_of_others()
        found = [f"{_named(rank, host, pid)} last reported: {text}" for rank, (_, host, pid, text, _) in signs.items()]
        return "; ".join(found) or "no process has reported"

    def others_work_alone(self) -> bool:
        """Whether another process last reported to be at work of its own, so that waiting for it is not in vain."""
        return any(works_alone for *_, works_alone in self._signs_of_others().values())

    def _signs_of_others(self) -> dict[int, list[Any]]:
        signs: dict[int, list[Any]] = {}
        with contextlib.suppress(RuntimeError), self._store_lock:  # the store may be gone: then less is known
            for rank in (rank for rank in range(self.num_processes) if rank != self.rank):
                if self._store.check([f"alive/{rank}"]):
                    signs[rank] = json.loads(self._store.get(f"alive/{rank}"))
        return signs

    def close(self) -> None:
        """Say goodbye. The process that holds the store waits a few seconds for the others to do so too.

        The background thread must have ended then: it may not be in a call to the store when the interpreter ends.
        """
        self._ending.set()
        self._thread.join(END_TIME_S)
        if self._thread.is_alive():  # the store keeps it waiting, and would keep this thread too
            tell_unended(f"an answer of the job's key-value store, which {self._store_name} holds", END_TIME_S)
            return
        if self._store_is_gone:
            return
        with contextlib.suppress(RuntimeError), self._store_lock:
            self._store.set(f"closed/{self.rank}", "1")
            deadline_s = time.monotonic() + FAREWELL_TIME_S
            others = [f"closed/{rank}" for rank in range(self.num_processes) if rank != self.rank]
            while self._is_store_host and self.lost is None and time.monotonic() < deadline_s:
                if self._store.check(others):
                    return
                time.sleep(0.05)

    # The background thread -------------------------------------------------------------------------------------------

    def _live(self) -> None:
        beat = 0
        while not self._ending.wait(BEAT_TIME_S):
            beat += 1
            try:
                with self._store_lock:
                    self._show_life(beat)
                    failures = self._read_failures()
                    lost = self._read_signs()
            except RuntimeError as error:
                self._store_is_gone = True
                reason = str(error).splitlines()[0]
                self._lose(f"{self._store_name} is gone: its key-value store does not answer ({reason})", tell=False)
                return
            for session, failure in failures:
                self._pass_on(session, failure)
            if lost:
                self._lose(lost, tell=True)
                return

    def _read_failures(self) -> list[tuple[int, dict[str, Any]]]:
        with self._lock:
            sessions = [s for s in self._listeners if s not in self._seen and s not in self._reported]
        found = []
        for session in [*sessions, -1]:  # -1: a lost process ends all sessions
            if self._store.check([f"failure/{session}"]):
                found.append((session, json.loads(self._store.get(f"failure/{session}"))))
                self._store.add(f"read/{session}", 1)
        return found

    def _pass_on(self, session: int, failure: dict[str, Any]) -> None:
        if session == -1:
            self._lose(failure["message"], tell=False)
            return
        with self._lock:
            listener = self._listeners.get(session)
            self._seen.add(session)
        who = _named(failure["rank"], failure["host"], failure["pid"])
        error = StepError(f"{who} failed: {failure['message']}")
        if listener is not None:
            listener(error)
        with self._found:
            self._found.notify_all()

    def _read_signs(self) -> str:
        """What is wrong with the watched ranks; "" if nothing."""
        watched = {(self.rank + step) % self.num_processes for step in range(1, _NUM_WATCHED + 1)} - {self.rank}
        for rank in sorted(watched):
            if not self._store.check([f"alive/{rank}"]):
                continue  # it has not started yet: whoever waits for it has a time limit
            beat, host, pid, *_ = json.loads(self._store.get(f"alive/{rank}"))
            name = _named(rank, host, pid)
            is_gone = host == self._host and not process_exists(pid)
            if self._store.check([f"closed/{rank}"]):  # asked last: it may say goodbye and end at any moment
                if self._listeners:
                    return f"{name} has ended while other processes still train; all must make the same steps"
                continue
            if is_gone:
                return f"{name} is gone: it was killed or has crashed"
            now_s = time.monotonic()
            last, since_s = self._beats.get(rank, (-1, now_s))
            if beat != last:
                self._beats[rank] = (beat, now_s)
            if beat == last and now_s - since_s > STALE_TIME_S:
                return f"{name} is gone: no sign of life for {now_s - since_s:.0f} s"
        return ""

    def _lose(self, message: str, *, tell: bool) -> None:
        with self._lock:
            if self.lost is not None:
                return
            self.lost = PeerLostError(message)
            listeners = list(self._listeners.values())
        if tell:
            with contextlib.suppress(RuntimeError), self._store_lock:
                text = json.dumps({"rank": self.rank, "message": message})
                self._store.compare_set("failure/-1", "", text)
        for listener in listeners:
            listener(self.lost)
        with self._found:
            self._found.notify_all()


def _named(rank: int, host: str, pid: int) -> str:
    return f"process rank {rank} (host {host}, pid {pid})"


def process_exists(pid: int) -> bool:
    """Whether a process of this host runs (one that has ended but was not collected by its parent does not)."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():  # Linux
        try:
            return stat.read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
