"""Sums over processes that come and go: what each keeps goes on, and what was broken off has changed nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from sync_cases import PARTS, ThreadLine, exact_sums, gradients, on_processes

from partita.errors import PeerLostError
from partita.training.sync.exact import Exact
from partita.training.sync.method import GradientMethod, Peers, flat_of
from partita.training.sync.moving import MovingSum
from partita.training.sync.rounded import Rounded
from partita.training.sync.topk import TopK

METHODS: dict[str, GradientMethod] = {
    "exact": Exact(),
    "bf16": Rounded(to="bf16"),
    "int8": Rounded(to="int8"),
    "int4": Rounded(to="int4"),
    "topk": TopK(density=0.05),
}
FED_BACK = ["int8", "int4", "topk"]


class BrokenLine:
    """A line on which everything after so many calls fails."""

    def __init__(self, line: ThreadLine, num_calls: int) -> None:
        self._line, self._left = line, num_calls

    def _call(self, name: str, *arguments: Any) -> Any:
        if not self._left:
            raise PeerLostError("broken")
        self._left -= 1
        return getattr(self._line, name)(*arguments)

    def all_reduce(self, value: Tensor) -> None:
        self._call("all_reduce", value)

    def exchange(self, outgoing: Any, incoming: Any) -> Any:
        return self._call("exchange", outgoing, incoming)


def summed(sums: list[MovingSum], step: int) -> Tensor:
    """What all of these come to, each on a process of its own; all must hold the same bits."""

    def one(place: int, line: ThreadLine, peers: Peers) -> Tensor:
        found = flat_of(sums[place].attempt(gradients(place, step), peers, line))
        sums[place].commit()
        return found

    found = on_processes(len(sums), one)
    assert all(torch.equal(value, found[0]) for value in found)
    return found[0]


def kept(sums: MovingSum) -> Tensor:
    return sum(sums.state().values(), torch.zeros(sum(part.num_elements for part in PARTS)))


@pytest.mark.parametrize("name", FED_BACK)
def test_what_the_living_keep_goes_on_among_others(name: str) -> None:
    """All that was brought has come out, is kept, or was lost with whoever kept it: three, then two, a new third."""
    a, b, c, late = (MovingSum(METHODS[name], PARTS) for _ in range(4))
    came = torch.zeros_like(kept(a))
    brought = torch.zeros_like(came)
    steps = [[a, b, c]] * 3 + [[a, c]] * 3 + [[late, a, c]] * 3
    for step, members in enumerate(steps):
        came += summed(members, step)
        brought += flat_of(exact_sums(len(members), step))
    assert all(float(kept(one).norm()) > 0 for one in (a, b, c, late))
    torch.testing.assert_close(came + sum(kept(one) for one in (a, b, c, late)), brought, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FED_BACK)
def test_alone_it_brings_what_it_has_kept(name: str) -> None:
    a, b = (MovingSum(METHODS[name], PARTS) for _ in range(2))
    summed([a, b], 0)
    wanted = kept(a) + flat_of(gradients(0, 1))
    torch.testing.assert_close(summed([a], 1), wanted)
    assert not kept(a).any()


@pytest.mark.parametrize("num_calls", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_sum_that_breaks_off_has_changed_nothing(name: str, num_calls: int) -> None:
    sums = [MovingSum(METHODS[name], PARTS) for _ in range(3)]
    others = [MovingSum(METHODS[name], PARTS) for _ in range(3)]
    for step in range(2):
        summed(sums, step)
        summed(others, step)
    before = [kept(one).clone() for one in sums]

    def broken(place: int, line: ThreadLine, peers: Peers) -> None:
        try:
            sums[place].attempt(gradients(place, 2), peers, BrokenLine(line, num_calls))  # type: ignore[arg-type]
        except PeerLostError:
            return

    on_processes(3, broken)
    assert all(torch.equal(kept(one), value) for one, value in zip(sums, before, strict=True))
    assert torch.equal(summed(sums, 2), summed(others, 2))


def test_who_forgets_starts_without() -> None:
    a, b = (MovingSum(METHODS["int8"], PARTS) for _ in range(2))
    summed([a, b], 0)
    assert 0 < a.error < 1
    a.forget()
    assert not kept(a).any() and kept(b).any()
