"""What elastic replicas agree on at a time: all parameters, or with Streaming DiLoCo one fragment after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from partita.runtime.transport import Line
from partita.training.sync.exact import Exact
from partita.training.sync.fragments import fragments_of
from partita.training.sync.method import Part, Peers, State
from partita.training.sync.moving import MovingSum
from partita.training.sync.outer import DiLoCo, LocalSGD, OuterOptimizer, OuterSettings, StreamingDiLoCo
from partita.training.sync.replica import take_state

OuterMethod = LocalSGD | DiLoCo | StreamingDiLoCo


class Fragment:
    """Some parameters: what is agreed on of them, how outer gradients are added, and what this replica has trained
    since. `prefix` is of the names in its state."""

    def __init__(self, prefix: str, parameters: Mapping[str, Tensor], settings: OuterSettings) -> None:
        self._prefix = prefix
        # its own sums would be among processes that stay
        self.outer = OuterOptimizer(parameters, dataclasses.replace(settings, compress=Exact()), Peers((0,), 0))
        parts = [Part(name, tuple(value.shape)) for name, value in parameters.items()]
        self.sums = MovingSum(settings.compress, parts)
        self.num_pieces = 0  # of batches, since all agreed

    def attempt(self, share: float, peers: Peers, line: Line) -> list[Tensor]:
        """The outer gradient of all, of which this replica's counts by its share; changes nothing."""
        own = self.outer.gradient()
        own = [value.mul_(share) if share else torch.zeros_like(value) for value in own]
        return self.sums.attempt(own, peers, line)

    def commit(self, outer: Sequence[Tensor]) -> None:
        """Moves what is agreed on, and goes on from it."""
        self.sums.commit()
        self.outer.move(outer)
        self.outer.take()
        self.num_pieces = 0

    def agreed(self) -> State:
        """What all replicas have alike."""
        return self.outer.state(self._prefix)

    def own(self) -> State:
        """What this replica has of its own: errors that are fed back."""
        return {f"{self._prefix}.sums.{name}": value for name, value in self.sums.state().items()}

    def resume(self, state: Mapping[str, Tensor] | None) -> None:
        """Goes on from a state, as far as it is one of these parameters, else from the replica's weights."""
        self.sums.forget()
        self.outer.resume(self._prefix, state)
        take_state(self.own(), state)
        self.num_pieces = 0


class Fragments:
    """All of them, and when it is whose turn."""

    def __init__(self, method: OuterMethod, parameters: Mapping[str, Tensor]) -> None:
        self._every = method.every
        if isinstance(method, StreamingDiLoCo):
            parts = [Part(name, tuple(value.shape)) for name, value in parameters.items()]
            self.all = [
                Fragment(
                    f"fragment.{number}",
                    {piece.part.name: piece.of(parameters[piece.parameter.name]) for piece in own},
                    method.outer,
                )
                for number, own in enumerate(fragments_of(parts, method.fragments))
            ]
        else:
            self.all = [Fragment("outer", parameters, method.outer)]

    @property
    def values(self) -> list[Tensor]:
        """Of the replica."""
        return [value for fragment in self.all for value in fragment.outer.values]

    def next(self, step: int) -> tuple[int, Fragment]:
        """After which step all agree again that have done so after `step` last, and on which fragment."""
        found = []
        for number, fragment in enumerate(self.all):
            offset = number * self._every // len(self.all)
            found.append((step + self._every - (step - offset) % self._every, fragment))
        return min(found, key=lambda one: one[0])

    def count(self, num_pieces: int) -> None:
        """The replica has trained on so many pieces."""
        for fragment in self.all:
            fragment.num_pieces += num_pieces

    def take(self) -> None:
        """The replica has the weights that all have agreed on."""
        for fragment in self.all:
            fragment.outer.take()

    def forget(self) -> None:
        """This replica starts without errors of its own."""
        for fragment in self.all:
            fragment.sums.forget()

    def agreed(self) -> State:
        return {name: value for fragment in self.all for name, value in fragment.agreed().items()}

    def state(self) -> State:
        return self.agreed() | {name: value for fragment in self.all for name, value in fragment.own().items()}

    def resume(self, state: Mapping[str, Tensor] | None) -> None:
        for fragment in self.all:
            fragment.resume(state)
