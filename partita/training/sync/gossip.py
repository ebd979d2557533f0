"""Stochastic gradient push: after its own step every replica averages with one other, another one each time.

Replica r keeps x_r and a weight a_r (1 at first), and trains on z_r = x_r / a_r. After the optimizer has moved z_r by
d,

    x_r = x_r + d a_r
    send x_r / 2 and a_r / 2 to replica r + 2^(k mod log2 R),  k the number of the exchange
    x_r, a_r = what is left + what was received

Every replica sends to one and receives from one. After log2 R exchanges without steps in between all would be equal (R
a power of two). With `complete`, a replica averages with all others at once, which with SGD is the exact step.

Source: Assran, Loizou, Ballas and Rabbat, Stochastic Gradient Push for Distributed Deep Learning, ICML 2019, algorithm
1 and the exponential graph of section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from partita.arguments import check_count
from partita.program.instructions import TensorSpec
from partita.training.sync.exact import dense_bytes
from partita.training.sync.method import Part, Peers, State, flat_of
from partita.training.sync.replica import Replica, ReplicaMethod, ReplicaSync, copy_flat, mean_in_place


@dataclass(frozen=True, kw_only=True)
class Gossip(ReplicaMethod):
    """Averages with one neighbour at a time.

    State: a weight. Bytes a step: 4 n + 4, over `every`; with `complete` those of an exact sum.

    Args:
        every: steps between exchanges.
        complete: average with all other replicas at once.

    Example:
        >>> Gossip().sent_bytes([Part("weight", (100,))], Peers((0, 1, 2, 3), 0))
        404.0
    """

    every: int = 1
    complete: bool = False

    def __post_init__(self) -> None:
        check_count(self.every, "every")

    @property
    def name(self) -> str:
        return "gossip"

    @property
    def meets_every(self) -> int:
        return self.every

    @property
    def weighs_rows(self) -> bool:
        """Neighbours take halves of each other, whatever rows they have trained on."""
        return self.complete

    def sync_of(self, replica: Replica) -> ReplicaSync:
        return GossipSync(replica, self)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> float:
        num_elements = sum(part.num_elements for part in parts)
        if self.complete:
            return dense_bytes(num_elements, peers) / self.every
        return (4 * num_elements + 4) / self.every if peers.num > 1 else 0.0


class GossipSync(ReplicaSync):
    def __init__(self, replica: Replica, method: Gossip) -> None:
        super().__init__(replica)
        self._method = method
        self._values = list(replica.parameters.values())
        self._weight = torch.ones(1)
        self._num_exchanges = torch.zeros((), dtype=torch.int64)
        num = replica.peers.num
        self._hops = [2**k for k in range(max(math.ceil(math.log2(num)), 1))] if num > 1 else []

    def after_step(self, step: int) -> None:
        if step % self._method.every or not self._hops:
            return
        if self._method.complete:
            mean_in_place([*self._values, *self.replica.buffers.values()], self.replica.share, self.replica.line)
            return
        self._push()

    def _push(self) -> None:
        """`z` is what the replica trains on; x = a z never has to be kept, since d moves x by a d."""
        peers = self.replica.peers
        hop = self._hops[int(self._num_exchanges) % len(self._hops)]
        self._num_exchanges += 1
        to, origin = peers.ranks[(peers.place + hop) % peers.num], peers.ranks[(peers.place - hop) % peers.num]
        flat = flat_of([*self._values, torch.ones(1)])
        flat *= self._weight / 2  # half of x, and half of a at its end
        received = self.replica.line.exchange({to: [flat]}, {origin: [TensorSpec(tuple(flat.shape), flat.dtype)]})
        flat += received[origin][0]
        self._weight.copy_(flat[-1:])
        flat /= float(self._weight)
        copy_flat(flat[:-1], self._values)

    def equalise(self) -> None:
        """The mean of x over all replicas, which exchanges leave as it is."""
        num, weight = self.replica.peers.num, float(self._weight)
        mean_in_place(self._values, weight / num, self.replica.line)
        mean_in_place(list(self.replica.buffers.values()), self.replica.share, self.replica.line)
        self._weight.fill_(1.0)

    def restart(self) -> None:
        self._weight.fill_(1.0)

    def state(self) -> State:
        return {"weight": self._weight, "num_exchanges": self._num_exchanges}
