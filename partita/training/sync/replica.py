"""The contract of methods by which replicas train apart and come together now and then.

A *replica* is one process with a plan of its own over its own workers: inside, training is exact. Replicas start from
the same weights, each trains on its rows of every global batch, and a method brings them together: every H steps, in
the background, late, or with one neighbour at a time.

Legend, for all methods: R replicas; w_r the share of the rows that replica r trains on (their sum is 1); x_r its
weights.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from partita.arguments import told
from partita.errors import InputError
from partita.runtime.transport import Line
from partita.training.sync.method import GradientMethod, Part, Peers, State, flat_of, unflat

Gradients = dict[str, Tensor]


class Begun(Protocol):
    """An exchange that goes on in the background."""

    @property
    def is_over(self) -> bool: ...

    def wait(self) -> list[Tensor]:
        """What it gives, when it is over."""
        ...


class DivergenceWarning(UserWarning):
    """A setting is known to make training diverge; the message says which and what to change."""


@dataclass(kw_only=True)
class Replica:
    """What a method works with, on one process.

    `parameters` are those that are trained, and `buffers` the floating-point ones: the tensors in use. `share` is w_r
    of the step that is made; it may change between steps, on all replicas at once. `line` joins the replicas; `errand`
    begins an exchange over another line, in the background and in the order of the calls.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    peers: Peers
    share: float
    line: Line
    errand: Callable[[str, Callable[[Line], list[Tensor]]], Begun]

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(name, tuple(value.shape)) for name, value in self.parameters.items())


class ReplicaSync(abc.ABC):
    """A method at work on one replica.

    `error` is as of `GradientSum`; `staleness` is by how many steps what came in last was late.
    """

    takes_gradients = False  # whether it wants them instead of the optimizer's own step

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.error = 0.0
        self.staleness = 0

    def due(self, gradients: Gradients) -> list[Gradients]:
        """What the optimizer is to apply now, in order, where the method `takes_gradients`."""
        return [gradients]

    @abc.abstractmethod
    def after_step(self, step: int) -> None:
        """The replica has made its local step number `step`, counted from 1."""

    def settle(self) -> list[Gradients]:
        """Waits for what is on its way, and gives what the optimizer must still apply; all replicas call it."""
        return []

    @abc.abstractmethod
    def equalise(self) -> None:
        """Gives all replicas the same weights: what they would agree on now. Training may go on afterwards."""

    def state(self) -> State:
        """What must be kept to go on, besides weights and optimizer; the tensors in use."""
        return {}

    def resume(self, state: Mapping[str, Tensor] | None) -> None:
        """Goes on after weights were loaded: from a state, as far as it is one of this method and these parameters,
        else from the weights as they are."""
        self.restart()
        take_state(self.state(), state)

    def restart(self) -> None:  # noqa: B027  most have nothing to do
        """The replica's weights are new, and equal on all replicas."""


@dataclass(frozen=True, kw_only=True)
class ReplicaMethod(abc.ABC):
    """A way to bring replicas together; holds its settings only."""

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    def exact_steps(self) -> int:
        """So many first steps are made together, exactly."""
        return 0

    @property
    def meets_every(self) -> int:
        """Steps from one meeting of replicas to the next."""
        return 1

    @property
    def weighs_rows(self) -> bool:
        """Whether a replica counts by its share of the rows, so that shares may differ: all rows count alike."""
        return True

    @abc.abstractmethod
    def sync_of(self, replica: Replica) -> ReplicaSync: ...

    @abc.abstractmethod
    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> float:
        """Bytes that this process sends in one step, in the mean over many."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027  most have nothing to say
        """Raise `InputError` if the method must not be used with the optimizer."""


def take_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor] | None) -> None:
    """Overwrites the tensors of a state by those of another one, as far as they have the same name and shape."""
    for name, value in own.items():
        found = (state or {}).get(name)
        if found is not None and found.shape == value.shape:
            value.copy_(found)


def check_compress(compress: object) -> None:
    """Raises InputError unless differences of weights can be added by it."""
    if not isinstance(compress, GradientMethod):
        raise InputError(
            f"compress must be a method that adds gradients, but got {told(compress)}. Pass e.g. "
            'partita.sync.Rounded(to="int4").'
        )


def mean_in_place(values: Sequence[Tensor], share: float, line: Line) -> None:
    """Replaces values by their means over replicas, weighted by their shares."""
    held = [value for value in values if value.numel()]
    if held:
        flat = flat_of(held).mul_(share)
        line.all_reduce(flat)
        copy_flat(flat, held)


def copy_flat(flat: Tensor, values: Sequence[Tensor]) -> None:
    """Overwrites values by the elements of `flat`, one after the other."""
    for value, piece in zip(values, unflat(flat, values), strict=True):
        value.copy_(piece)
