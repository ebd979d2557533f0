"""Asynchronous SGD with bounded staleness: gradients are summed in the background, and applied when they are there.

In step t every replica computes its gradient g_r(t) on the weights that it has, and its sum with those of the others
begins in the background. Then it applies all sums that are over, in the order of their steps, and waits only if more
than s of them are on their way:

    weights in step t  =  weights after the update of some step v,  t - 1 - s <= v <= t - 1

All replicas make the same updates in the same order, so they hold the same weights whenever they have made equally
many, and any optimizer keeps its meaning. A replica that is late for a moment does not stop the others until they are s
steps ahead. With s = 0 it is the exact step.

Source: Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server, NeurIPS 2013 (the
bound); without a server, as the sums are formed by the replicas themselves.
"""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from partita.arguments import check_number
from partita.training.sync.exact import Exact
from partita.training.sync.method import GradientMethod, Part, Peers, State
from partita.training.sync.replica import (
    Begun,
    DivergenceWarning,
    Gradients,
    Replica,
    ReplicaMethod,
    ReplicaSync,
    check_compress,
    mean_in_place,
)

LEAST_WARNED = 2  # staleness from which on momentum is warned of


@dataclass(frozen=True, kw_only=True)
class Stale(ReplicaMethod):
    """Gradients are applied up to `staleness` steps late.

    State: none of its own; what is on its way is applied before anything is saved. Bytes a step: those of a sum.

    Args:
        staleness: s, how many sums may be on their way.
        compress: how gradients are added.

    Example:
        >>> Stale(staleness=1).sent_bytes([Part("weight", (100,))], Peers((0, 1), 0))
        400.0
    """

    staleness: int = 1
    compress: GradientMethod = field(default_factory=Exact)

    def __post_init__(self) -> None:
        check_number(self.staleness, "staleness", least=0, whole=True)
        check_compress(self.compress)

    @property
    def name(self) -> str:
        return "stale"

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Warns of late gradients with momentum: a direction is followed for 1 / (1 - momentum) steps before the first
        gradient that speaks against it is seen."""
        momentum = max((float(group.get("momentum", 0.0)) for group in optimizer.param_groups), default=0.0)
        if momentum and self.staleness >= LEAST_WARNED:
            warnings.warn(
                f"gradients that are up to {self.staleness} steps late with momentum {momentum:g} are known to diverge "
                f"at learning rates that are right without delay; use momentum=0, a learning rate that is "
                f"{1 / (1 - momentum):.0f} times smaller, or staleness=1",
                DivergenceWarning,
                stacklevel=3,
            )

    def sync_of(self, replica: Replica) -> ReplicaSync:
        return StaleSync(replica, self)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> float:
        return float(self.compress.sent_bytes(parts, peers))


@dataclass
class _OnItsWay:
    step: int
    errand: Begun


class StaleSync(ReplicaSync):
    takes_gradients = True

    def __init__(self, replica: Replica, method: Stale) -> None:
        super().__init__(replica)
        self._method = method
        self._names = list(replica.parameters)
        self._sums = method.compress.sum_of(replica.parts, replica.peers)
        self._waiting: deque[_OnItsWay] = deque()
        self._num_begun = 0

    def due(self, gradients: Gradients) -> list[Gradients]:
        brought = [
            gradients[name].mul(self.replica.share) if name in gradients else value.new_zeros(value.shape)
            for name, value in self.replica.parameters.items()
        ]
        self._num_begun += 1
        errand = self.replica.errand(f"gradients of step {self._num_begun}", functools.partial(self._sums, brought))
        self._waiting.append(_OnItsWay(self._num_begun, errand))
        found = []
        while self._waiting and (len(self._waiting) > self._method.staleness or self._waiting[0].errand.is_over):
            found.append(self._next())
        return found

    def _next(self) -> Gradients:
        item = self._waiting.popleft()
        sums = item.errand.wait()
        self.staleness = self._num_begun - item.step
        self.error = self._sums.error
        return dict(zip(self._names, sums, strict=True))

    def after_step(self, step: int) -> None:
        """All is done by `due`."""

    def settle(self) -> list[Gradients]:
        return [self._next() for _ in range(len(self._waiting))]

    def equalise(self) -> None:
        """Once all is settled the weights are equal already."""
        mean_in_place(list(self.replica.buffers.values()), self.replica.share, self.replica.line)

    def restart(self) -> None:
        for kept in self._sums.state().values():
            kept.zero_()

    def state(self) -> State:
        return self._sums.state()
