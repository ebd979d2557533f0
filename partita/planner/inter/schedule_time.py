"""The makespan of a pipeline schedule with unequal stages, by the recurrence of its task order.

Stage q of Q = v S runs on device group q mod S. For microbatch i, with the times of stage q
    F(q, i)  starts after F(q - 1, i) + forward transfer,
    B(q, i)  starts after F(q, i) and B(q + 1, i) + backward transfer,
    W(q, i)  starts after B(q, i)                                 (zero-bubble alone; elsewhere it is part of B),
and every task starts after the one before it in its group's order:
    gpipe        F_0 .. F_{m-1}, B_0 .. B_{m-1}                                             (Huang et al. 2019)
    1f1b         a = S - s - 1 forward ahead, then F_{i+a}, B_i in turn     (Narayanan et al. 2019, PipeDream-Flush)
    zero_bubble  as 1f1b, B without weight gradients, W_{i-s} after B_i: every group holds at most S microbatches
                 (ZB-H1 of Qi et al. 2023, section 2.2)
    interleaved  2 (S - s - 1) + (v - 1) S forward ahead; forward passes in groups of S microbatches through chunk 0,
                 1, .., v - 1, backward passes through the chunks from the last on; m a multiple of S
                 (Narayanan et al. 2021, section 2.2)
Transfers take time and occupy no device. A group's step ends `end_s` after its last task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PassKind = Literal["F", "B", "W"]
Pass = tuple[PassKind, int, int]  # kind, chunk, microbatch


@dataclass(frozen=True, kw_only=True)
class PipelineTimes:
    """Times of the Q stages of a pipeline; `forward_transfer_s[q]`, `backward_transfer_s[q]` between q and q + 1 (Q - 1
    entries); `backward_s` contains `weight_s`; `end_s` has one entry for each of the S groups."""

    forward_s: Sequence[float]
    backward_s: Sequence[float]
    weight_s: Sequence[float]
    end_s: Sequence[float]
    forward_transfer_s: Sequence[float]
    backward_transfer_s: Sequence[float]


def passes_of_group(
    schedule: str, group: int, num_groups: int, num_microbatches: int, num_chunks: int = 1
) -> list[Pass]:
    """The task order of one device group.

    Example:
        >>> [kind + str(i) for kind, _, i in passes_of_group("1f1b", 0, 2, 3)]
        ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    m = num_microbatches
    if schedule == "interleaved":
        return _interleaved(group, num_groups, m, num_chunks)
    ahead = m if schedule == "gpipe" else min(num_groups - group - 1, m)
    order: list[Pass] = [("F", 0, i) for i in range(ahead)]
    for i in range(m):
        if i + ahead < m:
            order.append(("F", 0, i + ahead))
        order.append(("B", 0, i))
        if schedule == "zero_bubble" and i >= group:
            order.append(("W", 0, i - group))
    if schedule == "zero_bubble":
        order += [("W", 0, i) for i in range(max(0, m - group), m)]
    return order


def _interleaved(group: int, num_groups: int, m: int, num_chunks: int) -> list[Pass]:
    def place(index: int) -> tuple[int, int]:
        turn, within = divmod(index, num_groups * num_chunks)
        return within // num_groups, turn * num_groups + within % num_groups

    total = m * num_chunks
    ahead = min(total, 2 * (num_groups - group - 1) + (num_chunks - 1) * num_groups)
    order: list[Pass] = [("F", *place(i)) for i in range(ahead)]
    for i in range(total):
        if i + ahead < total:
            order.append(("F", *place(i + ahead)))
        chunk, microbatch = place(i)
        order.append(("B", num_chunks - 1 - chunk, microbatch))
    return order


def in_flight(schedule: str, group: int, num_groups: int, num_microbatches: int) -> int:
    """The most microbatches whose activations a group holds at once (not for the interleaved schedule)."""
    if schedule == "gpipe":
        return num_microbatches
    return min(num_microbatches, num_groups if schedule == "zero_bubble" else num_groups - group)


def chunk_peaks(group: int, num_groups: int, num_microbatches: int, num_chunks: int) -> list[tuple[int, ...]]:
    """Microbatches in flight per chunk of an interleaved group, at the moments when none other has as many of each."""
    held = [0] * num_chunks
    seen: set[tuple[int, ...]] = set()
    for kind, chunk, _ in passes_of_group("interleaved", group, num_groups, num_microbatches, num_chunks):
        if kind == "B":
            seen.add(tuple(held))
        held[chunk] += 1 if kind == "F" else -1
    return [a for a in seen if not any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for b in seen)]


def makespan_s(schedule: str, times: PipelineTimes, num_microbatches: int) -> float:
    """The step's time; see the module's docstring."""
    num_stages, num_groups = len(times.forward_s), len(times.end_s)
    chunks = num_stages // num_groups
    orders = [passes_of_group(schedule, s, num_groups, num_microbatches, chunks) for s in range(num_groups)]
    split = schedule == "zero_bubble"
    input_s = [b - (w if split else 0.0) for b, w in zip(times.backward_s, times.weight_s, strict=True)]
    done_forward = [[-1.0] * num_microbatches for _ in range(num_stages)]
    done_backward = [[-1.0] * num_microbatches for _ in range(num_stages)]
    clock, place, left = [0.0] * num_groups, [0] * num_groups, sum(len(order) for order in orders)
    while left:
        before = left
        for group in range(num_groups):
            order, now, at = orders[group], clock[group], place[group]
            while at < len(order):
                kind, chunk, i = order[at]
                q = chunk * num_groups + group
                if kind == "F":
                    if q:
                        ready = done_forward[q - 1][i]
                        if ready < 0:
                            break
                        now = max(now, ready + times.forward_transfer_s[q - 1])
                    now += times.forward_s[q]
                    done_forward[q][i] = now
                elif kind == "B":
                    if q + 1 < num_stages:
                        ready = done_backward[q + 1][i]
                        if ready < 0:
                            break
                        now = max(now, ready + times.backward_transfer_s[q])
                    elif done_forward[q][i] < 0:
                        break
                    now += input_s[q]
                    done_backward[q][i] = now
                else:
                    now += times.weight_s[q]
                at += 1
            left -= at - place[group]
            clock[group], place[group] = now, at
        if left == before:
            raise AssertionError(f"the order of {schedule} waits in a circle")
    return max(now + end for now, end in zip(clock, times.end_s, strict=True))
