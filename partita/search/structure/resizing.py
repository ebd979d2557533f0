"""A network in other sizes, with new weights that are drawn as the given ones were.

Nobody tells how weights were initialised, but there they are. Each entry of a new parameter is one of the old ones,
chosen at random among those that stand for the same: entries that differ only in the units of free widths. So constants
stay constants, a gate's biases stay that gate's, and a vocabulary's row of zeros stays zero. Where more or fewer
units are summed over, entries are scaled by the root of the ratio, as all usual initialisations do (Glorot and Bengio
2010; He et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from partita.search.structure.making import made
from partita.search.structure.network import Network
from partita.search.structure.source import source_of
from partita.search.structure.widths import Extent, Width, indices, size_of, widths_of


def resized(network: Network, sizes: Mapping[str, int]) -> nn.Module:
    """The network with new weights in other sizes, made from its source; drawn with torch's random numbers.

    Args:
        sizes: by name of a width, its number of units; others stay as they are.

    Raises:
        InputError: there is no such width, or a size is less than 1.

    Example:
        >>> wide = resized(network, {"0": 400})
    """
    new = network.new_sizes(sizes)
    tensors = {name: _drawn(network, name, new) for name in network.tensors}
    return made(source_of(network, new), tensors, network.model)


def _drawn(network: Network, name: str, new: Mapping[Width, int]) -> Tensor:
    if name not in network.parameters:  # what is no weight has its units again and again
        return network.selected(name, {width: torch.arange(size) % width.size for width, size in new.items()})
    old, extents = network.tensors[name].detach(), network.dims[name]
    if not old.ndim:
        return old.clone()
    shape = [size_of(extent, new) for extent in extents]
    places = []
    for dim, extent in enumerate(extents):
        along = [-1 if other == dim else 1 for other in range(old.ndim)]
        free = [width for width in widths_of(extent) if width in network.widths.values()]
        if free:
            places.append(_random_places(extent, free, new, torch.rand(shape), along))
        else:
            places.append(torch.arange(old.shape[dim]).view(along))
    return old[tuple(place.to(old.device) for place in places)] * _scale(network, name, new)


def _random_places(
    extent: Extent, free: list[Width], new: Mapping[Width, int], draws: Tensor, along: list[int]
) -> Tensor:
    """For each of the draws from [0, 1), one for each entry of a new tensor, an old entry of the dim that stands for
    the same as the new one."""
    kinds = indices(extent, {width: torch.zeros(width.size, dtype=torch.long) for width in free})
    wanted = indices(extent, {width: torch.zeros(new.get(width, width.size), dtype=torch.long) for width in free})
    order, numbers = kinds.argsort(stable=True), torch.bincount(kinds)
    starts = numbers.cumsum(0) - numbers
    choices = (draws * numbers[wanted].view(along)).long()
    return order[starts[wanted].view(along) + choices]


def _scale(network: Network, name: str, new: Mapping[Width, int]) -> float:
    """By which entries shrink as more are summed over."""
    ratio = 1.0
    for tensor, dim in set(network.trace.weights):
        if tensor == name:
            extent = network.dims[name][dim]
            ratio *= size_of(extent) / size_of(extent, new)
    return math.sqrt(ratio)
