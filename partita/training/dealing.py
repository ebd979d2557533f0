"""Equal pieces of a batch dealt to processes of unequal speed."""

from __future__ import annotations

from collections.abc import Sequence

from partita.units import split_evenly

GAIN = 0.1  # of the step's time, from which on pieces are dealt anew
SMOOTHING = 0.3  # weight of the newest time
NUM_FIRST = 2  # steps of a new round of processes that are not looked at
NUM_SURE = 12  # after so many, a speed is no chance


def deal(num_pieces: int, times_s: Sequence[float]) -> tuple[int, ...]:
    """How many pieces each process gets so that the last one is ready soonest; `times_s` are theirs for a piece.

    One after the other goes to whoever is ready first with it, which is the best there is for equal pieces.

    >>> deal(12, [1.0, 1.0, 4.0])
    (6, 5, 1)
    """
    counts = [0] * len(times_s)
    for _ in range(num_pieces):
        first = min(range(len(counts)), key=lambda i: ((counts[i] + 1) * times_s[i], i))
        counts[first] += 1
    return tuple(counts)


def ready_s(counts: Sequence[int], times_s: Sequence[float]) -> float:
    """When the last process is ready."""
    return max(count * time_s for count, time_s in zip(counts, times_s, strict=True))


class Dealer:
    """Deals the pieces of every step; all processes make the same calls with the same values, and so agree."""

    def __init__(self, num_pieces: int) -> None:
        self._num_pieces = num_pieces
        self._times_s: list[float] = []
        self._counts: tuple[int, ...] = ()
        self._num_learnt = 0

    def start(self, num: int) -> None:
        """So many processes take part from now on; nothing is known of their speeds."""
        self._times_s, self._num_learnt = [], 0
        self._counts = split_evenly(self._num_pieces, num)

    @property
    def counts(self) -> tuple[int, ...]:
        """Pieces of each process."""
        return self._counts

    def learn(self, times_s: Sequence[float]) -> None:
        """What a piece took on each of them in the last step (0: it had none). The first steps of a round are no
        measure: whoever has just come in compiles."""
        self._num_learnt += 1
        if self._num_learnt <= NUM_FIRST:
            return
        if not self._times_s:
            known = [time_s for time_s in times_s if time_s > 0]
            if not known:
                return
            self._times_s = [time_s or sum(known) / len(known) for time_s in times_s]
        else:
            pairs = zip(self._times_s, times_s, strict=True)
            self._times_s = [old + SMOOTHING * (new - old) if new > 0 else old for old, new in pairs]
        wanted = deal(self._num_pieces, self._times_s)
        if ready_s(wanted, self._times_s) < (1 - GAIN) * ready_s(self._counts, self._times_s):
            self._counts = wanted

    @property
    def slowness(self) -> tuple[float, ...]:
        """How many times as long as the fastest each takes for a piece; nothing before enough steps were seen."""
        if self._num_learnt < NUM_SURE:
            return ()
        least = min(self._times_s, default=1.0)
        return tuple(time_s / least for time_s in self._times_s)
