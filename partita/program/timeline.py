"""`Timeline`: what happened when in one training step, simulated or measured, instruction by instruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WORK = ("Run", "SumSquares", "Clip", "Update")
EXCHANGES = ("AllReduce", "ReduceScatter", "AllGather", "AllToAll", "Send", "Recv", "Start", "Await")


@dataclass(frozen=True)
class Event:
    """One executed instruction. `index` is its place in the worker's program; times are seconds from the step's
    start."""

    worker: int
    index: int
    kind: str  # class name of the instruction: "Run", "Send", ...
    label: str
    start_s: float
    end_s: float

    @property
    def time_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """Events of all workers (of this process, when measured) in one step.

    `step_time_s` spans from the start to the last worker's end. `peak_memory_bytes` is per worker what its registers
    and segments need, `step_memory_bytes` per process what those of all its workers need at one time, and
    `shared_memory_bytes` per process what outlives the step: the process needs the sum of the last two. `bytes_sent`
    counts the values in messages between processes: of all processes when simulated, of this one when measured.
    """

    events: tuple[Event, ...]
    step_time_s: float
    peak_memory_bytes: Mapping[int, int] = field(default_factory=dict)
    step_memory_bytes: Mapping[int, int] = field(default_factory=dict)
    shared_memory_bytes: Mapping[int, int] = field(default_factory=dict)
    bytes_sent: int = 0

    def of_worker(self, worker: int) -> tuple[Event, ...]:
        return tuple(event for event in self.events if event.worker == worker)

    def busy_time_s(self, worker: int) -> float:
        """Seconds that the worker spent in its own work: segments, clipping and updates."""
        return sum(event.time_s for event in self.of_worker(worker) if event.kind in WORK)

    def exposed_time_s(self, worker: int) -> float:
        """Seconds that the worker spent in exchanges with others, waiting for them included: what is not hidden behind
        its own work."""
        return sum(event.time_s for event in self.of_worker(worker) if event.kind in EXCHANGES)

    @property
    def skew(self) -> float:
        """By how much the busiest worker is busier than the mean: 0 if all do as much.

        >>> events = (Event(0, 0, "Run", "", 0.0, 3.0), Event(1, 0, "Run", "", 0.0, 1.0))
        >>> Timeline(events, 3.0).skew
        0.5
        """
        busy = [self.busy_time_s(worker) for worker in sorted({event.worker for event in self.events})]
        mean_s = sum(busy) / len(busy) if busy else 0.0
        return max(busy) / mean_s - 1 if mean_s else 0.0
