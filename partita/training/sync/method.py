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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        result = 1
        for extent in self.shape:
            result *= extent
        return result


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


def unflat(flat: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Views of `flat` in the shapes of the parts."""
    pieces = torch.split(flat, [part.num_elements for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def share_missing(missing: Tensor, wanted: Tensor) -> float:
    """|missing| / |wanted|, 0 of nothing."""
    norm = float(torch.linalg.vector_norm(wanted))
    return float(torch.linalg.vector_norm(missing)) / norm if norm else 0.0


def settings_of(method: GradientMethod) -> dict[str, Any]:
    """Name and settings, as plain data."""
    return {"method": method.name, **vars(method)}
