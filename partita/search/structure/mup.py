"""Learning rates that hold for every width.

In the maximal update parametrisation every part of a network learns as fast at any width, so the learning rate that is
best for a narrow network is best for a wide one (Yang et al. 2022, "Tensor Programs V", table 3). With n_in and n_out
times as many inputs and outputs of a parameter as the narrow network has:

    Adam, AdamW    lr / n_in          (AdamW: weight decay * n_in, so that what decays in a step stays the same)
    SGD            lr * n_out / n_in
    at the start   weights of which only the inputs grow (the last layer's): 1/sqrt(n_in) of what they were

Inputs are the dims of a weight over which its op sums, as `Network` finds them. Where features of queries and keys grow
(and not the number of heads), attention should divide by them and not by their root; that is the model's own code.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from partita.arguments import check_number
from partita.errors import InputError
from partita.search.structure.network import Network

Rule = Literal["adam", "sgd"]


def mup_groups(
    network: Network, base: nn.Module, *, lr: float, rule: Rule = "adam", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of ``network.model``.

    Args:
        network: of the wide model.
        base: the narrow model, for which ``lr`` is good; the same parameters with other sizes.
        rule: "adam" for Adam, AdamW and others that divide by the gradient's size; "sgd" with or without momentum.
        weight_decay: of ``base``.

    Raises:
        InputError: the models have other parameters, or share a parameter between what reads a width and what makes it.

    Example:
        >>> optimizer = torch.optim.AdamW(mup_groups(network, narrow, lr=3e-3))
    """
    check_number(lr, "lr", least=0)
    check_number(weight_decay, "weight_decay", least=0)
    if rule not in ("adam", "sgd"):
        raise InputError(f'rule must be "adam" or "sgd", but got {rule!r}')
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.model.named_parameters():
        n_in, n_out = growth(network, base, name)
        groups.setdefault(1 / n_in if rule == "adam" else n_out / n_in, []).append(parameter)
    return [{"params": parameters, "lr": lr * factor,
             "weight_decay": weight_decay / factor if rule == "adam" else weight_decay}
            for factor, parameters in groups.items()]  # fmt: skip


def mup_start_(network: Network, base: nn.Module) -> None:
    """Make weights of a model that was just initialised, as torch does it, those that `mup_groups` is for."""
    with torch.no_grad():
        for name, parameter in network.model.named_parameters():
            n_in, n_out = growth(network, base, name)
            if n_in != 1 and n_out == 1:
                parameter.mul_(1 / math.sqrt(n_in))


def growth(network: Network, base: nn.Module, name: str) -> tuple[float, float]:
    """How many times as many inputs and outputs a parameter has as in ``base``."""
    wide = network.model.get_parameter(name)
    narrow = dict(base.named_parameters()).get(name)
    if narrow is None or narrow.ndim != wide.ndim:
        raise InputError(
            f"base must have the same parameters with other sizes, but {name!r} is {tuple(wide.shape)} in the network "
            f"and {tuple(narrow.shape) if narrow is not None else 'missing'} in base"
        )
    ratios = [new / old for new, old in zip(wide.shape, narrow.shape, strict=True)]
    summed = {dim for tensor, dim in network.trace.weights if tensor == name}
    made = {dim for tensor, dim in network.trace.made if tensor == name}
    if any(ratios[dim] != 1 for dim in summed & made):
        raise InputError(f"a width must be read and made by different parameters, but {name!r} does both: untie them")
    n_in = math.prod(ratio for dim, ratio in enumerate(ratios) if dim in summed)
    return n_in, math.prod(ratios) / n_in
