"""The contract of methods that add gradients between processes.

Workers of one process add their gradients in shared memory, exactly. What is left is a sum over processes, of the
slices that a worker and its peers own; a method forms it, for fewer bytes than the exact sum or for as many. Every
process must get bit-identical sums, since each updates weights of its own.

Legend, for all methods: P processes; g_p what process p brings, so that the exact sum is g = sum over p of g_p; n the
number of elements; e_p what p has not sent yet (*error feedback*: Seide et al. 2014; Karimireddy et al. 2019), which it
adds to what it brings next time.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.errors import InputError
from partita.runtime.transport import Line

State = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A gradient, or a slice of it, of which a sum is formed: `name` is the same on all processes, and `shape` is that
    of the parameter where the part is all of it, else flat."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Peers:
    """The processes of a sum: their ranks in order, and this one's."""

    ranks: tuple[int, ...]
    rank: int

    @property
    def num(self) -> int:
        return len(self.ranks)

    @property
    def place(self) -> int:
        """Of this process among them."""
        return self.ranks.index(self.rank)

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.ranks if rank != self.rank)


class GradientSum(abc.ABC):
    """One sum, step after step. What it keeps between steps belongs to this process alone.

    `error` is the share of what was to be sent in the last step that was not: the norm of e_p over that of g_p + e_p; 0
    for an exact sum.
    """

    def __init__(self, parts: Sequence[Part], peers: Peers) -> None:
        self.parts, self.peers = tuple(parts), peers
        self.error = 0.0

    @abc.abstractmethod
    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        """The sums over the processes of values in the shape of `parts`, float32; may change and return the values. All
        processes call it at the same time."""

    def state(self) -> State:
        """What must be kept to go on as if nothing had been interrupted. Tensors are those in use."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state; raises `InputError` if it belongs to other parts."""
        own = self.state()
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
            raise InputError(
                f"the state must be that of a sum of the same parts, with {sorted(own)}, but has {sorted(state)} or "
                "other shapes. Load it under the plan that wrote it, or start without."
            )
        for name, value in own.items():
            value.copy_(state[name])


@dataclass(frozen=True, kw_only=True)
class GradientMethod(abc.ABC):
    """A way to add gradients between processes; holds its settings only, and can be written as plain data."""

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    def needs_whole_parameters(self) -> bool:
        """Whether it looks at parameters as matrices, so that they must not be cut between workers."""
        return False

    @property
    def keeps_its_own(self) -> bool:
        """Whether what a sum keeps is this process' alone and knows nothing of the others, so that they may be others
        from one sum to the next."""
        return False

    @abc.abstractmethod
    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        """The sum of some parts; all processes of `peers` make it."""

    @abc.abstractmethod
    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        """Bytes that this process sends in one step, once the method has warmed up."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027  most have nothing to say
        """Raise `InputError` if the method must not be used with the optimizer."""


def flat_of(values: Sequence[Tensor]) -> Tensor:
    """The elements of all values one after the other, as float32, in memory of their own."""
    return torch.cat([value.reshape(-1).float() for value in values])


def unflat(flat: Tensor, like: Sequence[Part | Tensor]) -> list[Tensor]:
    """Views of `flat`, one after the other, in the shapes of parts or of other tensors."""
    pieces = torch.split(flat, [math.prod(item.shape) for item in like])
    return [piece.view(item.shape) for piece, item in zip(pieces, like, strict=True)]


def check_has_no_momentum(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise `InputError` unless the optimizer leaves the momentum to the method called `name`."""
    momenta = sorted({group.get("momentum", 0) for group in optimizer.param_groups})
    if not isinstance(optimizer, torch.optim.SGD) or momenta != [0]:
        raise InputError(
            f"{name} has the momentum itself, so the optimizer must be torch.optim.SGD without one, but got "
            f"{type(optimizer).__name__} with momentum {momenta}. Use SGD(lr=..., momentum=0, weight_decay=...), or a "
            "method that works with any optimizer, such as TopK."
        )


def share_missing(missing: Tensor, wanted: Tensor) -> float:
    """|missing| / |wanted|, 0 of nothing."""
    norm = float(torch.linalg.vector_norm(wanted))
    return float(torch.linalg.vector_norm(missing)) / norm if norm else 0.0
