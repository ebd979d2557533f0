"""Sums over processes that come and go.

What a process keeps between sums (error feedback) is its own and knows nothing of the others, so it goes on whoever
they are next time. A sum that was broken off has changed nothing: it works on a copy of what is kept, which counts once
all have agreed that the sum does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from partita.runtime.transport import Line
from partita.training.sync.method import GradientMethod, GradientSum, Part, Peers, State


class MovingSum:
    """One sum, again and again, among others every time.

    Args:
        method: one whose sums keep what is a process' own (`keeps_its_own`).
        parts: of what is summed.
    """

    def __init__(self, method: GradientMethod, parts: Sequence[Part]) -> None:
        self._method, self._parts = method, tuple(parts)
        self._kept = method.sum_of(self._parts, Peers((0,), 0)).state()
        self._tried: GradientSum | None = None
        self.error = 0.0  # as of `GradientSum`, of the last sum that counted

    def attempt(self, values: Sequence[Tensor], peers: Peers, line: Line) -> list[Tensor]:
        """The sums over these processes; counts once `commit` is called."""
        self._tried = self._method.sum_of(self._parts, peers)
        self._tried.load(self._kept)
        return self._tried(values, line)

    def commit(self) -> None:
        """What the last attempt kept is what is kept."""
        if self._tried is not None:
            self._kept, self.error, self._tried = self._tried.state(), self._tried.error, None

    def forget(self) -> None:
        """This process starts with nothing kept."""
        for value in self._kept.values():
            value.zero_()

    def state(self) -> State:
        """What is kept: tensors in use until the next `commit`."""
        return dict(self._kept)
