"""Replicas that train apart for H steps and then agree: local SGD, DiLoCo and Streaming DiLoCo.

With y the weights that all replicas last agreed on, each makes H steps of its own from y to x_r. Then, w_r being the
mean of its shares of the rows in these steps,

    D = sum over r of w_r (y - x_r)          the outer gradient
    m = mu m + D
    y = y - eta (D + mu m)                   Nesterov; with mu = 0: y - eta D
    x_r = y

Local SGD is eta = 1 and mu = 0: the replicas take the mean of their weights. With H = 1 and SGD inside, that is the
exact step. DiLoCo has AdamW inside, eta = 0.7, mu = 0.9 and H around 100 to 500. The outer gradient may be rounded or
compressed by any method that adds gradients (`compress`), with its error feedback.

The mean of many outer steps has the length eta / (1 - mu): 7 times a mean of the weights with DiLoCo's settings. After
few inner steps, which point almost the same way every time, that overshoots; so the default is the mean below H = 10,
mu = 0.5 (1.4 times) below H = 100, and the paper's from there on. Of a small decoder trained for 300 steps, with H = 10
mu = 0.9 reaches a loss of 2.16, one replica alone 1.98, the mean 1.80 and mu = 0.5 1.78; with H = 50 they are 1.91,
1.98, 1.88 and 1.87 (`benchmarks.methods`).

Streaming DiLoCo cuts the parameters into F fragments of about equal size, inside of parameters where need be, and
brings one of them together every H / F steps, so that the peak bandwidth is F times smaller. What is exchanged goes on
its way in the background and is taken tau steps later:

    x_r = alpha x_r + (1 - alpha) y          alpha = 0: the replica's own steps since then are dropped

Sources: Stich, Local SGD Converges Fast and Communicates Little, ICLR 2019; Lin, Stich, Patel and Jaggi, Don't Use
Large Mini-Batches, Use Local SGD, ICLR 2020 (post-local); Douillard et al., DiLoCo, 2023, algorithm 1; Douillard et
al., Streaming DiLoCo with overlapping communication, 2025, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partita.arguments import check_count, check_number
from partita.errors import InputError
from partita.training.sync.exact import Exact
from partita.training.sync.fragments import fragments_of
from partita.training.sync.method import GradientMethod, Part, Peers, State
from partita.training.sync.replica import (
    Begun,
    DivergenceWarning,
    Replica,
    ReplicaMethod,
    ReplicaSync,
    check_compress,
    mean_in_place,
    take_state,
)
from partita.training.sync.rounded import Rounded

LEAST_NESTEROV_STEPS = 10  # between outer steps with momentum, by default
LEAST_PAPER_STEPS = 100  # from which on the paper's momentum is the default
_LR, _MOMENTUM, _LESS_MOMENTUM = 0.7, 0.9, 0.5


@dataclass(frozen=True)
class OuterSettings:
    """H, eta, mu, and how outer gradients are added."""

    every: int
    lr: float
    momentum: float
    compress: GradientMethod


@dataclass(frozen=True, kw_only=True)
class LocalSGD(ReplicaMethod):
    """Every replica trains for itself; every `every` steps all take the mean of their weights.

    State: the weights of the last agreement. Bytes a step: those of one sum over `every`.

    Args:
        every: steps between agreements, H.
        after: so many first steps are exact (post-local SGD).
        compress: how differences of weights are added.

    Example:
        >>> LocalSGD(every=10).sent_bytes([Part("weight", (100,))], Peers((0, 1), 0))
        40.0
    """

    every: int = 10
    after: int = 0
    compress: GradientMethod = field(default_factory=Exact)

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        check_number(self.after, "after", least=0, whole=True)
        check_compress(self.compress)

    @property
    def name(self) -> str:
        return "post_local_sgd" if self.after else "local_sgd"

    @property
    def outer(self) -> OuterSettings:
        return OuterSettings(self.every, 1.0, 0.0, self.compress)

    @property
    def exact_steps(self) -> int:
        return self.after

    @property
    def meets_every(self) -> int:
        return self.every

    def sync_of(self, replica: Replica) -> ReplicaSync:
        return OuterSync(replica, self.outer)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> float:
        return self.compress.sent_bytes(parts, peers) / self.every


@dataclass(frozen=True, kw_only=True)
class DiLoCo(ReplicaMethod):
    """Every replica trains for itself; every `every` steps an outer optimizer moves what they agree on.

    State: the weights of the last agreement and the outer momentum, 2 n elements. Bytes a step: those of one sum over
    `every`.

    Args:
        every: steps between agreements, H.
        outer_lr, outer_momentum: eta and mu; None: 0.7 and 0.9 from H = 100 on, 0.7 and 0.5 from H = 10 on, else 1 and
            0.
        compress: how outer gradients are added.

    Example:
        >>> DiLoCo(every=100).sent_bytes([Part("weight", (100,))], Peers((0, 1), 0))
        4.0
    """

    every: int = 100
    outer_lr: float | None = None
    outer_momentum: float | None = None
    compress: GradientMethod = field(default_factory=Exact)

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        check_outer(self.outer_lr, self.outer_momentum, self.every)
        check_compress(self.compress)

    @property
    def name(self) -> str:
        return "diloco"

    @property
    def outer(self) -> OuterSettings:
        return OuterSettings(self.every, *outer_settings(self.outer_lr, self.outer_momentum, self.every), self.compress)

    @property
    def meets_every(self) -> int:
        return self.every

    def sync_of(self, replica: Replica) -> ReplicaSync:
        return OuterSync(replica, self.outer)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> float:
        return self.compress.sent_bytes(parts, peers) / self.every


@dataclass(frozen=True, kw_only=True)
class StreamingDiLoCo(ReplicaMethod):
    """DiLoCo fragment by fragment, in the background.

    State: as DiLoCo. Bytes a step: those of the sums of all fragments over `every`; at most those of one fragment at a
    time.

    Args:
        every: steps between agreements on the same fragment, H; at least `fragments`.
        fragments: F.
        delay: tau, steps that an exchange has in the background, fewer than there are from one to the next.
        mixing: alpha.
        outer_lr, outer_momentum: as of DiLoCo.
        compress: how outer gradients are added; the paper's has 4 bits an element.
    """

    every: int = 100
    fragments: int = 4
    delay: int = 1
    mixing: float = 0.5
    outer_lr: float | None = None
    outer_momentum: float | None = None
    compress: GradientMethod = field(default_factory=lambda: Rounded(to="int4"))

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        check_outer(self.outer_lr, self.outer_momentum, self.every)
        check_compress(self.compress)
        check_number(self.fragments, "fragments (one is exchanged at a time)", least=1, most=self.every, whole=True)
        check_number(self.delay, "delay", least=0, whole=True)
        check_number(self.mixing, "mixing", least=0, below=1)
        if self.delay >= self.every // self.fragments:
            raise InputError(
                f"delay must be below every // fragments = {self.every // self.fragments}, so that one "
                f"exchange is over before the next begins, but got {self.delay}"
            )

    @property
    def name(self) -> str:
        return "streaming_diloco"

    @property
    def outer(self) -> OuterSettings:
        return OuterSettings(self.every, *outer_settings(self.outer_lr, self.outer_momentum, self.every), self.compress)

    @property
    def meets_every(self) -> int:
        return self.every

    def sync_of(self, replica: Replica) -> ReplicaSync:
        return StreamingSync(replica, self)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> float:
        return sum(self._exchanges_of(parts, peers)) / self.every

    def peak_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        """The most that this process sends for one exchange."""
        return max(self._exchanges_of(parts, peers))

    def _exchanges_of(self, parts: Sequence[Part], peers: Peers) -> list[int]:
        """Bytes that this process sends for each fragment."""
        fragments = fragments_of(parts, self.fragments)
        return [self.compress.sent_bytes([piece.part for piece in own], peers) for own in fragments]


def check_outer(lr: float | None, momentum: float | None, every: int) -> None:
    if lr is not None:
        check_number(lr, "outer_lr", above=0)
    if momentum is not None:
        check_number(momentum, "outer_momentum", least=0, below=1)
    found_lr, found_momentum = outer_settings(lr, momentum, every)
    length = found_lr / (1 - found_momentum)
    if every < LEAST_NESTEROV_STEPS and length > 2:
        warnings.warn(
            f"an outer step after {every} inner steps with outer_lr={found_lr:g} and outer_momentum={found_momentum:g} "
            f"goes {length:.1f} times as far as the mean of the replicas, which is known to diverge; use every >= "
            f"{LEAST_NESTEROV_STEPS}, or outer_momentum=0",
            DivergenceWarning,
            stacklevel=4,
        )


def outer_settings(lr: float | None, momentum: float | None, every: int) -> tuple[float, float]:
    """The outer learning rate and momentum: given ones, or the defaults for so many inner steps."""
    if momentum is None:
        momentum = _MOMENTUM if every >= LEAST_PAPER_STEPS else _LESS_MOMENTUM if every >= LEAST_NESTEROV_STEPS else 0.0
    return (_LR if momentum else 1.0) if lr is None else lr, momentum


class OuterOptimizer:
    """What replicas agree on of some parameters, and how an outer gradient moves it."""

    def __init__(
        self, parameters: Mapping[str, Tensor], settings: OuterSettings, peers: Peers, share: float = 1.0
    ) -> None:
        self._settings, self._share = settings, share
        self._shares, self._num_steps = 0.0, 0  # their sum, over the steps since the last agreement
        self.values = list(parameters.values())  # of the replica
        self.agreed = [value.detach().clone() for value in self.values]
        parts = [Part(name, tuple(value.shape)) for name, value in parameters.items()]
        self.sums = settings.compress.sum_of(parts, peers)
        self.velocity = [torch.zeros_like(value) for value in self.values] if settings.momentum else []

    def count(self, share: float) -> None:
        """The replica has made a step on that share of the rows."""
        self._share = share
        self._shares += share
        self._num_steps += 1

    @property
    def share(self) -> float:
        """The mean of the replica's shares since the last agreement."""
        return self._shares / self._num_steps if self._num_steps else self._share

    def gradient(self) -> list[Tensor]:
        """This replica's part of the outer gradient."""
        share = self.share
        self._shares, self._num_steps = 0.0, 0
        return [(y - x).mul_(share) for y, x in zip(self.agreed, self.values, strict=True)]

    def move(self, outer: Sequence[Tensor]) -> None:
        """Moves what is agreed on; all replicas do so alike."""
        lr, momentum = self._settings.lr, self._settings.momentum
        for i, (y, direction) in enumerate(zip(self.agreed, outer, strict=True)):
            if momentum:
                self.velocity[i].mul_(momentum).add_(direction)
                direction = direction + momentum * self.velocity[i]
            y.sub_(direction, alpha=lr)

    def take(self, mixing: float = 0.0) -> None:
        """The replica goes on from what is agreed on, or from a mixture with its own weights."""
        for x, y in zip(self.values, self.agreed, strict=True):
            if mixing:
                x.lerp_(y, 1 - mixing)
            else:
                x.copy_(y)

    def restart(self) -> None:
        """What is agreed on are the replica's weights."""
        self._shares, self._num_steps = 0.0, 0
        for y, x in zip(self.agreed, self.values, strict=True):
            y.copy_(x)
        for kept in (*self.velocity, *self.sums.state().values()):
            kept.zero_()

    def state(self, prefix: str) -> State:
        found = {f"{prefix}.agreed.{i}": value for i, value in enumerate(self.agreed)}
        found |= {f"{prefix}.velocity.{i}": value for i, value in enumerate(self.velocity)}
        return found | {f"{prefix}.sums.{name}": value for name, value in self.sums.state().items()}

    def resume(self, prefix: str, state: Mapping[str, Tensor] | None) -> None:
        """Goes on from a state, as far as it is one of these parameters, else from the replica's weights."""
        self.restart()
        take_state(self.state(prefix), state)


