"""A prepared step, and the choice of a peer's best settings by measurement."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import first_line, median

StepFn = Callable[[Any], float]
NUM_WARM_UP_STEPS = 2
TRIAL_S = 0.5  # of steps with one setting


class NotRaced(RuntimeError):
    """The peer cannot take part in this pair by its nature, such as a model of which it has no twin."""


@dataclass(frozen=True)
class Variant:
    """A peer's step under one choice of settings; `build` may share models with other variants."""

    name: str
    build: Callable[[], StepFn]


@dataclass
class Prepared:
    """A step that is ready in this process.

    Attributes:
        first_loss: of the first step on the first batch, from the initial weights.
        plan: settings or plan in words.
        trials_s: seconds a step of each setting that was tried, or why it does not work.
    """

    step: StepFn
    stream: Iterator[Any]
    first_loss: float
    plan: str
    trials_s: dict[str, float | str] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


def alone(value: float) -> float:
    """What the processes of a job agree on where there is one process."""
    return value


def fastest(
    variants: Sequence[Variant], batches: Sequence[Any], *, agree: Callable[[float], float] = alone, label: str = ""
) -> Prepared:
    """Step with every variant and keep the one with the least median step time.

    Args:
        agree: the largest of the values that all processes of the job call it with; they must choose alike.
        label: put before the name of the chosen variant.

    Raises:
        RuntimeError: no variant works; the message has the reasons.
    """
    trials_s: dict[str, float | str] = {}
    chosen: tuple[float, str, StepFn] | None = None
    first_loss: float | None = None
    for variant in variants:
        try:
            step, loss, time_s = _tried(variant, batches, agree)
        except Exception as error:  # a setting that a model does not bear; the others decide
            trials_s[variant.name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        first_loss = loss if first_loss is None else first_loss
        trials_s[variant.name] = time_s
        if chosen is None or time_s < chosen[0]:
            chosen = (time_s, variant.name, step)
    if chosen is None or first_loss is None:
        raise RuntimeError(f"one of the settings must work, but none does: {trials_s}")
    return Prepared(chosen[2], itertools.cycle(batches), first_loss, f"{label}{chosen[1]}", trials_s)


def _tried(variant: Variant, batches: Sequence[Any], agree: Callable[[float], float]) -> tuple[StepFn, float, float]:
    """The step, its first loss and its median time."""
    step = variant.build()
    stream = itertools.cycle(batches)
    losses = [step(next(stream)) for _ in range(NUM_WARM_UP_STEPS)]
    once_s = agree(_timed(step, next(stream)))
    num_steps = max(3, min(100, round(TRIAL_S / once_s)))
    return step, losses[0], agree(median([_timed(step, next(stream)) for _ in range(num_steps)]))


def _timed(step: StepFn, batch: Any) -> float:
    start_s = time.perf_counter()
    step(batch)
    return time.perf_counter() - start_s
