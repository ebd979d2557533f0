"""Makespan of a pipeline schedule by its exact recurrence.

p stages hold v chunks each (chunk c on stage c mod p), m microbatches run. Every stage has a fixed order of ops; op x
starts when the op before it on its stage has ended and what it reads is there:

    end(F_c,j) = max(end(previous on the stage), end(F_{c-1},j)) + f_c
    end(B_c,j) = max(end(previous on the stage), end(B_{c+1},j), end(F_c,j)) + b_c

Zero-bubble splits B into the gradient of the input, which the previous stage waits for, and the gradient of the
weights, which fills gaps. f and b hold the sending of their results. Every such recurrence is linear in max-plus
algebra, so its makespan becomes linear in m after a start-up of a few p microbatches (Baccelli, Cohen, Olsder and
Quadrat, "Synchronization and Linearity", 1992, theorem 3.109): long runs are extrapolated once p microbatches more have
taken the same time twice in a row; very unequal stages settle late.

Orders: GPipe (Huang et al. 2019); 1F1B (Narayanan et al., PipeDream-flush, 2019); interleaved (Narayanan et al. 2021,
section 2.2, Megatron-LM's order); zero-bubble ZB-H1 (Qi et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from partita.errors import InputError

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
Op = tuple[str, int, int]  # "F", "B" or "W"; chunk; microbatch
FIRST = 3  # times p microbatches: the shortest run that is extrapolated


def makespan_s(
    forward_s: tuple[float, ...],
    backward_s: tuple[float, ...],
    *,
    num_stages: int,
    num_microbatches: int,
    schedule: Schedule,
    weight_share: float = 0.5,
) -> float:
    """Seconds from the first forward to the last backward.

    Args:
        forward_s, backward_s: of each chunk in model order, seconds; their number is a multiple of `num_stages`.
        weight_share: the part of a backward that computes gradients of weights (zero-bubble only).

    Example:
        >>> makespan_s((1.0, 1.0), (2.0, 2.0), num_stages=2, num_microbatches=4, schedule="1f1b")
        15.0

    Raises:
        InputError: chunks, stages and microbatches do not fit the schedule.
    """
    chunks = len(forward_s)
    _validate(chunks, len(backward_s), num_stages, num_microbatches, schedule)
    if num_stages == 1:
        return num_microbatches * (sum(forward_s) + sum(backward_s))

    def run(count: int) -> float:
        return _run(forward_s, backward_s, num_stages, count, schedule, weight_share)

    pairs = [ahead + back for ahead, back in zip(forward_s, backward_s, strict=True)]
    busiest = max(sum(pairs[stage::num_stages]) for stage in range(num_stages))
    unit = num_stages  # interleaved runs need whole groups
    last = FIRST * unit + num_microbatches % unit
    while last < num_microbatches:
        ends = [run(last - back * unit) for back in (2, 1, 0)]
        gained, before = ends[2] - ends[1], ends[1] - ends[0]
        # Once settled, no stage may have more to do for a microbatch than the run gains by it.
        if abs(gained - before) <= 1e-9 * ends[2] and gained >= unit * busiest - 1e-9 * ends[2]:
            return ends[2] + gained * (num_microbatches - last) / unit
        last = min(2 * last - num_microbatches % unit, num_microbatches)
    return run(num_microbatches)


def _validate(num_chunks: int, num_backwards: int, num_stages: int, num_microbatches: int, schedule: str) -> None:
    if num_chunks != num_backwards or num_chunks % num_stages or num_microbatches < 1:
        raise InputError(
            f"chunks must be a multiple of the {num_stages} stages with one forward and one backward time each, and "
            f"there must be a microbatch, but got {num_chunks} forward and {num_backwards} backward times and "
            f"{num_microbatches} microbatches."
        )
    if num_chunks > num_stages and schedule == "interleaved" and num_microbatches % num_stages and num_stages > 1:
        raise InputError(
            f"the interleaved schedule passes whole groups of as many microbatches as stages through the chunks, so "
            f"microbatches must be a multiple of the {num_stages} stages, but there are {num_microbatches}."
        )
    if num_chunks > num_stages and schedule not in ("interleaved", "gpipe"):
        raise InputError(
            f"only the interleaved and gpipe schedules run several chunks on a stage, but got {schedule!r} with "
            f"{num_chunks} chunks on {num_stages} stages."
        )


def order(stage: int, num_stages: int, num_chunks: int, num_microbatches: int, schedule: Schedule) -> list[Op]:
    """The ops of one stage in their order (zero-bubble: without the weights' gradients, which fill gaps)."""
    if schedule == "gpipe":
        own = range(stage, num_chunks, num_stages)
        forwards = [("F", chunk, index) for chunk in own for index in range(num_microbatches)]
        return forwards + [("B", chunk, index) for chunk in reversed(own) for index in range(num_microbatches)]
    if num_chunks == num_stages:
        warm_up = min(num_stages - 1 - stage, num_microbatches)
        forward_ops = [("F", stage, index) for index in range(num_microbatches)]
        backward_ops = [("B", stage, index) for index in range(num_microbatches)]
    else:
        virtual = num_chunks // num_stages
        forward_ops = _interleaved("F", stage, num_stages, virtual, num_microbatches)
        backward_ops = _interleaved("B", stage, num_stages, virtual, num_microbatches)
        warm_up = min(2 * (num_stages - 1 - stage) + (virtual - 1) * num_stages, len(forward_ops))
    ops = forward_ops[:warm_up]
    for forward, backward in zip(forward_ops[warm_up:], backward_ops, strict=False):
        ops += [forward, backward]
    return ops + backward_ops[len(forward_ops) - warm_up :]


def _interleaved(kind: str, stage: int, num_stages: int, virtual: int, num_microbatches: int) -> list[Op]:
    """Groups of up to p microbatches pass through all chunks of the stage before the next group."""
    ops: list[Op] = []
    for start in range(0, num_microbatches, num_stages):
        group = range(start, min(start + num_stages, num_microbatches))
        rounds = range(virtual) if kind == "F" else reversed(range(virtual))
        ops += [(kind, number * num_stages + stage, index) for number in rounds for index in group]
    return ops


@lru_cache(maxsize=65536)
def _run(
    forward_s: tuple[float, ...],
    backward_s: tuple[float, ...],
    num_stages: int,
    num_microbatches: int,
    schedule: Schedule,
    weight_share: float,
) -> float:
    if schedule == "zero_bubble":
        inputs_s = tuple(time_s * (1 - weight_share) for time_s in backward_s)
        weights_s = [time_s * weight_share for time_s in backward_s]
        return _evaluate(forward_s, inputs_s, num_stages, num_microbatches, "1f1b", weights_s)
    return _evaluate(forward_s, backward_s, num_stages, num_microbatches, schedule, None)


@dataclass(frozen=True)
class _Recurrence:
    """All ops of a schedule in an order in which each comes after the two that it waits for (-1: for none)."""

    duration: list[int]  # chunk of a forward op; chunk + number of chunks of a backward op
    before: list[int]  # the op before it on its stage
    source: list[int]  # the op whose result it reads
    stage: list[int]


@lru_cache(maxsize=512)
def _recurrence(num_stages: int, num_chunks: int, num_microbatches: int, schedule: Schedule) -> _Recurrence:
    """The ops, dealt out stage by stage as far as their sources are there.

    Ops have numbers ``(chunk or chunk + num_chunks) * num_microbatches + microbatch``; `place` is where each came.
    """
    n, m = num_chunks, num_microbatches
    codes = []
    for stage in range(num_stages):
        ops = order(stage, num_stages, num_chunks, num_microbatches, schedule)
        codes.append([(chunk if kind == "F" else chunk + n) * m + index for kind, chunk, index in ops])
    # A forward op reads the chunk before, a backward op the chunk after (of the last chunk: its own forward op).
    source_of = [-1] * m + list(range((n - 1) * m))
    source_of += [x + m for x in range(n * m, (2 * n - 1) * m)] + list(range((n - 1) * m, n * m))
    place = [-1] * (2 * n * m)
    last, done = [-1] * num_stages, [0] * num_stages
    duration: list[int] = []
    before: list[int] = []
    source: list[int] = []
    stages: list[int] = []
    count, total = 0, 2 * n * m
    while count < total:
        start = count
        for stage, own in enumerate(codes):
            position, end = done[stage], len(own)
            while position < end:
                code = own[position]
                read = source_of[code]
                if read >= 0:
                    read = place[read]
                    if read < 0:
                        break
                place[code] = count
                duration.append(code // m)
                before.append(last[stage])
                source.append(read)
                stages.append(stage)
                last[stage] = count
                count += 1
                position += 1
            done[stage] = position
        assert count > start, f"{schedule} deadlocks: {num_stages} stages, {num_chunks} chunks"
    return _Recurrence(duration, before, source, stages)


def _evaluate(
    forward_s: tuple[float, ...],
    backward_s: tuple[float, ...],
    num_stages: int,
    num_microbatches: int,
    schedule: Schedule,
    weights_s: list[float] | None,
) -> float:
    ops = _recurrence(num_stages, len(forward_s), num_microbatches, schedule)
    durations = [*forward_s, *backward_s]
    if weights_s is not None:
        return _evaluate_filling(ops, durations, weights_s, num_stages)
    ends: list[float] = []
    add = ends.append
    for which, before, source in zip(ops.duration, ops.before, ops.source, strict=True):
        now = ends[before] if before >= 0 else 0.0
        if source >= 0:
            ready = ends[source]
            if ready > now:
                now = ready
        add(now + durations[which])
    return max(ends)


def _evaluate_filling(
    ops: _Recurrence, durations: Sequence[float], weights_s: Sequence[float], num_stages: int
) -> float:
    """The same where gradients of weights fill the gaps between other ops."""
    ends: list[float] = []
    owed = [0.0] * num_stages
    last = [0.0] * num_stages
    num_chunks = len(weights_s)
    for which, before, source, stage in zip(ops.duration, ops.before, ops.source, ops.stage, strict=True):
        now = ends[before] if before >= 0 else 0.0
        ready = ends[source] if source >= 0 else 0.0
        if ready > now:
            owed[stage] = max(owed[stage] - (ready - now), 0.0)
            now = ready
        now += durations[which]
        ends.append(now)
        last[stage] = now
        if which >= num_chunks:
            owed[stage] += weights_s[which - num_chunks]
    return max(end + rest for end, rest in zip(last, owed, strict=True))
