"""Who updates parameters that cannot be cut: every one has one owner, and owners are busy equally long.

N parameters, update i takes c_i seconds; a job of P processes with W workers each. Two ways of updating:

    each for itself   every process updates all parameters, its workers share them:   T = max_w sum_{i of w} c_i
    shared out        a parameter with c_i > m_i, where m_i is the time of a message of its value, is updated by one
                      worker of the job, which sends the value to the other processes (the rest as above):
                                     T = max_w sum_{i of w} c_i + max_p (messages that process p sends and receives)

Both are dealt longest first, each to the least loaded (Graham 1969, "Bounds on multiprocessing timing anomalies": no
load is above 4/3 of the best possible), and the way with the lesser T is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UpdateCosts:
    """What it takes to update whole parameters, and to send their new values.

    Args:
        time_s: (parameter, seconds of its update on one worker). A parameter that is not told counts by its elements,
            as all do then.
        message_s, bytes_per_s: of a message to another process; without `bytes_per_s` nothing is shared out.

    Example:
        >>> costs = UpdateCosts(time_s=(("w", 1e-3),), bytes_per_s=1e9)
    """

    time_s: tuple[tuple[str, float], ...] = ()
    message_s: float = 0.0
    bytes_per_s: float = 0.0

    def know(self, names: Iterable[str]) -> bool:
        """Whether the times of all these parameters are told."""
        return set(names) <= dict(self.time_s).keys()

    def of(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """The cost of each of these parameters (name -> number of elements); seconds if all are known."""
        known = dict(self.time_s) if self.know(sizes) else sizes
        return {name: float(known[name]) for name in sizes}

    def sending_s(self, num_bytes: int) -> float:
        return self.message_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Deal:
    """Parameters by the place of their worker in each process, and the process (its place in the group) that updates
    them; -1: every process does."""

    columns: tuple[tuple[str, ...], ...]
    process_of: Mapping[str, int]


def deal(costs: Mapping[str, float], num_columns: int) -> Deal:
    """Every process for itself: each parameter to the least loaded of its workers, the longest first.

    Example:
        >>> deal({"a": 3.0, "b": 2.0, "c": 2.0}, 2).columns
        (('a',), ('b', 'c'))
    """
    return _dealt(costs, num_columns, 1, frozenset())[0]


def deal_over_processes(
    costs: Mapping[str, float], num_bytes: Mapping[str, int], num_columns: int, num_processes: int, links: UpdateCosts
) -> Deal:
    """The faster one of both ways, where `costs` are seconds."""
    if num_processes < 2 or links.bytes_per_s <= 0:
        return deal(costs, num_columns)
    sent_s = {name: links.sending_s(size) for name, size in num_bytes.items()}
    movable = frozenset(name for name in costs if costs[name] > sent_s[name])
    alone, alone_s = _dealt(costs, num_columns, num_processes, frozenset())
    shared, shared_s = _dealt(costs, num_columns, num_processes, movable)
    busy_s = [0.0] * num_processes
    for name in movable:
        for process in range(num_processes):
            is_owner = process == shared.process_of[name]
            busy_s[process] += sent_s[name] * (num_processes - 1 if is_owner else 1)
    return shared if shared_s + max(busy_s) < alone_s else alone


def _dealt(
    costs: Mapping[str, float], num_columns: int, num_processes: int, movable: frozenset[str]
) -> tuple[Deal, float]:
    """The deal and the largest load, where only `movable` parameters are updated by one process."""
    load = [[0.0] * num_columns for _ in range(num_processes)]
    columns: list[list[str]] = [[] for _ in range(num_columns)]
    process_of: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        if name in movable:
            process, column = _least([(row[c], p, c) for p, row in enumerate(load) for c in range(num_columns)])
            load[process][column] += costs[name]
        else:
            process, column = -1, _least([(max(row[c] for row in load), 0, c) for c in range(num_columns)])[1]
            for row in load:
                row[column] += costs[name]
        columns[column].append(name)
        process_of[name] = process
    return Deal(tuple(map(tuple, columns)), process_of), max(map(max, load))


def _least(places: Sequence[tuple[float, int, int]]) -> tuple[int, int]:
    _, process, column = min(places)
    return process, column
