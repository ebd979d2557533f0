"""Loss scaling: gradients of float16 are computed of a loss times a scale, so that small ones do not vanish.

Gradients are divided by the scale in float32, before they are clipped and applied. A step that has a gradient of
infinity or NaN anywhere is skipped, by all workers alike. The dynamic scale is that of `torch.amp.GradScaler`
(Micikevicius et al. 2018, "Mixed precision training", 3.2): half of it after such a step, twice after `INTERVAL` steps
in a row without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

FIRST = 2.0**16
GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000
LARGEST = 2.0**127  # in float32


class LossScale:
    """The scale of a job; every process has the same.

    Args:
        kind: "dynamic", or a fixed number.
        interval: good steps in a row before a dynamic scale grows.

    Example:
        >>> scale = LossScale("dynamic")
        >>> scale.stepped(is_finite=False)
        >>> scale.value
        32768.0
    """

    def __init__(self, kind: Literal["dynamic"] | float, *, interval: int = INTERVAL) -> None:
        self.is_dynamic, self._interval = kind == "dynamic", interval
        self._num_good = 0
        # Captured steps read this very tensor, so that they need not be captured again when it changes.
        self._tensor = torch.tensor(FIRST if kind == "dynamic" else float(kind))

    @property
    def value(self) -> float:
        return float(self._tensor)

    def of(self, loss_fn: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
        """The loss times the scale, in float32."""
        tensor = self._tensor

        def scaled(model: nn.Module, batch: Any) -> Tensor:
            loss = loss_fn(model, batch)
            return loss * tensor.to(loss.device) if isinstance(loss, Tensor) and loss.dim() == 0 else loss

        return scaled

    def stepped(self, *, is_finite: bool) -> None:
        """A step was made; `is_finite`: so were all gradients."""
        if not self.is_dynamic:
            return
        self._num_good = self._num_good + 1 if is_finite else 0
        if not is_finite:
            self._tensor.mul_(BACKOFF)
        elif self._num_good == self._interval:
            self._num_good = 0
            self._tensor.mul_(GROWTH).clamp_(max=LARGEST)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value, "num_good": self._num_good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; a fixed scale stays what it is."""
        if self.is_dynamic and math.isfinite(state["scale"]):
            self._tensor.fill_(state["scale"])
            self._num_good = int(state["num_good"])
