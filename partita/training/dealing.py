"""Equal pieces of a batch dealt to processes of unequal speed, and when it pays to deal them anew."""

from __future__ import annotations

from collections.abc import Sequence

from partita.units import split_evenly

GAIN = 0.1  # of the step's time, from which on pieces are dealt anew
SMOOTHING = 0.3  # weight of the newest time
NUM_FIRST = 2  # steps of a new round of processes that are not looked at
FORGETTING = 0.5  # of what waiting has cost, with every look at which it costs nothing
NUM_SURE = 12  # after so many, a speed is no chance


def deal(num_pieces: int, times_s: Sequence[float], least: int = 0) -> tuple[int, ...]:
    """How many pieces each process gets so that the last one is ready soonest; `times_s` are theirs for a piece. Each
    gets `least` pieces or more.

    Nobody gets fewer than whole pieces of what would make all ready at once. Of the others, one after the other goes to
    whoever is ready first with it, which is the best there is for equal pieces; whoever has too few then takes from
    whoever is ready last.

    >>> deal(12, [1.0, 1.0, 4.0])
    (6, 5, 1)
    >>> deal(12, [1.0, 1.0, 40.0], least=1)
    (6, 5, 1)
    """
    at_once_s = num_pieces / sum(1 / time_s for time_s in times_s)
    counts = [int(at_once_s / time_s * (1 - 1e-12)) for time_s in times_s]
    for _ in range(num_pieces - sum(counts)):
        first = min(range(len(counts)), key=lambda i: ((counts[i] + 1) * times_s[i], i))
        counts[first] += 1
    for place, count in enumerate(counts):
        for _ in range(count, least):
            last = max(
                (i for i, other in enumerate(counts) if other > least), key=lambda i: (counts[i] * times_s[i], i)
            )
            counts[last] -= 1
            counts[place] += 1
    return tuple(counts)


def ready_s(counts: Sequence[int], times_s: Sequence[float]) -> float:
    """When the last process is ready."""
    return max(count * time_s for count, time_s in zip(counts, times_s, strict=True))


class Dealer:
    """Deals the pieces of every step; all processes make the same calls with the same values, and so agree.

    Args:
        num_pieces: of a batch.
        least: how many each process gets at least.
    """

    def __init__(self, num_pieces: int, least: int = 0) -> None:
        self._num_pieces, self._least = num_pieces, least
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

    @property
    def times_s(self) -> tuple[float, ...]:
        """What a piece takes on each of them; nothing while that is not known."""
        return tuple(self._times_s)

    @property
    def wanted(self) -> tuple[int, ...]:
        """The best counts, if all would be ready so much sooner that it counts; else those of now."""
        if not self._times_s:
            return self._counts
        best = deal(self._num_pieces, self._times_s, self._least)
        gains = ready_s(best, self._times_s) < (1 - GAIN) * ready_s(self._counts, self._times_s)
        return best if gains else self._counts

    def take(self, counts: Sequence[int]) -> None:
        """Pieces are dealt so from now on."""
        self._counts = tuple(counts)

    def learn(self, times_s: Sequence[float]) -> None:
        """As `note`, and deals as is best then."""
        self.note(times_s)
        self._counts = self.wanted

    def note(self, times_s: Sequence[float]) -> None:
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

    @property
    def slowness(self) -> tuple[float, ...]:
        """How many times as long as the fastest each takes for a piece; nothing before enough steps were seen."""
        if self._num_learnt < NUM_SURE:
            return ()
        least = min(self._times_s, default=1.0)
        return tuple(time_s / least for time_s in self._times_s)


class Patience:
    """Says when to deal anew where that takes time itself (programs are made, and perhaps compiled).

    The first moment at which waiting for slow processes has cost as much as the change does is the best one that can
    be found without knowing how long they will stay slow: it costs at most twice what it would cost whoever knows.
    (The rule of who rents skis until the rent has come to their price: Karlin, Manasse, Rudolph and Sleator,
    Competitive Snoopy Caching, Algorithmica 1988.)

    Args:
        dealer: of the pieces; its `start` was called.
        cost_s: what the change is expected to take, seconds.
    """

    def __init__(self, dealer: Dealer, cost_s: float) -> None:
        self.dealer, self.cost_s = dealer, cost_s
        self._lost_s = 0.0

    def look(self, num_steps: int, times_s: Sequence[float]) -> tuple[int, ...] | None:
        """New counts if it is time for them; a piece took `times_s` on the processes in the last `num_steps`."""
        self.dealer.note(times_s)
        wanted, counts = self.dealer.wanted, self.dealer.counts
        if wanted == counts:
            self._lost_s *= FORGETTING
            return None
        self._lost_s += num_steps * (ready_s(counts, self.dealer.times_s) - ready_s(wanted, self.dealer.times_s))
        return wanted if self._lost_s >= self.cost_s else None

    def take(self, counts: Sequence[int], cost_s: float) -> None:
        """The pieces are dealt so from now on; the change took `cost_s`."""
        self.dealer.take(counts)
        self.cost_s, self._lost_s = cost_s, 0.0
