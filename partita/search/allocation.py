"""Who trains on: successive halving over rungs of time, without waiting for each other, for any number of objectives.

    a candidate at rung k goes on if it is among the best floor(n_k / FACTOR) of the n_k that were judged there

Whoever is not stops, keeps its checkpoint, and goes on later if others, judged meanwhile, turn out to be worse. "Best"
is by what is predicted of all candidates for the same instant: the deadline, but at most `FACTOR` times the training
time of the rung. What lies further away hardly follows from so short a curve: of 36 candidates (convolutions and
transformers for characters), those that predictions of the deadline from 0.8 s of training put first of nine were 0.16
worse after 30 s than the best of the nine, those that predictions of three times as far put first 0.105; from 7.2 s
0.022 and 0.009. With several objectives a candidate that others dominate in all predicted values comes after them: by
layers of the Pareto front, then by how far its neighbours in its layer are.

Sources: asynchronous successive halving Li et al. 2020 (ASHA), algorithm 2; layers and crowding distances Deb et al.
2002 (NSGA-II), section III.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partita.search.deadline import FACTOR

Values = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What allocation knows of a candidate that was judged at a rung.

    Args:
        rung: the highest one that it was judged at.
        at: what it is compared by at each rung up to its own: predicted values, turned so that lower is better.
        is_waiting: it has stopped, and could go on.
    """

    number: int
    rung: int
    at: tuple[Values, ...]
    is_waiting: bool


def dominates(one: Values, other: Values) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better.

    >>> dominates((1.0, 2.0), (1.0, 3.0)), dominates((1.0, 2.0), (0.5, 3.0))
    (True, False)
    """
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def front(values: Sequence[Values]) -> list[int]:
    """Indices of those that nobody dominates."""
    return [i for i, one in enumerate(values) if not any(dominates(other, one) for other in values)]


def ordered(values: Sequence[Values]) -> list[int]:
    """Indices, best first: by layers of the front, within one by crowding distance; a single objective by itself.

    >>> ordered([(3.0, 3.0), (1.0, 2.0), (2.0, 1.0)])
    [1, 2, 0]
    """
    if not values or len(values[0]) == 1:
        return sorted(range(len(values)), key=lambda i: values[i])
    found: list[int] = []
    for layer in _layers(np.array(values, dtype=np.float64)):
        distances = _crowding([values[i] for i in layer])
        found += [i for _, i in sorted(zip((-d for d in distances), layer, strict=True))]
    return found


def _layers(values_VO: np.ndarray) -> Iterator[list[int]]:
    """The front, the front of what is left without it, and so on. V vectors of O objectives; searches on large machines
    have thousands, so pairs are compared all at once."""
    is_below_VV = np.ones((len(values_VO),) * 2, dtype=bool)
    for column in values_VO.T:
        is_below_VV &= column[:, None] <= column
    dominates_VV = is_below_VV & ~is_below_VV.T
    num_above, left = dominates_VV.sum(0), np.arange(len(values_VO))
    while len(left):
        is_first = num_above[left] == 0
        yield left[is_first].tolist()
        num_above -= dominates_VV[left[is_first]].sum(0)
        left = left[~is_first]


def _crowding(values: Sequence[Values]) -> list[float]:
    """How far the neighbours of each are, summed over objectives in units of their ranges; infinite at the ends."""
    distances = [0.0] * len(values)
    for objective in range(len(values[0])):
        order = sorted(range(len(values)), key=lambda i: values[i][objective])
        extent = values[order[-1]][objective] - values[order[0]][objective]
        distances[order[0]] = distances[order[-1]] = math.inf
        for before, here, after in zip(order, order[1:], order[2:], strict=False):
            if extent > 0:
                distances[here] += (values[after][objective] - values[before][objective]) / extent
    return distances


def best_at(rung: int, standings: Sequence[Standing]) -> list[int]:
    """Numbers of those that may go beyond a rung, best first."""
    there = [one for one in standings if one.rung >= rung]
    order = ordered([one.at[rung] for one in there])
    return [there[i].number for i in order[: len(there) // FACTOR]]


def goes_on(number: int, standings: Sequence[Standing], last_rung: int) -> bool:
    """Whether a candidate that was just judged at its rung trains on at once."""
    own = next(one for one in standings if one.number == number)
    return own.rung < last_rung and number in best_at(own.rung, standings)


def next_promoted(standings: Sequence[Standing], last_rung: int) -> int | None:
    """The waiting candidate that goes on next, of the highest rung below `last_rung` that has one; None: none deserves
    it yet."""
    by_number = {one.number: one for one in standings}
    for rung in sorted({one.rung for one in standings if one.rung < last_rung}, reverse=True):
        for number in best_at(rung, standings):
            if by_number[number].rung == rung and by_number[number].is_waiting:
                return number
    return None
