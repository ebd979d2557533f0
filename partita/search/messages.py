"""What the process of a trial and the search tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from partita.cluster import Cluster
from partita.search.curves import Point
from partita.search.pricing import Limits, Price

# From the search ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a trial's process is to do.

    Args:
        task_file: where the `Task` is.
        folder: of the candidate's checkpoints.
        number: of the trial, which decides random numbers together with `seed`.
        known: suggested values that are given: all of a candidate that is `resumed` from its checkpoint.
        cores: numbers of the cores that are its own.
        everywhere: all cores of the search.
        target: what the network is searched for; None: these cores.
        final_s: what the final training takes.
        final: from when to when (seconds since 1970) this is the final training; None: it explores.
        price: of the candidate on as many cores, where it is known from an earlier trial.
    """

    task_file: str
    folder: str
    number: int
    seed: int
    known: dict[str, Any]
    resumed: bool
    cores: tuple[int, ...]
    everywhere: Cluster
    target: Cluster | None
    limits: Limits
    final_s: float
    final: tuple[float, float] | None
    price: Price | None


@dataclass(frozen=True, kw_only=True)
class Suggested:
    """A suggestion's value, or why there is none."""

    value: Any = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Go:
    """Train until the candidate has been trained for `until_s` in all, which is `granted_s` from now; seconds."""

    until_s: float
    granted_s: float


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Save, and end."""


# From a trial -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Suggest:
    """A question: `SearchTrial` explains the fields."""

    kind: str
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The candidate is built and priced; it waits for `Go`. `attributes` are what `build` has noted."""

    price: Price
    batch_size: int
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A candidate that was priced roughly was priced by plans, before it trains for longer."""

    price: Price


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A point of the learning curve. `samples_per_s` and `step_time_s` are those of the last while of training;
    `best_score` is that of the candidate's best weights, which lie in its folder; `idle_cores` are those of the trial's
    cores that its plan, once it is adopted, leaves to others (in the final training)."""

    point: Point
    samples_per_s: float
    step_time_s: float
    plan: str
    num_cores: int
    best_score: float
    idle_cores: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RungEnd:
    """Trained and judged as far as it may go, and saved; it waits for `Go` or `Stop`."""

    train_s: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The process is about to end. `saved`: its checkpoint has all it has trained."""

    saved: bool


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """The candidate is not trained (on), and why."""

    reason: str
    price: Price | None = None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The user's code, or ours, has raised: the traceback."""

    error: str


FromTrial = Suggest | Ready | Priced | Judged | RungEnd | Ended | Rejected | Failed
