"""What ``sync="auto"`` decides: which method reaches a loss soonest, by estimates of time and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from partita.training.sync.exact import Exact
from partita.training.sync.method import GradientMethod
from partita.training.sync.outer import DiLoCo, LocalSGD, StreamingDiLoCo
from partita.training.sync.powersgd import PowerSGD
from partita.training.sync.replica import ReplicaMethod
from partita.training.sync.rounded import Rounded
from partita.training.sync.steps import steps_factor
from partita.units import format_bytes, format_time

Tolerance = Literal["exact", "equivalent-loss"]
TOLERANCES: tuple[Tolerance, ...] = ("exact", "equivalent-loss")
BONUS = 0.05  # what promises to be faster by less than this is not worth being farther from exact training


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of training by a method: seconds and bytes (of all processes) of a step, and how many times as many steps it
    needs as exact training for the same loss."""

    method: GradientMethod | ReplicaMethod
    plan: str
    step_time_s: float
    sent_bytes: float
    steps_factor: float

    @property
    def time_to_loss_s(self) -> float:
        """Seconds, in which exact training makes the progress of one step."""
        return self.step_time_s * self.steps_factor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which method was chosen and why; `estimates` are of all that came into question, the
    method's first, the others by their time."""

    tolerance: Tolerance
    estimates: tuple[Estimate, ...]
    reason: str

    @property
    def method(self) -> GradientMethod | ReplicaMethod:
        return self.estimates[0].method if self.estimates else Exact()

    def as_dict(self) -> dict[str, Any]:
        """As plain data; methods as of `brief`."""
        rows = [{**dataclasses.asdict(one), "method": brief(one.method)} for one in self.estimates]
        return {
            "method": brief(self.method), "reason": self.reason, "tolerance": self.tolerance, "estimates": rows,
        }  # fmt: skip

    def explain(self) -> str:
        """A table of the estimates, and the reason.

        Example:
            >>> print(step.choice.explain())                                                   # doctest: +SKIP
        """
        lines = [f"{brief(self.method)}: {self.reason}"]
        for one in self.estimates:
            lines.append(
                f"  {format_time(one.time_to_loss_s):>10} = {format_time(one.step_time_s):>10} x {one.steps_factor:.2f}"
                f"   {format_bytes(one.sent_bytes):>10} a step   {brief(one.method)}, {one.plan}"
            )
        return "\n".join(lines)


def brief(method: object) -> str:
    """A method with the settings that are not the default ones.

    Example:
        >>> brief(DiLoCo(every=50, compress=Rounded(to="int4")))
        "DiLoCo(every=50, compress=Rounded(to='int4'))"
    """
    if not dataclasses.is_dataclass(method):
        return repr(method)
    settings = []
    for item in dataclasses.fields(method):
        value = getattr(method, item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if value != default:
            settings.append(f"{item.name}={brief(value)}")
    return f"{type(method).__name__}({', '.join(settings)})"


def candidates(
    optimizer: torch.optim.Optimizer, num_processes: int, *, replicas: bool
) -> list[GradientMethod | ReplicaMethod]:
    """What ``tolerance="equivalent-loss"`` chooses from: methods for which there is a rule, with settings
    about two apart."""
    int4 = Rounded(to="int4")
    found: list[GradientMethod | ReplicaMethod] = [
        Exact(),
        Rounded(to="bf16"),
        Rounded(to="int8"),
        int4,
        PowerSGD(rank=4),
    ]
    if replicas:
        found += [LocalSGD(every=5, compress=compress) for compress in (Exact(), int4)]
        found += [DiLoCo(every=every, compress=compress) for every in (10, 20, 50) for compress in (Exact(), int4)]
        found += [StreamingDiLoCo(every=every, fragments=4, delay=2) for every in (20, 50)]
    return [method for method in found if steps_factor(method, num_processes, optimizer) is not None]


def decide(estimates: Sequence[Estimate], tolerance: Tolerance) -> Choice:
    """The choice among estimates, one of them of exact training: who reaches a loss first; but of those that are at
    most `BONUS` behind, exact training, or else the one whose processes agree most often."""
    least_s = min(one.time_to_loss_s for one in estimates)
    near = [one for one in estimates if one.time_to_loss_s * (1 - BONUS) <= least_s]
    best = min(near, key=lambda one: (_steps_apart(one.method), one.time_to_loss_s))
    ranked = [best, *sorted((one for one in estimates if one is not best), key=lambda one: one.time_to_loss_s)]
    exact_s = next(one.time_to_loss_s for one in estimates if isinstance(one.method, Exact))
    if isinstance(best.method, Exact):
        reason = f"nothing else is predicted to reach a loss sooner by more than {BONUS:.0%}"
    else:
        reason = (
            f"predicted to reach a loss in {best.time_to_loss_s / exact_s:.0%} of the time of exact training: "
            f"{format_time(best.step_time_s)} a step, but {best.steps_factor:.2f} times as many steps"
        )
    return Choice(tolerance=tolerance, estimates=tuple(ranked), reason=reason)


def _steps_apart(method: GradientMethod | ReplicaMethod) -> int:
    """Steps after which processes agree on what exact training would have done; 0: they do it."""
    return 0 if isinstance(method, Exact) else int(getattr(method, "every", 1))
