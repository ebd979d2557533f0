"""The contract of runners: one model with its optimizer, one way to run its training step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from partita.program import Timeline
from partita.training.averages import average_updated
from partita.training.inputs import BatchLeaves
from partita.training.optimizers import by_fused_kernels, fused_agrees

LossFn = Callable[[nn.Module, Any], torch.Tensor]
Due = Callable[[dict[str, torch.Tensor], float], list[dict[str, torch.Tensor]]]  # from gradients and the loss


@dataclass(slots=True)  # one is made in every step: a frozen one takes a microsecond more
class Outcome:
    """What one step gave. `bytes_sent` counts messages of this process to others; `norm` is that of all gradients
    before they were clipped, where they are; `error` as of `Sums`."""

    loss: float
    bytes_sent: int = 0
    timeline: Timeline | None = None
    norm: float | None = None
    error: float = 0.0
    sent_to: Mapping[int, int] = field(default_factory=dict)  # bytes, by receiving process

    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and (self.norm is None or math.isfinite(self.norm))


class Runner(Protocol):
    """One way to run a training step."""

    def step(
        self,
        batch: Any,
        leaves: BatchLeaves,
        *,
        update: bool = True,
        accumulate_only: bool = False,
        continues: bool = True,
        record: bool = False,
        finite_only: bool = False,
    ) -> Outcome:
        """Runs one step on the global batch; without `update` neither parameters nor buffers change, with
        `accumulate_only` its gradients are added to those of the next step instead of being applied; without
        `continues` what was accumulated before is dropped. With `finite_only` no parameter changes if the loss is NaN
        or infinite."""
        ...

    def collect(self) -> None:
        """Brings state and weights into the user's optimizer and model."""
        ...

    def load_state(self) -> None:
        """Takes the optimizer's state from the user's optimizer."""
        ...

    def sync_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the method of synchronisation keeps from step to step, by sum."""
        ...

    def load_sync(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Goes on from the states of sums that this runner has as well."""
        ...

    def close(self) -> None:
        """Ends threads and frees what the runner holds."""
        ...


def apply_due(
    due: Due,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    loss: float,
    decay: float | None = None,
) -> None:
    """Takes the gradients that the parameters have, and applies those that are due instead."""
    made = {name: item.grad for name, item in parameters.items() if item.grad is not None}
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        found = due(made, loss)
    for gradients in found:
        apply_gradients(optimizer, parameters, gradients, decay)


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, torch.Tensor],
    decay: float | None = None,
) -> None:
    """One step of the optimizer, by its fused kernels if it has some that agree, with these gradients; and of the
    average of the weights, if there is one."""
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.to(parameters[name].dtype)
    with by_fused_kernels(optimizer) if fused_agrees(optimizer) else contextlib.nullcontext():
        optimizer.step()
    if decay is not None:
        average_updated(optimizer, decay)
    optimizer.zero_grad(set_to_none=True)
