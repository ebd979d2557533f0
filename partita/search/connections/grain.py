"""What one connection is: an element of a weight, or a block of it.

Methods see a weight as *units* in groups, G groups of U units with E elements each. Without blocks an element is a unit
and a weight one group. With blocks of (outputs, inputs) a unit is a block, with all positions of a kernel, and each row
of blocks is a group: what is chosen in every group alike gives every block of outputs as many blocks of inputs (a fixed
*fan-in*), which is what makes blocks fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.errors import InputError


@dataclass(frozen=True)
class Grain:
    """How weights are divided into connections.

    Args:
        block: outputs and inputs of a block; None: every element is a connection.

    Example:
        >>> Grain((2, 2)).units(torch.arange(8.0).view(2, 4))
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """

    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.block is not None and (len(self.block) != 2 or any(size < 1 for size in self.block)):
            raise InputError(f"a block must have at least one output and one input, but got {self.block}")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of that shape is whole blocks."""
        if self.block is None:
            return True
        return len(shape) > 1 and not shape[0] % self.block[0] and not shape[1] % self.block[1]

    def num_groups(self, shape: tuple[int, ...]) -> int:
        return 1 if self.block is None else shape[0] // self.block[0]

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Units of one group."""
        return math.prod(shape) if self.block is None else shape[1] // self.block[1]

    def units(self, value: Tensor) -> Tensor:
        """A weight in shape [G, U, E]."""
        if self.block is None:
            return value.reshape(1, -1, 1)
        rows, columns = self.block
        split = value.reshape(value.shape[0] // rows, rows, value.shape[1] // columns, columns, -1)
        return split.transpose(1, 2).flatten(2)

    def scores_GU(self, value: Tensor) -> Tensor:
        """The norm of every unit of a weight or gradient, in float32."""
        units_GUE = self.units(value.detach())
        if self.block is None:
            return units_GUE.squeeze(2).float().abs()
        norms_GU: Tensor = torch.linalg.vector_norm(units_GUE, dim=2, dtype=torch.float32)
        return norms_GU

    def chosen_GU(self, mask: Tensor) -> Tensor:
        """Which units a mask has (all elements of a unit are alike)."""
        return self.units(mask)[:, :, 0]

    def mask_of(self, chosen_GU: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The mask, in a weight's shape, that has these units."""
        if self.block is None:
            return chosen_GU.reshape(shape)
        rows, columns = self.block
        per_block = chosen_GU.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return per_block.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape).contiguous()
