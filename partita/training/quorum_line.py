"""Messages among the members of a quorum, over the process group that torchft makes anew for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partita.errors import PeerLostError
from partita.program.instructions import TensorSpec
from partita.program.wire import ring_bytes
from partita.runtime.processes import as_bytes
from partita.training.sync.method import Peers


class QuorumLine:
    """A `Line` of CPU tensors among the members of one quorum, whose ranks are their places in it.

    Args:
        group: torchft's, of this quorum.
        limit: of every wait.
        sent_to: counts what this process sends, by rank.

    Raises:
        PeerLostError: of every call, when a member is gone or does not answer within the limit.
    """

    def __init__(self, group: Any, limit: timedelta, sent_to: Counter[int]) -> None:
        self._group, self._limit = group, limit
        self.sent_to = sent_to
        self.peers = Peers(tuple(range(group.size())), group.rank())

    @property
    def bytes_sent(self) -> int:
        return self.sent_to.total()

    def all_reduce(self, value: Tensor) -> None:
        if self.peers.num == 1 or not value.numel():
            return
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM
        self._guard(lambda: self._group.allreduce([value], options).wait(self._limit), "a sum")
        count_ring(self.sent_to, value.nbytes, self.peers)

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
    ) -> dict[int, list[Tensor]]:
        result = {
            rank: [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs] for rank, specs in incoming.items()
        }
        sent, received = _messages(outgoing), _messages(result)

        def move() -> None:
            works = [self._group.recv([value], rank, tag) for rank, tag, value in received]
            works += [self._group.send([value], rank, tag) for rank, tag, value in sent]
            for work in works:
                work.wait(self._limit)

        self._guard(move, "an exchange")
        for rank, _, value in sent:
            self.sent_to[rank] += value.nbytes
        return result

    def _guard(self, call: Callable[[], object], what: str) -> None:
        try:
            call()
        except RuntimeError as error:  # gloo's have no class of their own
            reason = str(error).splitlines()[0]
            raise PeerLostError(
                f"member {self.peers.rank} of the quorum lost another one in {what}: {reason}"
            ) from error


def _messages(values: Mapping[int, Sequence[Tensor]]) -> list[tuple[int, int, Tensor]]:
    """What has any bytes: by rank, with a tag that tells the messages between two apart."""
    return [
        (rank, tag, as_bytes(value)) for rank, own in values.items() for tag, value in enumerate(own) if value.numel()
    ]


def count_ring(sent_to: Counter[int], num_bytes: int, peers: Peers) -> None:
    """A sum of so many bytes has gone round the ring of the members."""
    if sent := ring_bytes(num_bytes, peers.num):
        sent_to[(peers.place + 1) % peers.num] += sent
