"""Sums over processes in the background of a worker: one thread a line carries them out in the order of their start.

A group's collectives must come in one order and from one thread; so the sums that a group's workers start have a line
of their own, apart from those that the workers wait for at once, and a `Courier` with the only thread that uses it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from partita.program.instructions import AllReduce
from partita.runtime.failure import Failure, Stopped, Waiter
from partita.runtime.local import Party
from partita.runtime.transport import Line


class Task(Protocol):
    """What a courier carries out over its line."""

    @property
    def key(self) -> str: ...

    def carry_out(self, line: Line) -> None: ...


SumFn = Callable[[Sequence[Tensor], Line], list[Tensor]]  # forms sums over processes of a worker's gradients


class Courier:
    """The thread of one line. A failure of a sum is the engine's: it ends the thread and wakes whoever waits."""

    def __init__(self, line: Line, failure: Failure, name: str) -> None:
        self.line = line
        self._failure = failure
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._doing: Task | None = None
        self._thread = threading.Thread(target=self._live, name=f"partita-courier-{name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        self._tasks.put(task)

    def close(self) -> None:
        """End the thread after what was submitted."""
        self._tasks.put(None)

    def join(self, limit_s: float) -> None:
        self._thread.join(limit_s)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def doing(self) -> str:
        """What the thread is in, for messages."""
        task = self._doing
        return f"the background exchange {task.key}" if task is not None else "no background exchange"

    def _live(self) -> None:
        torch.set_grad_enabled(False)  # of this thread only
        torch.set_num_threads(1)
        while (task := self._tasks.get()) is not None:
            if self._failure.error is not None:
                return
            self._doing = task
            try:
                task.carry_out(self.line)
            except BaseException as error:
                self._failure.record(error)
                return
            self._doing = None


class BackgroundSum:
    """One sum of one worker: `start` takes the values, `finish` waits for their sums, step after step.

    The values are put together in a buffer a dtype before they are sent: whoever gave them may change them again.
    `formed` forms the sums, if they are not to be exact.
    """

    def __init__(self, collective: AllReduce, courier: Courier, party: Party, formed: SumFn | None = None) -> None:
        self.key = collective.key
        self._formed = formed
        self._specs = collective.specs
        self._courier, self._party = courier, party
        self._by_dtype: dict[torch.dtype, list[int]] = {}
        for index, spec in enumerate(self._specs):
            self._by_dtype.setdefault(spec.dtype, []).append(index)
        self._buffers: list[Tensor] = []
        self._is_over = False

    def start(self, values: Sequence[Tensor]) -> None:
        """Called in the worker's thread."""
        self._is_over = False
        self._buffers = [torch.cat([values[i].reshape(-1) for i in places]) for places in self._by_dtype.values()]
        self._courier.submit(self)

    def carry_out(self, line: Line) -> None:
        """Called in the courier's thread."""
        for buffer in self._buffers:
            if buffer.device.type == "cuda":
                torch.cuda.synchronize(buffer.device)  # the worker's stream may still fill it
            if self._formed is None:
                line.all_reduce(buffer)
        if self._formed is not None:
            sums = self._formed(self._split(), line)
            self._buffers = [torch.cat([sums[i].reshape(-1) for i in places]) for places in self._by_dtype.values()]
        self._is_over = True
        self._party.waiter.wake()

    def finish(self) -> list[Tensor]:
        """The sums, in the order of the values; called in the worker's thread.

        Raises:
            Stopped: the engine has failed, or the worker's limit passed (recorded, with what was waited for).
        """
        self._party.waiter.until(lambda: self._is_over, self._party.timeout_s, self._late)
        sums = self._split()
        self._buffers = []
        return sums

    def _split(self) -> list[Tensor]:
        """What the buffers hold, in the order of the values."""
        found: dict[int, Tensor] = {}
        for buffer, places in zip(self._buffers, self._by_dtype.values(), strict=True):
            pieces = torch.split(buffer, [self._specs[i].num_elements for i in places])
            found |= {i: piece.view(self._specs[i].shape) for i, piece in zip(places, pieces, strict=True)}
        return [found[i] for i in range(len(self._specs))]

    def _late(self) -> str:
        return (
            f"Worker {self._party.worker} must not wait longer than timeout_s={self._party.timeout_s:g} for the sum "
            f"{self.key} over processes, but it is not over; its thread is in {self._courier.doing()}. Raise timeout_s "
            "if the network needs that long."
        )


class Errand:
    """Any exchange over a courier's line, begun by one thread that may wait for it later.

    Args:
        key: what it is, for messages.
        call: does it, in the courier's thread; what it returns, `wait` gives.
        courier: who does it, in the order of the errands.
        failure: where the courier's failure is recorded.
        timeout_s: limit of `wait`.
    """

    def __init__(
        self, key: str, call: Callable[[Line], list[Tensor]], courier: Courier, failure: Failure, timeout_s: float
    ) -> None:
        self.key = key
        self.is_over = False
        self._result: list[Tensor] = []
        self._call, self._courier, self._failure, self._timeout_s = call, courier, failure, timeout_s
        self._waiter = Waiter(failure)
        courier.submit(self)

    def carry_out(self, line: Line) -> None:
        self._result = self._call(line)
        self.is_over = True
        self._waiter.wake()

    def wait(self) -> list[Tensor]:
        """Its result, when it is over.

        Raises:
            WaitTimeoutError: it was not within the limit.
            Exception: what failed it, or an errand before it.
        """
        try:
            self._waiter.until(lambda: self.is_over, self._timeout_s, self._late)
        except Stopped:
            assert self._failure.error is not None
            raise self._failure.error from None
        return self._result

    def _late(self) -> str:
        return (
            f"an exchange in the background must not take longer than timeout_s={self._timeout_s:g}, but {self.key} is "
            f"not over; its thread is in {self._courier.doing()}. Raise timeout_s if the network needs that long."
        )
