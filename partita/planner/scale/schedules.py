"""Makespan of a pipeline schedule by its exact recurrence.

p stages hold v chunks each (chunk c on stage c mod p), m microbatches run. Every stage has a fixed order of ops; op x
starts when the op before it on its stage has ended and what it reads is there:

    end(F_c,j) = max(end(previous on the stage), end(F_{c-1},j)) + f_c
    end(B_c,j) = max(end(previous on the stage), end(B_{c+1},j), end(F_c,j)) + b_c

Zero-bubble splits B into the gradient of the input, which the previous stage waits for, and the gradient of the
weights, which fills gaps. f and b hold the sending of their results. Every such recurrence is linear in max-plus
algebra, so its makespan becomes linear in m after a start-up of a few p microbatches (Baccelli, Cohen, Olsder and
Quadrat, "Synchronization and Linearity", 1992, theorem 3.109): long runs are extrapolated from `SETTLED` p on.

Orders: GPipe (Huang et al. 2019); 1F1B (Narayanan et al., PipeDream-flush, 2019); interleaved (Narayanan et al. 2021,
section 2.2, Megatron-LM's order); zero-bubble ZB-H1 (Qi et al. 2023, section 3).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from partita.errors import InputError

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
Op = tuple[str, int, int]  # "F", "B" or "W"; chunk; microbatch
SETTLED = 2  # the makespan is taken as linear from this many times p microbatches on


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
    unit = num_stages  # interleaved runs need whole groups
    last = (SETTLED + 1) * unit + num_microbatches % unit
    if num_microbatches <= last:
        return _run(forward_s, backward_s, num_stages, num_microbatches, schedule, weight_share)
    shorter = _run(forward_s, backward_s, num_stages, last - unit, schedule, weight_share)
    longer = _run(forward_s, backward_s, num_stages, last, schedule, weight_share)
    return longer + (longer - shorter) * (num_microbatches - last) / unit


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


@lru_cache(maxsize=64)
def _levelled(num_stages: int, num_chunks: int, num_microbatches: int, schedule: Schedule) -> list[tuple[int, Op]]:
    """All ops as (stage, op) in an order in which every op comes after those that it waits for."""
    orders = [order(stage, num_stages, num_chunks, num_microbatches, schedule) for stage in range(num_stages)]
    places = [0] * num_stages
    done: set[Op] = set()
    found: list[tuple[int, Op]] = []
    total = sum(map(len, orders))
    while len(found) < total:
        before = len(found)
        for stage, ops in enumerate(orders):
            while places[stage] < len(ops):
                kind, chunk, index = ops[places[stage]]
                if kind == "F":
                    ready = chunk == 0 or ("F", chunk - 1, index) in done
                else:
                    ready = chunk == num_chunks - 1 or ("B", chunk + 1, index) in done
                    ready = ready and ("F", chunk, index) in done
                if not ready:
                    break
                done.add((kind, chunk, index))
                found.append((stage, (kind, chunk, index)))
                places[stage] += 1
        assert len(found) > before, f"{schedule} deadlocks: {num_stages} stages, {num_chunks} chunks"
    return found


def _evaluate(
    forward_s: tuple[float, ...],
    backward_s: tuple[float, ...],
    num_stages: int,
    num_microbatches: int,
    schedule: Schedule,
    weights_s: list[float] | None,
) -> float:
    num_chunks = len(forward_s)
    forward_end = [[0.0] * num_microbatches for _ in range(num_chunks + 1)]
    backward_end = [[0.0] * num_microbatches for _ in range(num_chunks + 1)]
    free = [0.0] * num_stages
    owed = [0.0] * num_stages  # weights' gradients that could still fill gaps
    for stage, (kind, chunk, index) in _levelled(num_stages, num_chunks, num_microbatches, schedule):
        now = free[stage]
        if kind == "F":
            ready = forward_end[chunk - 1][index] if chunk else 0.0
            duration = forward_s[chunk]
        else:
            ready = max(backward_end[chunk + 1][index], forward_end[chunk][index])
            duration = backward_s[chunk]
        if ready > now:
            owed[stage] = max(owed[stage] - (ready - now), 0.0)
            now = ready
        now += duration
        free[stage] = now
        if kind == "F":
            forward_end[chunk][index] = now
        else:
            backward_end[chunk][index] = now
            if weights_s is not None:
                owed[stage] += weights_s[chunk]
    return max(end + rest for end, rest in zip(free, owed, strict=True))