class OuterSync(ReplicaSync):
    def __init__(self, replica: Replica, settings: OuterSettings) -> None:
        super().__init__(replica)
        self._every = settings.every
        self._outer = OuterOptimizer(replica.parameters, settings, replica.peers, replica.share)

    def after_step(self, step: int) -> None:
        self._outer.count(self.replica.share)
        if step % self._every == 0:
            self._agree()

    def _agree(self) -> None:
        outer = self._outer
        outer.move(outer.sums(outer.gradient(), self.replica.line))
        outer.take()
        mean_in_place(list(self.replica.buffers.values()), self.replica.share, self.replica.line)
        self.error = outer.sums.error

    def equalise(self) -> None:
        """The mean of the weights as they are; what was agreed on stays the origin of the next outer gradient."""
        mean_in_place(self._outer.values, self._outer.share, self.replica.line)
        mean_in_place(list(self.replica.buffers.values()), self.replica.share, self.replica.line)

    def restart(self) -> None:
        self._outer.restart()

    def state(self) -> State:
        return self._outer.state("outer")


class StreamingSync(ReplicaSync):
    def __init__(self, replica: Replica, method: StreamingDiLoCo) -> None:
        super().__init__(replica)
        self._method = method
        held = replica.parameters
        self._fragments = [
            OuterOptimizer(
                {piece.part.name: piece.of(held[piece.parameter.name]) for piece in own},
                method.outer,
                replica.peers,
                replica.share,
            )
            for own in fragments_of(replica.parts, method.fragments)
        ]
        self._begun: tuple[int, int, Begun] | None = None  # fragment, step, exchange

    def after_step(self, step: int) -> None:
        for fragment in self._fragments:
            fragment.count(self.replica.share)
        if self._begun is not None and step >= self._begun[1] + self._method.delay:
            self._take(step)
        for number in range(len(self._fragments)):
            if (step - self._offset(number)) % self._method.every == 0:
                self._begin(number, step)
                if self._method.delay == 0:
                    self._take(step)

    def _offset(self, number: int) -> int:
        return number * self._method.every // len(self._fragments)

    def _begin(self, number: int, step: int) -> None:
        if self._begun is not None:
            self._take(step)
        fragment = self._fragments[number]
        exchange = functools.partial(fragment.sums, fragment.gradient())
        self._begun = number, step, self.replica.errand(f"fragment {number} of step {step}", exchange)

    def _take(self, step: int) -> None:
        assert self._begun is not None
        number, begun, errand = self._begun
        self._begun = None
        fragment = self._fragments[number]
        fragment.move(errand.wait())
        fragment.take(self._method.mixing if self._method.delay else 0.0)
        self.error, self.staleness = fragment.sums.error, step - begun
        if number == 0:  # once a round
            mean_in_place(list(self.replica.buffers.values()), self.replica.share, self.replica.line)

    def equalise(self) -> None:
        if self._begun is not None:
            self._take(self._begun[1])
        for fragment in self._fragments:
            mean_in_place(fragment.values, fragment.share, self.replica.line)
        mean_in_place(list(self.replica.buffers.values()), self.replica.share, self.replica.line)

    def restart(self) -> None:
        for fragment in self._fragments:
            fragment.restart()

    def state(self) -> State:
        found: State = {}
        for number, fragment in enumerate(self._fragments):
            found |= fragment.state(f"fragment.{number}")
        return found
