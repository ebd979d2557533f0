"""Weights of bfloat16 or float16 whose updates are made on float32 copies of them, the masters.

    m <- optimizer(m, float32 gradient);  w <- round(m)      (Micikevicius et al. 2018, "Mixed precision training", 3.1)

A weight of 8 bits of mantissa does not change at all when an update is below 1/512 of it; its master does. A master is
an entry of the parameter's state in the optimizer, as wide as the rest of that state then is: it is cut, handed over,
saved and loaded with it, and kept by the worker that updates the slice.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partita.training.averages import average_updated
from partita.training.torch_adapter import clone_optimizer, options_of

ENTRY = "master"  # in the state of a parameter
HALF = (torch.bfloat16, torch.float16)


def new_master(weight: Tensor) -> nn.Parameter:
    """A master of a weight, or of a part of it, in its shape."""
    return nn.Parameter(weight.detach().to(torch.float32, copy=True))


def widened(state: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """A state that was kept in the weight's own type, as one of a master."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype == weight.dtype else value
        for name, value in state.items()
    }


def take_master(master: nn.Parameter, weight: Tensor, state: dict[str, Any]) -> None:
    """Goes on from the master in `state`, which then shares its storage; from the weight itself where there is none, or
    one of another weight (the user has changed it, or trained without masters in between)."""
    known = state.get(ENTRY)
    if isinstance(known, Tensor) and known.shape == weight.shape and torch.equal(known.to(weight.dtype), weight):
        master.data = known
        return
    master.data = weight.detach().to(torch.float32, copy=True)
    if ENTRY in state:
        state[ENTRY] = master.data


class WholeMasters:
    """The user's optimizer over the masters of all its half-precision parameters, stepping once for all of them: for
    optimizers that couple parameters, and for blocks of plain PyTorch. States are the user's optimizer's own, as is any
    average of the weights (of `decay`).

    Example:
        >>> masters = WholeMasters(optimizer, decay=None)
        >>> masters.step({id(weight): gradient})
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float | None) -> None:
        self._optimizer, self._decay = optimizer, decay
        self._masters: dict[int, tuple[Tensor, nn.Parameter]] = {}  # by identity: parameter, and what is updated
        groups = []
        for group in optimizer.param_groups:
            for weight in group["params"]:
                self._masters[id(weight)] = weight, new_master(weight) if weight.dtype in HALF else weight
            groups.append({**group, "params": [self._masters[id(weight)][1] for weight in group["params"]]})
        self.optimizer = clone_optimizer(optimizer, groups)
        self.load()

    def load(self) -> None:
        """Take states and masters from the user's optimizer."""
        self.optimizer.state.clear()
        for weight, master in self._masters.values():
            state = self._optimizer.state.get(weight)
            if master is not weight:
                if state:
                    state.update(widened(state, weight))
                take_master(master, weight, state or {})
            if state:
                self.optimizer.state[master] = state

    def step(self, gradients: Mapping[int, Tensor]) -> None:
        """Update the parameters whose gradients are given, by identity."""
        for own, group in zip(self.optimizer.param_groups, self._optimizer.param_groups, strict=True):
            own.update(options_of(group))
        updated = [self._masters[key] for key in gradients if key in self._masters]
        for weight, master in updated:
            master.grad = gradients[id(weight)].to(master.dtype)
        self.optimizer.step()
        if self._decay is not None:
            average_updated(self.optimizer, self._decay)
        with torch.no_grad():
            for weight, master in updated:
                master.grad = None
                if master is not weight:
                    weight.copy_(master)
                    self.optimizer.state[master].setdefault(ENTRY, master.detach())
                if self.optimizer.state.get(master):
                    self._optimizer.state[weight] = self.optimizer.state[master]


class ExactLoading:
    """Until it is removed, ``optimizer.load_state_dict`` keeps the types of the state that it is given: torch casts
    states to the type of their parameter, which would round masters and what belongs to them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._given: Mapping[str, Any] = {}
        itself = weakref.ref(self)

        def before(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            one = itself()
            if one is not None:
                one._given = given

        def after(loaded: torch.optim.Optimizer) -> None:
            one = itself()
            if one is not None:
                one._restore(loaded)

        self._hooks = (
            optimizer.register_load_state_dict_pre_hook(before),
            optimizer.register_load_state_dict_post_hook(after),
        )

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        given, self._given = self._given, {}
        places = [place for group in given["param_groups"] for place in group["params"]]
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            state = optimizer.state.get(parameter, {})
            for name, value in given["state"].get(place, {}).items():
                loaded = state.get(name)
                if isinstance(loaded, Tensor) and isinstance(value, Tensor) and loaded.dtype != value.dtype:
                    state[name] = value.detach().to(loaded.device, copy=True)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
