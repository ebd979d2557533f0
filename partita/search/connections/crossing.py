"""Connections priced by the inputs that they make cross from one device to another.

A plan that cuts widths gives each output o of a layer to a device d(o), and each of its inputs i to the device h(i)
that makes it. A connection (o, i) with d(o) != h(i) makes input i cross to device d(o), once for all connections there:

    needed(i, d)  = some connection (o, i) has d(o) = d
    num_crossing  = number of (i, d) with needed(i, d) and d != h(i)

which, times rows and bytes of an element, is what the layer's inputs must travel. A connection that may come is priced
by whether it adds to that, beside those that stay (kept), each for itself:

    price(o, i) = 1 if d(o) != h(i) and not needed(i, d(o)), else 0
    growth'     = growth / (1 + crossing price)

so that it must have (1 + crossing) times the gradient of one which makes nothing cross. The price of a block is the
mean of its elements' prices. All inputs of a layer cost the same bytes, so the price needs no unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partita.training.connecting import Cut


def num_crossing(mask: Tensor, cut: Cut) -> int:
    """How many pairs of an input and a foreign device there are whose connections need the input there.

    Args:
        mask: [O, I, ...], true where a connection is.
        cut: of outputs and inputs.

    Example:
        >>> num_crossing(torch.ones(4, 4, dtype=torch.bool), Cut((2, 2), (2, 2)))
        4
    """
    return int((_needed_ID(mask, cut) & _foreign_ID(cut)).sum())


def prices_OI(mask: Tensor, cut: Cut) -> Tensor:
    """The price of each connection, [O, I, ...], beside those of the mask: 1 if it makes an input cross that does not
    yet, else 0."""
    prices_OI = (_foreign_ID(cut) & ~_needed_ID(mask, cut)).T[_devices(cut.outputs)].float()
    return prices_OI.view(*prices_OI.shape, *[1] * (mask.dim() - 2)).expand(mask.shape)


def _needed_ID(mask: Tensor, cut: Cut) -> Tensor:
    """Which inputs are needed on which devices."""
    mask_OI = mask.flatten(2).any(2) if mask.dim() > 2 else mask
    return torch.stack([part_OI.any(0) for part_OI in mask_OI.split(cut.outputs)], dim=1)


def _foreign_ID(cut: Cut) -> Tensor:
    """Which inputs are made elsewhere."""
    return _devices(cut.inputs)[:, None] != torch.arange(len(cut.outputs))


def _devices(extents: tuple[int, ...]) -> Tensor:
    return torch.arange(len(extents)).repeat_interleave(torch.tensor(extents))
