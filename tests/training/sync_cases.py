"""Processes of a sum, as threads of this one: lines that count what they would send."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from plain_training import train_plain
from torch import Tensor, nn

from partita.program.instructions import TensorSpec
from partita.program.wire import sum_bytes
from partita.training.sync.method import GradientMethod, GradientSum, Part, Peers

PARTS = (Part("weight", (12, 20)), Part("bias", (12,)), Part("conv", (8, 3, 3, 3)), Part("flat[3:70]", (67,)))


class Hub:
    """Where the lines of all processes meet."""

    def __init__(self, num: int) -> None:
        self.barrier = threading.Barrier(num, timeout=30)
        self.brought: dict[int, Any] = {}

    def meet(self, rank: int, value: Any) -> dict[int, Any]:
        self.brought[rank] = value
        self.barrier.wait()
        found = dict(self.brought)
        self.barrier.wait()
        return found


class ThreadLine:
    def __init__(self, hub: Hub, ranks: tuple[int, ...], rank: int) -> None:
        self.bytes_sent = 0
        self._hub, self._ranks, self._rank = hub, ranks, rank

    def all_reduce(self, value: Tensor) -> None:
        assert value.is_contiguous()
        self.bytes_sent += sum_bytes(
            value.numel(), value.element_size(), len(self._ranks), self._ranks.index(self._rank)
        )
        found = self._hub.meet(self._rank, value.clone())
        value.copy_(sum(found[rank] for rank in self._ranks))

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
    ) -> dict[int, list[Tensor]]:
        assert self._rank not in outgoing and self._rank not in incoming
        self.bytes_sent += sum(value.nbytes for values in outgoing.values() for value in values)
        copies = {rank: [value.clone() for value in values] for rank, values in outgoing.items()}
        found = self._hub.meet(self._rank, copies)
        result = {rank: list(found[rank][self._rank]) for rank in incoming}
        for rank, values in result.items():
            assert [(tuple(v.shape), v.dtype) for v in values] == [(s.shape, s.dtype) for s in incoming[rank]]
        return result


def on_processes(num: int, function: Callable[[int, ThreadLine, Peers], Any]) -> list[Any]:
    """What the function gives on each of `num` processes; their ranks are not their places."""
    ranks = tuple(range(3, 3 + 2 * num, 2))
    hub = Hub(num)

    def run(place: int) -> Any:
        try:
            return function(place, ThreadLine(hub, ranks, ranks[place]), Peers(ranks, ranks[place]))
        except BaseException:
            hub.barrier.abort()
            raise

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(run, range(num)))


def gradients(place: int, step: int, parts: Sequence[Part] = PARTS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + place)
    scales = torch.logspace(-1, 1, len(parts))
    return [scale * torch.randn(part.shape, generator=generator) for scale, part in zip(scales, parts, strict=True)]


def exact_sums(num: int, step: int, parts: Sequence[Part] = PARTS) -> list[Tensor]:
    brought = [gradients(place, step, parts) for place in range(num)]
    return [sum(several[1:], several[0]) for several in zip(*brought, strict=True)]


def run_steps(
    method: GradientMethod, num: int, steps: int, parts: Sequence[Part] = PARTS
) -> list[tuple[list[list[Tensor]], list[int], GradientSum]]:
    """By process: the sums of every step, the bytes sent in every step, and the sum object."""

    def one(place: int, line: ThreadLine, peers: Peers) -> tuple[list[list[Tensor]], list[int], GradientSum]:
        formed = method.sum_of(parts, peers)
        sums, sent = [], []
        for step in range(steps):
            before = line.bytes_sent
            sums.append([value.clone() for value in formed(gradients(place, step, parts), line)])
            sent.append(line.bytes_sent - before)
        return sums, sent, formed

    return on_processes(num, one)


def plain_losses(net: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> list[float]:
    """The losses of plain PyTorch, which trains the module."""
    return train_plain(net, torch.optim.SGD(net.parameters(), lr=0.1), batches, loss_fn)
