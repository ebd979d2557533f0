"""Dropping and growing connections by scores, group by group."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def random_GU(num_groups: int, num_units: int, num_kept: int, random: Generator) -> Tensor:
    """As many units of each group, chosen at random."""
    return top_GU(torch.rand(num_groups, num_units, generator=random), num_kept)


def top_GU(scores_GU: Tensor, num: int) -> Tensor:
    """The units with the highest scores of each group; of equal ones the first."""
    order = torch.sort(scores_GU, dim=1, descending=True, stable=True).indices
    chosen = torch.zeros(scores_GU.shape, dtype=torch.bool)
    return chosen.scatter_(1, order[:, :num], True)


def kept_of(chosen_GU: Tensor, weights_GU: Tensor, num: int) -> Tensor:
    """The units of each group that stay when the `num` with the smallest weights leave, [G, U]."""
    return top_GU(weights_GU.masked_fill(~chosen_GU, -1), int(chosen_GU[0].sum()) - num)


def grown_GU(kept_GU: Tensor, growth_GU: Tensor, num: int) -> Tensor:
    """Those that stay, and of the others the `num` of each group with the most growth. One that has just left may come
    back."""
    return kept_GU | top_GU(growth_GU.masked_fill(kept_GU, -torch.inf), num)
