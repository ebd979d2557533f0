"""Which units matter, and networks without the others.

A unit is everything that is there for its sake: rows of the weights that make it, its biases, entries of norms, and the
columns of the weights that read it. Its importance is the norm of all of these (Li et al. 2017 take the rows alone;
Fang et al. 2023, "DepGraph", all that depends on it), or how much the loss would change without it, to first order
(Molchanov et al. 2017).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from partita.arguments import check_number
from partita.errors import InputError
from partita.search.structure.network import Network

STEPS = 64  # in which `sizes_within` makes a width smaller, at most

Scores = Mapping[str, Tensor]  # by name of a width, one for each unit


def importance(network: Network, gradients: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """How much each unit of each width matters.

    Args:
        gradients: of the loss, by name of a parameter (all of them); then it is ``|sum of w * dL/dw|`` over the
            unit's parameters, else the root of the sum of their squares.

    Returns:
        by name of a width, a float64 vector with one score for each unit.
    """
    found = {}
    for name, width in network.widths.items():
        scores = torch.zeros(width.size, dtype=torch.float64)
        for tensor, dim in network.uses(name):
            if tensor not in network.parameters:
                continue
            value = network.tensors[tensor].detach().double().cpu()
            value = value.square() if gradients is None else value * _gradient(gradients, tensor).double().cpu()
            per_entry = value.movedim(dim, 0).flatten(1).sum(1) if value.ndim > 1 else value
            units = network.units(name, tensor, dim)
            scores.index_add_(0, units[units >= 0], per_entry[units >= 0])
        found[name] = scores.sqrt() if gradients is None else scores.abs()
    return found


def _gradient(gradients: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in gradients:
        raise InputError(f"gradients must have every parameter that the network reads, but {name!r} is missing")
    return gradients[name].detach()


def pruned(network: Network, sizes: Mapping[str, int], scores: Scores | None = None) -> Network:
    """The network with the most important units of some widths.

    Args:
        sizes: of the widths that shrink, afterwards.
        scores: of units; `importance` by default.

    Raises:
        InputError: a size is larger than it is now, or scores do not fit.

    Example:
        >>> smaller = pruned(network, {"fc1": 50})
        >>> smaller.model(x)
    """
    scores = importance(network) if scores is None else scores
    units = {}
    for name, size in sizes.items():
        now = network.width(name).size
        check_number(size, f"the size of {name}", least=1, whole=True)
        if size > now:
            raise InputError(f"pruning makes widths smaller, but {name!r} has {now} units and {size} are wanted; use "
                             "widened()")  # fmt: skip
        units[name] = scores_of(scores, name, now).topk(size).indices.sort().values
    return network.with_units(units)


def scores_of(scores: Scores, name: str, size: int) -> Tensor:
    if name not in scores or tuple(scores[name].shape) != (size,):
        got = tuple(scores[name].shape) if name in scores else "none"
        raise InputError(f"scores must have one number for each of the {size} units of {name!r}, but got {got}")
    return scores[name]


def sizes_within(
    network: Network,
    *,
    num_parameters: int | None = None,
    num_flops: int | None = None,
    scores: Scores | None = None,
    least: int = 1,
    multiple: int = 1,
) -> dict[str, int]:
    """Sizes of all widths with which the network is within limits, at the least loss of importance.

    Units leave one after the other (``multiple`` at a time), always those with the least importance for what they cost.
    Importances count in shares of their width's mean, as widths differ in scale.

    Args:
        num_parameters, num_flops: the limits; `Network.num_parameters` and `num_flops` count.
        scores: of units; `importance` by default.
        least: units that every width keeps.
        multiple: sizes are multiples of it, for the sake of vector units, unless a width was none before.

    Raises:
        InputError: even the smallest sizes are above a limit.
    """
    scores = importance(network) if scores is None else scores
    ordered = {name: _shares(scores_of(scores, name, width.size)) for name, width in network.widths.items()}
    sizes, limits = network.sizes, (num_parameters, num_flops)
    over = _excess(network, sizes, *limits)

    def offer(name: str) -> tuple[float, str, int]:
        """What it costs to leave out the next units, for what that saves."""
        step = max(multiple, ordered[name].numel() // STEPS // multiple * multiple)
        fewer = sizes[name] - (sizes[name] % multiple or step)
        saved = over - _excess(network, sizes | {name: fewer}, *limits) if fewer >= max(least, 1) else 0.0
        return (float(ordered[name][fewer : sizes[name]].sum()) / saved if saved > 0 else math.inf), name, fewer

    offers = [offer(name) for name in sizes] if over else []
    heapq.heapify(offers)
    while over:
        best = offer(offers[0][1]) if offers else (math.inf, "", 0)  # what others left out has changed it
        if best[0] == math.inf and all(offer(name)[0] == math.inf for name in sizes):
            raise InputError(
                f"the network must fit num_parameters={num_parameters}, num_flops={num_flops}, but its smallest sizes "
                f"have {network.num_parameters(sizes)} parameters and {network.num_flops(sizes)} flops; allow more, or "
                "a smaller `least`"
            )
        if best[0] <= offers[0][0] or len(offers) == 1 or best[0] <= min(offers[1:3])[0]:
            sizes[best[1]] = best[2]
            over = _excess(network, sizes, *limits)
            best = offer(best[1])
        heapq.heapreplace(offers, best)
    return sizes


def _shares(scores: Tensor) -> Tensor:
    scores = scores.double()
    return scores.sort(descending=True).values / scores.mean().clamp_min(torch.finfo(torch.float64).tiny)


def _excess(network: Network, sizes: Mapping[str, int], num_parameters: int | None, num_flops: int | None) -> float:
    """By how much of the limits the network is above them; 0 within."""
    over = 0.0
    if num_parameters is not None:
        over += max(0.0, network.num_parameters(sizes) / num_parameters - 1)
    if num_flops is not None:
        over += max(0.0, network.num_flops(sizes) / num_flops - 1)
    return over
