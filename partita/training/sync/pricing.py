"""What methods cost: bytes by their formulas, and computing by running them against nobody.

A method computes, and talks to other processes over a `Line`; it does nothing else. Over a line whose other ends answer
at once, with what they were sent, it takes the time of its own computing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.cost.sums import EXACT_SUM, SumCost
from partita.program.instructions import TensorSpec
from partita.training.sync.exact import Exact
from partita.training.sync.method import GradientMethod, Part, Peers
from partita.training.sync.outer import DiLoCo, LocalSGD, StreamingDiLoCo
from partita.training.sync.replica import Replica

MOST_ELEMENTS = 4 * 2**20  # that a method is tried with; larger models cost in proportion
NUM_TRIALS = 3

Periodic = LocalSGD | DiLoCo | StreamingDiLoCo


@dataclass(frozen=True, kw_only=True)
class PeriodicCost:
    """Of a step of one replica, in the mean: seconds of computing, bytes that it sends, and bytes at a time."""

    compute_s: float
    sent_bytes: float
    bytes_at_once: float


def sum_cost(method: GradientMethod, parts: Sequence[Part], peers: Peers) -> SumCost:
    """What sums of gradients cost by a method.

    Example:
        >>> from partita.training.sync.rounded import Rounded
        >>> round(sum_cost(Rounded(to="bf16"), [Part("weight", (1000, 1000))], Peers((0, 1), 0)).sent_share, 2)
        0.5
    """
    exact_bytes = Exact().sent_bytes(parts, peers)
    if isinstance(method, Exact) or not exact_bytes:
        return EXACT_SUM
    tried = _sample(parts)
    formed, line = method.sum_of(tried, peers), _EmptyLine()
    values = [torch.randn(part.shape) for part in tried]
    compute_s = _least_s(lambda: formed([value.clone() for value in values], line))
    return SumCost(
        sent_share=method.sent_bytes(parts, peers) / exact_bytes,
        compute_s_per_byte=compute_s / (4 * _num_elements(tried)),
    )


def periodic_cost(method: Periodic, parts: Sequence[Part], peers: Peers) -> PeriodicCost:
    """What it costs that replicas agree by a method, which they do every so many steps."""
    tried = _sample(parts)
    sync = method.sync_of(
        Replica(
            parameters={part.name: torch.randn(part.shape) for part in tried},
            buffers={},
            peers=peers,
            share=1 / peers.num,
            line=_EmptyLine(),
            errand=lambda key, call: _Done(call(_EmptyLine())),
        )
    )

    def period() -> None:
        for step in range(1, method.every + 1):
            sync.after_step(step)

    compute_s = _least_s(period) * (_num_elements(parts) / max(_num_elements(tried), 1))
    if isinstance(method, StreamingDiLoCo):
        at_once = float(method.peak_bytes(parts, peers))
    else:
        at_once = method.sent_bytes(parts, peers) * method.every
    return PeriodicCost(
        compute_s=compute_s / method.every, sent_bytes=method.sent_bytes(parts, peers), bytes_at_once=at_once
    )


class _EmptyLine:
    """A line with nobody at its other ends."""

    bytes_sent = 0

    def all_reduce(self, value: Tensor) -> None:
        pass

    def exchange(
        self, outgoing: Mapping[int, Sequence[Tensor]], incoming: Mapping[int, Sequence[TensorSpec]]
    ) -> dict[int, list[Tensor]]:
        echo = next(iter(outgoing.values()), [])
        return {rank: [_like(spec, echo, i) for i, spec in enumerate(specs)] for rank, specs in incoming.items()}


def _like(spec: TensorSpec, echo: Sequence[Tensor], i: int) -> Tensor:
    """Tensor `i` of what was sent, where it is of the announced shape, else zeros."""
    if i < len(echo) and (tuple(echo[i].shape), echo[i].dtype) == (spec.shape, spec.dtype):
        return echo[i].clone()
    return torch.zeros(spec.shape, dtype=spec.dtype)


@dataclass(frozen=True)
class _Done:
    result: list[Tensor]
    is_over: bool = True

    def wait(self) -> list[Tensor]:
        return self.result


def _sample(parts: Sequence[Part]) -> list[Part]:
    """The smallest parts, as far as they are small together, but at least one that is not empty."""
    found: list[Part] = []
    total = 0
    for part in sorted(parts, key=lambda part: part.num_elements):
        if total and total + part.num_elements > MOST_ELEMENTS:
            break
        found.append(part)
        total += part.num_elements
    return found


def _num_elements(parts: Sequence[Part]) -> int:
    return sum(part.num_elements for part in parts)


def _least_s(call: Callable[[], object]) -> float:
    """The least seconds of some calls, of which the first one does not count: it makes what later ones reuse."""
    times_s = []
    with torch.no_grad():
        for _ in range(1 + NUM_TRIALS):
            start_s = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - start_s)
    return min(times_s[1:])
