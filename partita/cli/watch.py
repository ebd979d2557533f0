"""What people and programs see of a running script: progress on the terminal, lines elsewhere, metrics in files.

Everything here subscribes to the library's events. Shown and written by the first process of a job alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import msgspec

from partita.planner.describe import title
from partita.training.events import (
    CandidateMeasured,
    Checkpointed,
    ConnectionsChanged,
    Event,
    MembersChanged,
    PlanChosen,
    SharesChanged,
    StepFinished,
    SyncChosen,
    WarningRaised,
    subscribe,
)
from partita.units import format_bytes, format_time

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Watcher(Protocol):
    """Takes every event of this process until it is closed."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


def describe(event: Event) -> str:
    """One line about an event."""
    match event:
        case PlanChosen():
            return f"plan: {title(event.plan)} (found in {format_time(event.time_s)})"
        case SyncChosen():
            return f"synchronisation: {event.choice.method.name}: {event.choice.reason}"
        case CandidateMeasured() if event.step_time_s is None:
            return f"candidate: {event.description}: could not run: {event.failed}"
        case CandidateMeasured():
            assert event.step_time_s is not None
            return (
                f"candidate: {event.description}: predicted {format_time(event.predicted_step_time_s)}, "
                f"measured {format_time(event.step_time_s)}"
            )
        case StepFinished():
            return (
                f"step {event.step}  loss {event.loss:.4g}  {event.samples_per_s:.1f} samples/s  "
                f"{format_time(event.step_time_s)} a step"
                + (f"  {format_bytes(event.bytes_sent)} sent{_by_link(event.sent_to)}" if event.bytes_sent else "")
                + (f"  norm {event.grad_norm:.3g}" if event.grad_norm is not None else "")
                + (f"  {event.compression_error:.0%} not sent" if event.compression_error else "")
                + (f"  {event.staleness} late" if event.staleness else "")
                + (f"  scale {event.loss_scale:g}" if event.loss_scale is not None else "")
                + ("  skipped" if event.skipped else "")
                + (f"  {format_time(event.exposed_time_s)} waiting" if event.exposed_time_s else "")
                + (f"  skew {event.skew:.0%}" if event.skew else "")
            )
        case WarningRaised():
            return f"warning: {event.subject}: {event.message}"
        case MembersChanged():
            place = "receives the state" if event.place is None else f"is number {event.place}"
            return f"members: {event.num_replicas} from step {event.step} on; this process {place}"
        case SharesChanged():
            return f"rows: {', '.join(map(str, event.shares))} from step {event.step} on"
        case ConnectionsChanged():
            there = f"{event.density:.1%} are there"
            return f"connections: {event.left} left, {event.come} came after step {event.step}, {there}"
        case Checkpointed():
            return f"checkpoint {event.action}: {event.path}, step {event.step}, {format_bytes(event.num_bytes)}"


def _by_link(sent_to: Mapping[int, int]) -> str:
    """Where bytes go to, where that is more than one process."""
    if len(sent_to) < 2:
        return ""
    return f" ({', '.join(f'{format_bytes(num)} to {process}' for process, num in sorted(sent_to.items()))})"


class Lines:
    """One line per event, but of steps only the first and then one per `interval_s`."""

    def __init__(self, stream: TextIO, *, interval_s: float) -> None:
        self._stream, self._interval_s = stream, interval_s
        self._next_s = 0.0
        self._unsaid: StepFinished | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            if time.monotonic() < self._next_s:
                self._unsaid = event
                return
            self._next_s = time.monotonic() + self._interval_s
            self._unsaid = None
        print(describe(event), file=self._stream, flush=True)

    def close(self) -> None:
        if self._unsaid is not None:  # the last step always shows
            print(describe(self._unsaid), file=self._stream, flush=True)
            self._unsaid = None


class Live:
    """A line at the bottom of the terminal that follows the steps; other events scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress: Progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task: TaskID = self._progress.add_task("capturing and planning", total=None)
        self._progress.start()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            self._progress.update(self._task, description=describe(event))
        else:
            self._progress.console.print(describe(event), markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class Metrics:
    """Every event as one line of JSON, written out at once, so that a crash loses nothing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        self._stream.write(record(event) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def record(event: Event) -> str:
    """An event as one JSON object: its fields, `event` (its kind, e.g. "step_finished") and `time_unix_s`."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    if isinstance(event, SyncChosen):
        return _encoded(kind, event.choice.as_dict())
    fields: dict[str, Any] = msgspec.to_builtins(event)
    if isinstance(event, StepFinished):
        fields["samples_per_s"] = event.samples_per_s
    return _encoded(kind, fields)


def _encoded(kind: str, fields: Mapping[str, Any]) -> str:
    return msgspec.json.encode({"event": kind, "time_unix_s": time.time(), **fields}).decode()


# What not every step has.
_OF_METHODS = ("grad_norm", "compression_error", "staleness", "loss_scale", "exposed_time_s", "skew")


class Board:
    """Loss, speed and what is sent, for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            for name in ("loss", "samples_per_s", "step_time_s", "bytes_sent", *_OF_METHODS):
                value = getattr(event, name)
                if value is not None and (value or name not in _OF_METHODS):
                    self._writer.add_scalar(name, value, event.step)
            for process, num_bytes in event.sent_to.items():
                self._writer.add_scalar(f"sent_to/{process}", num_bytes, event.step)

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def watching(name: str, folder: Path, *, interval_s: float, quiet: bool = False) -> Iterator[Path]:
    """Show and keep all events inside; yields the path of the metrics, ``folder/name-<time>.jsonl``.

    With `tensorboard` installed, the same run is written beside it as a folder of that name.
    """
    stem = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = _unused(stem)
    watchers: list[Watcher] = [Metrics(path)]
    if importlib.util.find_spec("tensorboard") is not None:
        watchers.append(Board(path.with_suffix("")))
    if not quiet:
        watchers.append(Live() if sys.stderr.isatty() else Lines(sys.stderr, interval_s=interval_s))
    unsubscribe = [subscribe(watcher) for watcher in watchers]
    try:
        yield path
    finally:
        for end in unsubscribe:
            end()
        for watcher in watchers:
            watcher.close()


def _unused(stem: Path) -> Path:
    """`stem`.jsonl, or with a number if two runs start in one second."""
    path, number = stem.with_name(stem.name + ".jsonl"), 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}.jsonl")
    return path
