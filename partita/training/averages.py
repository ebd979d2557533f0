"""An exponential moving average of the weights, kept where the optimizer keeps its state.

avg <- decay avg + (1 - decay) x after every update (Polyak and Juditsky 1992; as of
`torch.optim.swa_utils.get_ema_multi_avg_fn`); the first update's weights begin it. As an entry of the optimizer's
state it is cut, handed over, saved and loaded with it, and updated by the worker that has just updated the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ENTRY = "ema"  # in the state of a parameter


class Average:
    """The average of some parameters of an optimizer, all of which it has updated."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], decay: float) -> None:
        self._decay = decay
        states = [optimizer.state[parameter] for parameter in parameters]
        known = [ENTRY in state for state in states]
        for parameter, state, is_known in zip(parameters, states, known, strict=True):
            if not is_known:
                state[ENTRY] = parameter.detach().clone()
        self._values = [parameter.detach() for parameter in parameters]
        self._averages: list[Tensor] = [state[ENTRY] for state in states]
        self._is_new = not any(known)

    def __call__(self) -> None:
        """The parameters were updated once more."""
        if self._is_new:  # it began with these weights
            self._is_new = False
        elif self._values:
            torch._foreach_lerp_(self._averages, self._values, 1 - self._decay)


def average_updated(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """The parameters that have gradients were updated once more, each as a whole."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            updated = [item for item in group["params"] if item.grad is not None]
            for known in (False, True):
                own = [item for item in updated if (ENTRY in optimizer.state.get(item, {})) is known]
                if own:
                    Average(optimizer, own, decay)()


def averaged(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's state with averages in the place of the weights that have one."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        average = optimizer.state[value].get(ENTRY) if value in optimizer.state else None
        found[name] = value.detach() if average is None else average
    return found
