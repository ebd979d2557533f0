"""Events: what happens in a training step, told to whoever subscribed. The library itself never prints."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from partita.arguments import told
from partita.errors import InputError
from partita.plan import Plan
from partita.training.sync.choice import Choice

_LOGGER = logging.getLogger("partita")


@dataclass(frozen=True, kw_only=True)
class PlanChosen:
    """A plan was adopted. `time_s` went into capturing, planning and measuring."""

    plan: Plan
    time_s: float


@dataclass(frozen=True, kw_only=True)
class SyncChosen:
    """``sync="auto"`` has chosen a method of synchronisation; ``choice.explain()`` says why."""

    choice: Choice


@dataclass(frozen=True, kw_only=True)
class ConnectionsChanged:
    """A method that learns connections has replaced some after a step: so many have left and come."""

    step: int
    left: int
    come: int
    density: float


@dataclass(frozen=True, kw_only=True)
class CandidateMeasured:
    """A candidate plan was run for some steps. `step_time_s` is the median; `failed` says why it could not run."""

    description: str
    plan: Plan
    predicted_step_time_s: float
    step_time_s: float | None
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What is told of one training step. `step` counts from 1; `num_samples` is the number of rows of the global batch
    (0: unknown); the others are as of `StepResult`."""

    step: int
    loss: float
    step_time_s: float
    num_samples: int
    bytes_sent: int
    grad_norm: float | None = None
    compression_error: float = 0.0
    staleness: int = 0
    loss_scale: float | None = None
    skipped: bool = False
    exposed_time_s: float | None = None
    skew: float | None = None
    sent_to: Mapping[int, int] = field(default_factory=dict)

    @property
    def samples_per_s(self) -> float:
        return self.num_samples / self.step_time_s if self.step_time_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class StepFinished(StepFacts):
    """A process has made a training step."""

    process: int = 0


@dataclass(frozen=True, kw_only=True)
class WarningRaised:
    """Something works, but not as the user may expect: `message` says what, why, what it costs and what to change."""

    subject: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Checkpointed:
    """A checkpoint is complete on disk (`action` "saved"), or in memory ("copied"), or was read back ("loaded")."""

    action: str
    path: str
    step: int
    num_bytes: int
    time_s: float


@dataclass(frozen=True, kw_only=True)
class MembersChanged:
    """Other processes than before make steps from `step` on: `num_replicas` of them, this one as number `place` (None:
    it receives the others' state in that step)."""

    num_replicas: int
    place: int | None
    step: int


@dataclass(frozen=True, kw_only=True)
class SharesChanged:
    """From `step` on the rows of a batch are dealt so: to the data coordinates of the plan, or to replicas."""

    shares: tuple[int, ...]
    step: int


Event = (
    PlanChosen
    | SyncChosen
    | CandidateMeasured
    | StepFinished
    | WarningRaised
    | Checkpointed
    | MembersChanged
    | SharesChanged
    | ConnectionsChanged
)
Callback = Callable[[Event], None]


@dataclass
class _Bus:
    lock: threading.Lock = field(default_factory=threading.Lock)
    callbacks: tuple[Callback, ...] = ()


_BUS = _Bus()


def subscribe(callback: Callback) -> Callable[[], None]:
    """Call `callback(event)` for every event of this process from now on; returns the function that ends it.

    Callbacks run in the thread that emits, in the order of subscription: mostly that of the step, but a checkpoint in
    the background is told from its own. One that raises is told to the log
    "partita" and does not disturb the training step; `KeyboardInterrupt` and `SystemExit` pass.

    Example:
        >>> seen = []
        >>> unsubscribe = subscribe(seen.append)
        >>> emit(WarningRaised(subject="example", message="only an example"))
        >>> unsubscribe()
        >>> seen[0].subject
        'example'

    Raises:
        InputError: `callback` is no function.
    """
    if not callable(callback):
        raise InputError(f"callback must be a function of one event, but got {told(callback)}. Pass e.g. print.")
    with _BUS.lock:
        _BUS.callbacks = (*_BUS.callbacks, callback)

    def unsubscribe() -> None:
        with _BUS.lock:
            _BUS.callbacks = tuple(item for item in _BUS.callbacks if item is not callback)

    return unsubscribe


def is_heard() -> bool:
    """Whether somebody has subscribed: else an event need not be made."""
    return bool(_BUS.callbacks)


def emit(event: Event) -> None:
    """Tell `event` to all subscribers."""
    for callback in _BUS.callbacks:
        try:
            callback(event)
        except Exception:
            _LOGGER.exception("a subscriber failed on %s", type(event).__name__)
