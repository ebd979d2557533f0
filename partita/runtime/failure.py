"""Waiting that always ends: one `Failure` per engine holds the root cause and wakes whoever waits.

A worker waits only through `Waiter.until`, which returns when its condition holds, raises `Stopped` when the engine has
failed elsewhere, and records a `WaitTimeoutError` when the limit passes. The first recorded error is the root
cause; everything that fails afterwards is a consequence of it and is dropped.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from partita.errors import WaitTimeoutError

# A condition that is nearly there is polled this long before the thread parks: waking a parked thread costs about
# as much.
SPIN_TIME_S = 50e-6
LEAST_PARK_S = 50e-6


class Stopped(BaseException):
    """Ends a worker whose engine has failed elsewhere. Never reaches the user."""


@dataclass(frozen=True)
class Meanwhile:
    """What is done while a thread waits: `call` after `after_s` seconds, and again after as many as it returns (None:
    not again)."""

    after_s: float
    call: Callable[[], float | None]


class Failure:
    """The root cause of an engine's failure, once there is one.

    Example:
        >>> failure = Failure()
        >>> failure.record(ValueError("first")), failure.record(ValueError("second"))
        (True, False)
        >>> failure.error
        ValueError('first')
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []
        self.error: BaseException | None = None

    def record(self, error: BaseException) -> bool:
        """Make `error` the root cause and wake everybody; False if there is one already."""
        with self._lock:
            if self.error is not None:
                return False
            self.error = error
            wakers = tuple(self._wakers)
        for waker in wakers:
            waker()
        return True

    def on_failure(self, waker: Callable[[], None]) -> None:
        """Call `waker` once something has failed (at once if it has)."""
        with self._lock:
            self._wakers.append(waker)
            failed = self.error is not None
        if failed:
            waker()


class Waiter:
    """How one thread waits. `wake` may be called from any thread, at any time, any number of times.

    A lock that is held stands for "no wake-up pending": parking acquires it, waking releases it. That is the
    cheapest parking place Python has, several times cheaper than `threading.Event`.
    """

    def __init__(self, failure: Failure) -> None:
        self._failure = failure
        self._permit = threading.Lock()
        self._permit.acquire()
        failure.on_failure(self.wake)

    def wake(self) -> None:
        try:
            self._permit.release()
        except RuntimeError:  # a wake-up is pending already
            return

    def until(
        self,
        ready: Callable[[], bool],
        limit_s: float | None,
        describe: Callable[[], str],
        meanwhile: Meanwhile | None = None,
    ) -> None:
        """Return when `ready()`; `describe()` names, for the time-out, who waits for whom; `meanwhile` is done while
        waiting.

        Raises:
            Stopped: the engine has failed, or `limit_s` passed (recorded as the root cause, a `WaitTimeoutError`).
        """
        start_s = time.perf_counter()
        due_s = math.inf if meanwhile is None else meanwhile.after_s
        while not ready():
            if self._failure.error is not None:
                raise Stopped
            waited_s = time.perf_counter() - start_s
            if waited_s < SPIN_TIME_S:
                time.sleep(0)  # gives the interpreter's lock to the thread that is waited for
                continue
            if limit_s is not None and waited_s >= limit_s:
                self._failure.record(WaitTimeoutError(describe()))
                raise Stopped
            if meanwhile is not None and waited_s >= due_s:
                again_s = meanwhile.call()
                due_s = math.inf if again_s is None else waited_s + again_s
                continue
            left_s = min(due_s, math.inf if limit_s is None else limit_s) - waited_s
            self._permit.acquire(timeout=-1 if left_s == math.inf else max(left_s, LEAST_PARK_S))
