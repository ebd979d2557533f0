"""Top-k: every process sends the few elements of its gradients that are largest; and Deep Gradient Compression.

Of every part, process p sends the k = ceil(density n) elements of g_p + e_p that are largest in absolute value, with
their places, to all others; everyone adds what all have sent. What was not sent is e_p. Density 1 sends everything and
needs no places: it is the exact sum.

Deep Gradient Compression applies the momentum before the choice, so that an element which waits is worth what it would
have done meanwhile (m the momentum):

    u = m u + g_p,   v = v + u,   send the largest of v,   u = v = 0 where sent

The optimizer must then have no momentum of its own.

Sources: Aji and Heafield 2017 (top-k with error feedback: Stich et al. 2018); Lin, Han, Mao, Wang and Dally, Deep
Gradient Compression, ICLR 2018, sections 3.1 to 3.3 (momentum correction and factor masking, local clipping, densities
that fall during the first steps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.arguments import check_number
from partita.program.instructions import TensorSpec
from partita.runtime.transport import Line
from partita.training.sync.exact import dense_bytes
from partita.training.sync.method import (
    GradientMethod,
    GradientSum,
    Part,
    Peers,
    State,
    check_has_no_momentum,
    flat_of,
    share_missing,
    unflat,
)

_WARM_UP = (0.25, 0.0625, 0.015625, 0.004)  # densities of the first quarter of the warm-up, the second, ...


@dataclass(frozen=True, kw_only=True)
class TopK(GradientMethod):
    """The largest elements only.

    State: n elements with error feedback. Bytes a step: 8 k (P-1), with k the sum of the parts' ceil(density n).

    Args:
        density: share of the elements that is sent, above 0, up to 1.
        error_feedback: what is not sent is added to the next gradient. Without it accuracy is lost.

    Example:
        >>> TopK(density=0.01).sent_bytes([Part("weight", (1000,))], Peers((0, 1, 2), 0))
        160
    """

    density: float = 0.01
    error_feedback: bool = True

    def __post_init__(self) -> None:
        check_number(self.density, "density", above=0, most=1)

    @property
    def name(self) -> str:
        return "topk"

    @property
    def keeps_its_own(self) -> bool:
        return True

    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        return TopKSum(parts, peers, self)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        return sparse_bytes(parts, peers, self.density)


@dataclass(frozen=True, kw_only=True)
class DGC(GradientMethod):
    """Deep Gradient Compression.

    State: 2 n elements. Bytes a step: as `TopK`.

    Args:
        density: share of the elements that is sent.
        momentum: of the gradients, in the place of the optimizer's own, which must be 0.
        clip_norm: limit of the norm of the gradient, of which every process' part may have 1/sqrt(P); None: no limit.
        warm_up_steps: over so many first steps density falls from 25 % to `density`.

    Example:
        >>> DGC(density=0.001, momentum=0.9, warm_up_steps=400)
        DGC(density=0.001, momentum=0.9, clip_norm=None, warm_up_steps=400)
    """

    density: float = 0.001
    momentum: float = 0.9
    clip_norm: float | None = None
    warm_up_steps: int = 0

    def __post_init__(self) -> None:
        check_number(self.density, "density", above=0, most=1)
        check_number(self.momentum, "momentum", least=0, below=1)
        if self.clip_norm is not None:
            check_number(self.clip_norm, "clip_norm", above=0)
        check_number(self.warm_up_steps, "warm_up_steps", least=0, whole=True)

    @property
    def name(self) -> str:
        return "dgc"

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        check_has_no_momentum(optimizer, "DGC")

    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        return DGCSum(parts, peers, self)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        return sparse_bytes(parts, peers, self.density)


def counts_of(parts: Sequence[Part], density: float) -> list[int]:
    """How many elements of each part are sent."""
    return [math.ceil(density * part.num_elements) for part in parts]


def sparse_bytes(parts: Sequence[Part], peers: Peers, density: float) -> int:
    if density == 1:
        return dense_bytes(sum(part.num_elements for part in parts), peers)
    return 8 * sum(counts_of(parts, density)) * (peers.num - 1)


def largest_places(flat: Tensor, parts: Sequence[Part], counts: Sequence[int]) -> Tensor:
    """Places in `flat` of the `counts` largest elements of each part, int32, ascending."""
    found, start = [], 0
    for part, count in zip(parts, counts, strict=True):
        piece = flat[start : start + part.num_elements].abs()
        found.append(torch.topk(piece, count, sorted=False).indices.sort().values + start)
        start += part.num_elements
    return torch.cat(found).to(torch.int32)


def sum_of_sparse(places: Tensor, values: Tensor, num_elements: int, peers: Peers, line: Line) -> Tensor:
    """The sum over processes of vectors that are zero but for `values` at `places`; added in the order of ranks."""
    specs = [TensorSpec((len(places),), torch.int32), TensorSpec((len(places),), torch.float32)]
    received = line.exchange(
        {key: [places, values] for key in peers.others}, {rank: list(specs) for rank in peers.others}
    )
    total = torch.zeros(num_elements)
    for rank in peers.ranks:
        theirs, summand = (places, values) if rank == peers.rank else received[rank]
        total.index_add_(0, theirs.long(), summand)
    return total


class TopKSum(GradientSum):
    def __init__(self, parts: Sequence[Part], peers: Peers, method: TopK) -> None:
        super().__init__(parts, peers)
        self._density = method.density
        self._counts = counts_of(parts, method.density)
        self._num_elements = sum(part.num_elements for part in parts)
        keeps = method.error_feedback and method.density < 1
        self._missing = torch.zeros(self._num_elements) if keeps else None

    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        wanted = flat_of(values)
        if self._missing is not None:
            wanted += self._missing
        if self.peers.num == 1:
            if self._missing is not None:
                self._missing.zero_()  # others were there before
            return unflat(wanted, self.parts)
        if self._density == 1:
            line.all_reduce(wanted)
            return unflat(wanted, self.parts)
        places = largest_places(wanted, self.parts, self._counts)
        total = sum_of_sparse(places, wanted[places.long()], self._num_elements, self.peers, line)
        if self._missing is not None:
            self._missing.copy_(wanted).index_fill_(0, places.long(), 0.0)
            self.error = share_missing(self._missing, wanted)
        return unflat(total, self.parts)

    def state(self) -> State:
        return {} if self._missing is None else {"missing": self._missing}


class DGCSum(GradientSum):
    def __init__(self, parts: Sequence[Part], peers: Peers, method: DGC) -> None:
        super().__init__(parts, peers)
        self._method = method
        self._num_elements = sum(part.num_elements for part in parts)
        self._velocity = torch.zeros(self._num_elements)
        self._sum = torch.zeros(self._num_elements)
        self._num_steps = torch.zeros((), dtype=torch.int64)

    @property
    def _density(self) -> float:
        """Of this step."""
        done, over = int(self._num_steps), self._method.warm_up_steps
        if done >= over:
            return self._method.density
        return max(_WARM_UP[done * len(_WARM_UP) // over], self._method.density)

    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        gradient, density = flat_of(values), self._density
        self._num_steps += 1
        if self._method.clip_norm is not None:
            limit = self._method.clip_norm / math.sqrt(self.peers.num)
            norm = float(torch.linalg.vector_norm(gradient))
            gradient *= min(1.0, limit / norm) if norm else 1.0
        self._velocity.mul_(self._method.momentum).add_(gradient)
        self._sum += self._velocity
        if density == 1 or self.peers.num == 1:
            return unflat(self._sum_of_all(line), self.parts)
        places = largest_places(self._sum, self.parts, counts_of(self.parts, density))
        sent = self._sum[places.long()]
        wanted = float(torch.linalg.vector_norm(self._sum))
        for kept in (self._sum, self._velocity):
            kept.index_fill_(0, places.long(), 0.0)
        self.error = float(torch.linalg.vector_norm(self._sum)) / wanted if wanted else 0.0
        return unflat(sum_of_sparse(places, sent, self._num_elements, self.peers, line), self.parts)

    def _sum_of_all(self, line: Line) -> Tensor:
        """Nothing waits, so nothing has to be masked: the velocity is that of plain momentum."""
        total = self._sum.clone()
        self._sum.zero_()
        if self.peers.num > 1:
            line.all_reduce(total)
        return total

    def state(self) -> State:
        return {"velocity": self._velocity, "sum": self._sum, "num_steps": self._num_steps}
