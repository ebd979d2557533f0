"""DeMo: decoupled momentum. Every process keeps a momentum of its own and sends only its fastest-moving components.

Of every part, cut into blocks of at most `block` x `block` elements, with B the orthonormal discrete cosine transform
of a block (type II, along both dims):

    m_p = momentum m_p + g_p
    q_p = the k components of B m_p that are largest in absolute value, block by block
    m_p = m_p - B^-1 q_p
    sum = B^-1 (sum over p of q_p)

Momenta are never equalised: what a process has not sent stays its own. With `sign`, the optimizer gets the signs of the
sums, as in the paper (signum); the learning rate is then the length of a step. The optimizer must have no momentum of
its own. With k = all components and momentum 0 it is the exact sum.

Source: Peng, Quesnelle and Kingma, DeMo: Decoupled Momentum Optimization, 2024, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from partita.arguments import check_count, check_number
from partita.program.instructions import TensorSpec
from partita.runtime.transport import Line
from partita.training.sync.method import GradientMethod, GradientSum, Part, Peers, State, check_has_no_momentum


@dataclass(frozen=True, kw_only=True)
class DeMo(GradientMethod):
    """Decoupled momentum.

    State: n elements. Bytes a step: (P-1) times 6 bytes (a place of 2, a value of 4) for each of `components` of every
    block; where a block has fewer elements, 4 bytes for each of them and no places.

    Args:
        components: k, of every block.
        block: largest extent of a block; the largest divisor of a parameter's extent up to it is taken. At most 256.
        momentum: how much of the momentum stays from step to step.
        sign: whether the optimizer gets the signs of the sums only.

    Example:
        >>> DeMo(components=32).sent_bytes([Part("weight", (128, 64))], Peers((0, 1), 0))
        384
    """

    components: int = 32
    block: int = 64
    momentum: float = 0.999
    sign: bool = True

    def __post_init__(self) -> None:
        check_count(self.components, "components")
        check_number(self.block, "block", least=1, most=256, whole=True)
        check_number(self.momentum, "momentum", least=0, below=1)

    @property
    def name(self) -> str:
        return "demo"

    @property
    def needs_whole_parameters(self) -> bool:
        return True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        check_has_no_momentum(optimizer, "DeMo")

    def sum_of(self, parts: Sequence[Part], peers: Peers) -> GradientSum:
        return DeMoSum(parts, peers, self)

    def sent_bytes(self, parts: Sequence[Part], peers: Peers) -> int:
        total = 0
        for part in parts:
            blocks = Blocks(part.shape, self.block)
            few = self.components < blocks.size
            total += blocks.num * (6 * self.components if few else 4 * blocks.size)
        return total * (peers.num - 1)


@lru_cache(maxsize=64)
def cosines(extent: int) -> Tensor:
    """The orthonormal discrete cosine transform of type II, a square matrix."""
    row = torch.arange(extent, dtype=torch.float64)
    matrix = torch.cos(math.pi / extent * (row + 0.5).unsqueeze(0) * row.unsqueeze(1)) * math.sqrt(2 / extent)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


class Blocks:
    """How a tensor of some shape is cut into blocks; vectors into blocks of one row."""

    def __init__(self, shape: tuple[int, ...], most: int) -> None:
        self.shape = shape
        self.matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        self.extents = tuple(_divisor(extent, most) for extent in self.matrix)
        self.size = math.prod(self.extents)
        self.num = math.prod(self.matrix) // self.size if self.size else 0

    def transform(self, value: Tensor) -> Tensor:
        """Components, one row a block."""
        (rows, columns), (h, w) = self.matrix, self.extents
        blocks = value.reshape(rows // h, h, columns // w, w).permute(0, 2, 1, 3)
        return (cosines(h) @ blocks @ cosines(w).T).reshape(self.num, self.size)

    def inverse(self, components: Tensor) -> Tensor:
        (rows, columns), (h, w) = self.matrix, self.extents
        blocks = cosines(h).T @ components.view(rows // h, columns // w, h, w) @ cosines(w)
        return blocks.permute(0, 2, 1, 3).reshape(self.shape)


def _divisor(extent: int, most: int) -> int:
    """The largest divisor of `extent` that is at most `most`."""
    return next(size for size in range(min(extent, most), 0, -1) if extent % size == 0) if extent else 1


class DeMoSum(GradientSum):
    def __init__(self, parts: Sequence[Part], peers: Peers, method: DeMo) -> None:
        super().__init__(parts, peers)
        self._method = method
        self._blocks = [Blocks(part.shape, method.block) for part in parts]
        self._momenta = [torch.zeros(part.shape) for part in parts]

    def __call__(self, values: Sequence[Tensor], line: Line) -> list[Tensor]:
        missing = wanted = 0.0
        sent: list[Tensor] = []
        for blocks, momentum, value in zip(self._blocks, self._momenta, values, strict=True):
            momentum.mul_(self._method.momentum).add_(value.reshape(momentum.shape))
            wanted += float(momentum.square().sum())
            code, own = self._chosen(blocks, blocks.transform(momentum))
            sent += code
            momentum -= blocks.inverse(own)
            missing += float(momentum.square().sum())
        self.error = math.sqrt(missing / wanted) if wanted else 0.0
        specs = [TensorSpec(tuple(item.shape), item.dtype) for item in sent]
        received = {self.peers.rank: sent}
        if self.peers.num > 1:
            others = self.peers.others
            received |= line.exchange(dict.fromkeys(others, sent), {rank: list(specs) for rank in others})
        return self._sums([received[rank] for rank in self.peers.ranks])

    def _chosen(self, blocks: Blocks, components: Tensor) -> tuple[list[Tensor], Tensor]:
        """What travels of a part's components, and the components that this stands for."""
        k = self._method.components
        if k >= blocks.size:
            return [components], components
        places = torch.topk(components.abs(), k, dim=1, sorted=False).indices
        values = components.gather(1, places)
        own = torch.zeros_like(components).scatter_(1, places, values)
        return [(places - 2**15).to(torch.int16), values], own

    def _sums(self, received: Sequence[list[Tensor]]) -> list[Tensor]:
        """Added in the order of ranks."""
        streams = [iter(tensors) for tensors in received]
        sums = []
        for blocks in self._blocks:
            total = torch.zeros(blocks.num, blocks.size)
            for stream in streams:
                item = next(stream)
                if item.dtype == torch.int16:
                    total.scatter_add_(1, item.long() + 2**15, next(stream))
                else:
                    total += item
            value = blocks.inverse(total)
            sums.append(value.sign_() if self._method.sign else value)
        return sums

    def state(self) -> State:
        return {f"momentum.{part.name}": value for part, value in zip(self.parts, self._momenta, strict=True)}
