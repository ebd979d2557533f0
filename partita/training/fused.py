"""Updates of an optimizer as one kernel call a parameter group.

`torch.optim.Optimizer.step` sorts parameters, states and options into lists anew in every step, which for many small
parameters takes ten times longer than the arithmetic. Here the lists are made once, after a step of the optimizer's own
has made the states; options (the learning rate, ...) are read in every step. The kernels are those that the optimizer
calls with ``fused=True``, so the results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.training.torch_adapter import fused_adagrad, fused_adam, fused_sgd, has_global_hooks

Options = Mapping[str, Any]
Lists = Sequence[list[Tensor]]


@dataclass(frozen=True)
class _Kernel:
    """`states`: names of the states of a parameter's shape, given the options; `run` takes parameters, gradients, lists
    of these states, counters of steps and the options."""

    states: Callable[[Options], tuple[str, ...]]
    run: Callable[[list[Tensor], list[Tensor], Lists, list[Tensor], Options], None]
    counts: bool  # whether the state holds the number of steps


def _states_of_adam(options: Options) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options["amsgrad"] else ()))


def _states_of_sgd(options: Options) -> tuple[str, ...]:
    return ("momentum_buffer",) if options["momentum"] else ()


_KERNELS: Mapping[type, _Kernel] = {
    torch.optim.Adam: _Kernel(_states_of_adam, fused_adam, counts=True),
    torch.optim.AdamW: _Kernel(_states_of_adam, fused_adam, counts=True),
    torch.optim.Adagrad: _Kernel(lambda _: ("sum",), fused_adagrad, counts=True),
    torch.optim.SGD: _Kernel(_states_of_sgd, fused_sgd, counts=False),
}


@dataclass(frozen=True)
class _Group:
    """A parameter group's lists. `places` are those of its gradients among all."""

    options: Options
    places: tuple[int, ...]
    parameters: list[Tensor]
    states: Lists
    names: tuple[str, ...]
    steps: list[Tensor]
    counter: Tensor | None  # that `steps` are entries of
    dims: list[int]


class FusedUpdate:
    """The update of one optimizer, whose parameters all have states.

    Args:
        groups: as `of` makes them.

    Example:
        >>> optimizer.step()
        >>> update = FusedUpdate.of(optimizer, parameters, gradients)
        >>> if update is None or not update(gradients):
        ...     optimizer.step()
    """

    def __init__(self, kernel: _Kernel, groups: Sequence[_Group]) -> None:
        self._kernel, self._groups = kernel, groups

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor | None], gradients: Sequence[Tensor]
    ) -> FusedUpdate | None:
        """The update of `parameters` (one for each gradient; None: not updated) by `gradients` of these forms, flat or
        in the parameter's shape; None if the optimizer is not of a known class, or not ready for it."""
        kernel = _KERNELS.get(type(optimizer))
        if kernel is None or has_global_hooks() or any(hasattr(optimizer, n) for n in ("grad_scale", "found_inf")):
            return None
        place_of = {id(parameter): place for place, parameter in enumerate(parameters) if parameter is not None}
        groups = []
        for options in optimizer.param_groups:
            group = _group(optimizer, options, kernel, place_of, gradients) if _is_plain(options) else None
            if group is None:
                return None
            groups.append(group)
        return cls(kernel, groups)

    def __call__(self, gradients: Sequence[Tensor]) -> bool:
        """Apply the gradients; False, and nothing is changed, if options or gradients are of another kind now."""
        chosen = []
        for group in self._groups:
            own = [gradients[place] for place in group.places]
            fits = _is_plain(group.options) and self._kernel.states(group.options) == group.names
            if not fits or list(map(Tensor.dim, own)) != group.dims:
                return False
            chosen.append(own)
        for group, own in zip(self._groups, chosen, strict=True):
            if group.counter is not None:
                group.counter.add_(1)
            self._kernel.run(group.parameters, own, group.states, group.steps, group.options)
        return True


def _is_plain(options: Options) -> bool:
    """Whether the group takes the fused kernel with numbers as options."""
    return bool(options.get("fused")) and not any(isinstance(value, Tensor) for value in _numbers(options))


def _numbers(options: Options) -> tuple[Any, ...]:
    return (options["lr"], *options.get("betas", ()))


def _group(
    optimizer: torch.optim.Optimizer,
    options: Options,
    kernel: _Kernel,
    place_of: Mapping[int, int],
    gradients: Sequence[Tensor],
) -> _Group | None:
    names = kernel.states(options)
    own: list[Tensor] = options["params"]
    needed = (*names, *(("step",) if kernel.counts else ()))
    held = [optimizer.state.get(parameter) or {} for parameter in own]
    if any(id(parameter) not in place_of for parameter in own) or any(n not in state for state in held for n in needed):
        return None
    places = tuple(place_of[id(parameter)] for parameter in own)
    shapes = [gradients[place].shape for place in places]

    def formed(values: Sequence[Tensor]) -> list[Tensor]:
        return [value.detach().view(shape) for value, shape in zip(values, shapes, strict=True)]

    counter = None
    if kernel.counts:
        # One counter for all: an addition for each takes as long as the update of a small parameter.
        counter = torch.stack([state["step"] for state in held])
        for state, step in zip(held, counter.unbind(), strict=True):
            state["step"] = step
    return _Group(
        options=options,
        places=places,
        parameters=formed(own),
        states=[formed([state[name] for state in held]) for name in names],
        names=names,
        steps=[state["step"] for state in held] if kernel.counts else [],
        counter=counter,
        dims=[len(shape) for shape in shapes],
    )
