"""A step that can be undone: what it changes is copied before, and put back if it fails."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from partita.units import MIB

SHARE = 0.5  # of the memory that is free, for the copy
# Above this, a candidate makes its first step once without the updates: a step's time instead of the state's memory,
# which would otherwise be the peak of the whole job.
LARGEST_BYTES = 64 * MIB


class Snapshot:
    """The values of a model, its optimizer's state and torch's random state.

    Example:
        >>> saved = Snapshot(model, optimizer)
        >>> optimizer.step()
        >>> saved.restore()
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._state = {parameter: _copy(state) for parameter, state in optimizer.state.items()}
        self._random_state = torch.get_rng_state()

    def restore(self) -> None:
        """Put everything back; tensors of the model keep their place, those of the optimizer's state may not."""
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)
        for parameter in list(self._optimizer.state):
            del self._optimizer.state[parameter]
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = state
        torch.set_rng_state(self._random_state)


def fits(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a `Snapshot` is small, and there is memory for it, with as much to spare."""
    values = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        values += [value for value in state.values() if isinstance(value, torch.Tensor)]
    num_bytes = sum(value.numel() * value.element_size() for value in values if value.device.type == "cpu")
    return bool(num_bytes <= min(LARGEST_BYTES, SHARE * psutil.virtual_memory().available))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
