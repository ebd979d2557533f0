"""Gradients of masked parameters: only the elements under a mask travel.

All processes have the same masks (*connections* that exist), and gradients outside of them are of no use: the sums are
exact under the masks and zero outside. No places travel. Masks may change between steps, on all processes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partita.arguments import told
from partita.errors import InputError
from partita.runtime.transport import Line
from partita.training.sync.exact import dense_bytes
from partita.training.sync.method import GradientMethod, GradientSum, Part, Peers, flat_of, unflat


@dataclass(frozen=True, kw_only=True)
class Masked(GradientMethod):
    """Exact sums of the elements under masks.

    State: none. Bytes a step: those of an exact sum of as many elements as the masks have.

    Args:
        masks: by parameter, bool tensors of its shape; parameters without a mask are summed whole. They may be
            changed in place between steps, alike on all processes.

    Example:
        >>> mask = torch.zeros(10, 10, dtype=torch.bool)
        >>> mask[0] = True
        >>> Masked(masks={"weight": mask}).sent_bytes([Part("weight", (10, 10))], Peers((0, 1), 0))
        40
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.masks, Mapping):
            raise InputError(f"masks must map names of parameters to tensors, but got {told(self.masks)}")
        bad = {name: str(getattr(mask, "dtype", told(mask))) for name, mask in self.masks.items()}
        bad = {name: kind for name, kind in bad.items() if kind != "torch.bool"}
        if bad:
            raise InputError(f"masks must be tensors of torch.bool, but got {bad}")

    @property
    def name(self) -> str:
        return "masked"

    @property
    def needs_whole_parameters(self) -> bool:
        return True

    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        for part in parts:
            mask = self.masks.get(part.name)
            if mask is not None and tuple(mask.shape) != part.shape:
                raise InputError(
                    f"the mask of {part.name!r} must have the parameter's shape {part.shape}, but has "
                    f"{tuple(mask.shape)}"
                )
        return MaskedSum(parts, peers, self.masks)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        counts = [int(self.masks[part.name].sum()) if part.name in self.masks else part.num_elements for part in parts]
        return dense_bytes(sum(counts), peers)


class MaskedSum(GradientSum):
    def __init__(self, parts: Sequence[Part], peers: Peers, masks: Mapping[str, Tensor]) -> None:
        super().__init__(parts, peers)
        self._masks = [masks.get(part.name) for part in parts]

    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        flat = flat_of(values)
        everywhere = torch.ones(0, dtype=torch.bool)
        chosen = torch.cat(
            [
                everywhere.new_ones(part.num_elements) if mask is None else mask.reshape(-1)
                for part, mask in zip(self.parts, self._masks, strict=True)
            ]
        )
        held = flat[chosen]
        if self.peers.num > 1 and held.numel():
            line.all_reduce(held)
        return unflat(torch.zeros_like(flat).masked_scatter_(chosen, held), self.parts)
