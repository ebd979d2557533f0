"""Meetings and channels: how the workers of one process exchange values through shared memory, without copying.

A `Meeting` is the set of local workers that execute collectives of one key. Each round, every member brings a value and
sees the values of all; what is summed or copied out of them is up to the caller. A `Channel` hands values
from one worker to another, in order. Both may be used any number of times, in one step or in many.

Values are handed over by reference: nobody may change a value in place after bringing it (see `binding`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from partita.runtime.cores import HELP_AFTER_S, Crew
from partita.runtime.failure import Meanwhile, Waiter


class Party:
    """One worker as others see it: how it waits, and what it is doing (for messages)."""

    def __init__(self, worker: int, waiter: Waiter, timeout_s: float | None, crew: Crew | None = None) -> None:
        self.worker = worker
        self.waiter = waiter
        self.timeout_s = timeout_s
        self._crew = crew if crew is not None and crew.can_help else None
        self.labels: tuple[str, ...] = ()  # of the program's instructions
        self.position = -1  # index of the instruction that it executes; -1 between steps

    def doing(self) -> str:
        if not 0 <= self.position < len(self.labels):
            return f"worker {self.worker} is not in a step"
        return f"worker {self.worker} is at instruction {self.position} ({self.labels[self.position]})"

    def wait(self, ready: Callable[[], bool], for_whom: Callable[[], Sequence[Party]]) -> None:
        """Wait with this worker's limit; the time-out's message says what those waited for are doing."""

        def describe() -> str:
            missing = for_whom()
            here = self.labels[self.position] if 0 <= self.position < len(self.labels) else "the step's end"
            names = ", ".join(str(party.worker) for party in missing)
            return (
                f"Worker {self.worker} must not wait longer than timeout_s={self.timeout_s:g} in instruction "
                f"{self.position} ({here}), but worker(s) {names} did not come: "
                f"{'; '.join(party.doing() for party in missing)}. "
                f"Raise timeout_s if that instruction takes long on purpose."
            )

        crew = self._crew
        if crew is None:
            self.waiter.until(ready, self.timeout_s, describe)
            return

        def help() -> None:
            crew.help([party.worker for party in for_whom()])

        self.waiter.until(ready, self.timeout_s, describe, Meanwhile(HELP_AFTER_S, help))


class _Round:
    def __init__(self, num_members: int) -> None:
        self.values: list[Any] = [None] * num_members
        self.present: list[bool] = [False] * num_members
        self.num_arrived = 0
        self.num_left = 0


class Meeting:
    """Local workers that exchange values, round by round.

    Example (run by every member): ``values = meeting.bring(member, value); ...; meeting.leave(member)``.
    """

    def __init__(self, members: Sequence[Party]) -> None:
        self.members = tuple(members)
        self._lock = threading.Lock()
        self._rounds: dict[int, _Round] = {}
        self._next = [0] * len(self.members)  # per member: the round that it enters next

    def bring(self, member: int, value: Any) -> list[Any]:
        """Bring `value` to this member's next round, wait for all members; return the values in the members' order."""
        index = self._next[member]
        self._next[member] = index + 1
        num_members = len(self.members)
        with self._lock:
            current = self._rounds.get(index)
            if current is None:
                current = self._rounds[index] = _Round(num_members)
            current.values[member] = value
            current.present[member] = True
            current.num_arrived += 1
            complete = current.num_arrived == num_members
        if complete:
            for party in self.members:
                party.waiter.wake()
        else:
            here = current
            self.members[member].wait(
                lambda: here.num_arrived == num_members,
                lambda: [party for party, present in zip(self.members, here.present, strict=True) if not present],
            )
        return current.values

    def leave(self, member: int) -> None:
        """Say that this member has read what it needs; the last one to leave lets go of the values."""
        index = self._next[member] - 1
        with self._lock:
            current = self._rounds[index]
            current.num_left += 1
            if current.num_left == len(self.members):
                del self._rounds[index]

    def gather(self, member: int, value: Any) -> list[Any]:
        """`bring` and `leave`: for callers that hold on to the returned list as long as they need it."""
        values = self.bring(member, value)
        self.leave(member)
        return values


class Channel:
    """Hands values of one key from one worker to another, in order, without waiting for the receiver."""

    def __init__(self, sender: Party, receiver: Party) -> None:
        self.sender = sender
        self.receiver = receiver
        self._values: deque[Any] = deque()

    def put(self, value: Any) -> None:
        self._values.append(value)
        self.receiver.waiter.wake()

    def take(self) -> Any:
        values = self._values
        if not values:
            self.receiver.wait(lambda: bool(values), lambda: (self.sender,))
        return values.popleft()
