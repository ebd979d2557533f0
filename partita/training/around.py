"""A step around another one, which makes the computing: what both kinds of it have in common."""

from __future__ import annotations

from torch import nn

from partita.plan import Plan
from partita.program.timeline import Timeline
from partita.training.step import Step


class StepAround(Step):
    """Hands on to `_inner`, the step of this process alone or of all, what concerns its plan and its average."""

    _inner: Step

    @property
    def plan(self) -> Plan:
        """That of this process."""
        return self._inner.plan

    @property
    def is_settled(self) -> bool:
        return self._inner.is_settled

    def timeline(self) -> Timeline | None:
        return self._inner.timeline()

    def ema_to(self, model: nn.Module) -> None:
        """Copies the average of this process' weights into `model`."""
        self._inner.ema_to(model)
