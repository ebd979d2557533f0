"""What a pipeline's last stages cost, as four numbers that bound the makespan from below.

For the stages s .. S - 1, times since F(s, 0) starts at the earliest:
    D  one microbatch there and back:              end of B(s, i) - start of F(s, i) >= D for every i
    H  the first one, in the order of the tasks:   end of B(s, 0) >= H
    A  the last backward task:                     end of B(s, m - 1) >= A
    E  the end of the step of all these stages:    E
A stage (f, b, w, end) with transfers x there, y back put in front (b without w; w = 0 unless zero-bubble) gives
    D' = f + x + D + y + b
    H' = max(k f [+ x + D + y for gpipe], f + x + H + y) + b
    A' = max(f + x + A + y + b,  H' + (m-1) b + (m-k) f + n w,  H' + (m-1-c k) (b+f) + v w + c D')
    E' = max(f + x + E,  A' + (m - n) w + end)
k: forward tasks before B_0 in the group's order, n: weight tasks before B_{m-1}. The second term of A' is all work
between B_0 and B_{m-1}. The third is a chain from B_0 of m-1-c k steps B_i F_{i+k} B_{i+1} on the group itself (v of
them with a weight task), then c >= 1 returns B_i F_{i+k} B_{i+k} through the stages behind, because F_{i+k} comes right
after B_i: being linear in c, it is the largest at c = 1 or at floor((m-1)/k); in gpipe the last stage turns round only
after all forward tasks. For equal stages without transfers E is the makespan itself (the closed forms
sum + (m - 1) max of Alpa, section 5.2, and of ZB-H1).
All of it grows with D, H, A, E: a label that is nowhere smaller than another of the same state can be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.float64]  # 4 x count: rows D, H, A, E
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GroupOrder:
    """What the recurrence needs to know of a group's task order (see `partita.planner.inter.schedule_time`)."""

    schedule: str
    num_microbatches: int
    from_end: int  # 1 for the last stage
    num_stages: int | None  # None where the order does not depend on it

    @property
    def forward_first(self) -> int:
        return self.num_microbatches if self.schedule == "gpipe" else min(self.from_end, self.num_microbatches)

    @property
    def weight_before_last(self) -> int:
        if self.schedule != "zero_bubble":
            return 0
        assert self.num_stages is not None
        return max(0, self.num_microbatches - 1 - (self.num_stages - self.from_end))

    def weight_within(self, steps: int) -> int:
        """v: weight tasks within the first steps from a backward task to the next."""
        if self.schedule != "zero_bubble":
            return 0
        assert self.num_stages is not None
        return max(0, steps - (self.num_stages - self.from_end))

    @property
    def in_flight(self) -> int:
        if self.schedule == "gpipe":
            return self.num_microbatches
        if self.schedule == "zero_bubble":
            assert self.num_stages is not None
            return min(self.num_microbatches, self.num_stages)
        return min(self.num_microbatches, self.from_end)


@dataclass(frozen=True)
class StageTimes:
    """Arrays that broadcast against the labels' columns; `backward_s` contains `weight_s`."""

    forward_s: Array | float
    backward_s: Array | float
    weight_s: Array | float
    end_s: Array | float
    there_s: Array | float = 0.0  # forward transfer to the stage behind
    back_s: Array | float = 0.0


def put_in_front(order: GroupOrder, stage: StageTimes, behind: tuple[Array, ...] | None) -> tuple[Array, ...]:
    """(D', H', A', E') by the module's docstring; `behind` is None for the last stage."""
    m, k, n = order.num_microbatches, order.forward_first, order.weight_before_last
    f, e = np.asarray(stage.forward_s), np.asarray(stage.end_s)
    w = np.asarray(stage.weight_s) if order.schedule == "zero_bubble" else np.zeros(())
    b = np.asarray(stage.backward_s) - w
    if behind is None:
        path = f + b
        first = k * f + b
        last = first + (m - 1) * b + (m - k) * f + n * w
        return path, first, last, last + (m - n) * w + e
    path, first, last, end = behind
    there, back = stage.there_s, stage.back_s
    both = f + there + back
    turned = k * f + (there + back + path if order.schedule == "gpipe" else 0.0)
    first = np.maximum(turned, both + first) + b
    path = both + path + b
    cycles = (m - 1) // k
    last = np.maximum(both + last + b, first + (m - 1) * b + (m - k) * f + n * w)
    for c in {min(1, cycles), cycles} - {0}:
        steps = m - 1 - c * k
        last = np.maximum(last, first + steps * (b + f) + order.weight_within(steps) * w + c * path)
    return path, first, last, np.maximum(f + there + end, last + (m - n) * w + e)


def undominated(state: Indices, labels: Labels, most: int) -> tuple[Indices, Labels, Indices]:
    """(state, labels, where): of each state the labels that no other of it undercuts, up to `most`; where there are
    more, the rest become one label with the least of each number (so it undercuts them all), at the place of the one
    of least sum."""
    total = labels.sum(axis=0)
    rest = np.lexsort((total, state))
    states, kept, places = [], [], []
    for turn in range(most):
        if len(rest) == 0:
            break
        at = state[rest]
        first = np.flatnonzero(np.append(True, at[1:] != at[:-1]))
        best = labels[:, rest[first]]
        if turn == most - 1:
            best = np.minimum.reduceat(labels[:, rest], first, axis=1)
        states.append(at[first])
        kept.append(best)
        places.append(rest[first])
        if turn == most - 1:
            break
        group = np.cumsum(np.append(True, at[1:] != at[:-1])) - 1
        rest = rest[(labels[:, rest] < best[:, group]).any(axis=0)]
    if not states:
        return state[:0], labels[:, :0], np.zeros(0, dtype=np.int64)
    return np.concatenate(states), np.concatenate(kept, axis=1), np.concatenate(places)
