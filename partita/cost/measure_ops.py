"""Measuring ops and segments on this machine: pinned threads, warm-up, enough repeats, medians.

The only file of the cost model with effects: it allocates tensors, runs kernels and reads the clock.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from partita.graph import block_ops
from partita.graph.custom_ops import with_real_buffers
from partita.units import fingerprint

REPEAT_S = 0.002  # one sample repeats the op for about this long, so that the clock's grain does not matter
NUM_SAMPLES = 5
MIN_ROUNDS, MAX_ROUNDS = 3, 25
WAIT_LIMIT_S = 600.0


_VALUES = torch.Generator().manual_seed(0)  # a measurement in the middle of training leaves torch's own state alone


def make_tensor(spec: torch.Tensor, high: int = 1) -> torch.Tensor:
    """A real CPU tensor with the shape, strides and dtype of `spec`. Integers are valid indices below `high`. Torch's
    random state is left as it was."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride(), strict=True) if size)
    storage = torch.empty(max(extent, 1) if spec.numel() else 0, dtype=spec.dtype)
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        storage.normal_(generator=_VALUES)
    elif spec.dtype is torch.bool:
        storage.bernoulli_(0.5, generator=_VALUES)
    else:
        storage.random_(0, max(min(high, 127), 1), generator=_VALUES)
    return storage.as_strided(tuple(spec.shape), tuple(spec.stride()))


def make_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Real arguments for one op node, from the FakeTensors of its inputs. Raises `KeyError` if one has no
    ``meta["val"]``."""
    high = index_bound(node)

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        return pytree.tree_map_only(torch.Tensor, lambda spec: make_tensor(spec, high), leaf.meta["val"])

    arguments = fx.map_arg((node.args, node.kwargs), lambda n: n)
    args, kwargs = fx.node.map_aggregate(arguments, real)
    return with_real_buffers(node.target, tuple(args)), dict(kwargs)


def op_key(node: fx.Node, num_threads: int) -> str:
    """What the time of an op depends on: the op, its inputs' shapes, strides and dtypes, other arguments, and
    threads."""

    def text(leaf: Any) -> str:
        if not isinstance(leaf, fx.Node):
            return repr(leaf)
        value = leaf.meta.get("val")
        tensors = pytree.tree_leaves(value)
        return ";".join(
            f"{t.dtype}{tuple(t.shape)}{t.stride()}" if isinstance(t, torch.Tensor) else repr(t) for t in tensors
        )

    leaves: list[str] = []
    structure = fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: leaves.append(text(leaf)))
    return f"{node.target}|{fingerprint([structure, *leaves])}|{num_threads}"


def index_bound(node: fx.Node) -> int:
    """A bound below which integer inputs of the op are valid indices: exact where the op is known, else 1 (all
    zeros)."""
    name = str(node.target)
    values = [arg.meta.get("val") if isinstance(arg, fx.Node) else arg for arg in node.args]
    first = values[0] if values else None
    if "embedding_dense_backward" in name:
        return int(str(values[2]))
    if not isinstance(first, torch.Tensor) or not first.dim():
        return 1
    if node.target in block_ops.OPS:
        return block_ops.num_input_blocks(node.target, values)
    if "aten.embedding" in name:
        return int(first.shape[0])
    if any(part in name for part in ("gather", "scatter", "index_select", "index_add")) and isinstance(values[1], int):
        return int(first.shape[values[1]])
    if "nll_loss" in name:
        shapes = [v.shape for v in values if isinstance(v, torch.Tensor) and v.dim() > 1]
        return int(shapes[0][1]) if shapes else 1
    if "aten.index.Tensor" in name or "aten.index_put" in name:
        return int(min(first.shape))
    return 1


def placeholder_bound(node: fx.Node) -> int:
    """A bound below which an integer input is a valid index for every op that reads it, directly or through views."""
    bounds = []
    for user in node.users:
        is_view = isinstance(user.target, torch._ops.OpOverload) and user.target.is_view
        bounds.append(placeholder_bound(user) if is_view and user.args[0] is node else index_bound(user))
    return min(bounds, default=1)


def time_call(call: Callable[[], object], *, repeat_s: float = REPEAT_S) -> float:
    """Median seconds of one call, after two warm-ups, over samples of `repeat_s` each."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-8)
    count = max(1, min(int(repeat_s / once), 100_000))
    samples = []
    for _ in range(NUM_SAMPLES if once < 0.1 else 2):
        start = time.perf_counter()
        for _ in range(count):
            call()
        samples.append((time.perf_counter() - start) / count)
    return statistics.median(samples)


def time_in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of one call of each, sampled in turns: what disturbs the machine for a while disturbs all of them."""
    counts = []
    for call in calls:
        call()
        counts.append(max(1, min(int(REPEAT_S / 2 / max(_timed(call, 1), 1e-8)), 100_000)))
    rounds = [[_timed(call, count) for call, count in zip(calls, counts, strict=True)] for _ in range(NUM_SAMPLES)]
    return [min(samples) for samples in zip(*rounds, strict=True)]


def measure_dispatch_s(cores: tuple[int, ...]) -> float:
    """Seconds of Python and dispatcher per op: an op on one element does next to nothing else."""
    found: list[float] = []
    value = torch.ones(1)
    on_pinned_threads([cores], [lambda: found.append(time_call(lambda: torch.ops.aten.neg.default(value)))])
    return found[0]


def measure_together(
    calls: Sequence[Sequence[Callable[[], object]]], cores: Sequence[tuple[int, ...]], *, budget_s: float
) -> list[float]:
    """Seconds of each part of several workers' work until the slowest of them is done.

    ``calls[worker]`` are the worker's parts, as many for each. Every worker has a thread pinned to its cores; they
    begin each part together, as workers do that exchange something after each, and go through all parts, again and
    again: a part then finds in the caches what the parts before it have left there. Medians over at least three
    rounds, more as far as `budget_s` reaches. Raises what a call raises.
    """
    times_s: list[list[list[float]]] = [[] for _ in calls]  # by worker, round, part
    over = False
    start_s = time.perf_counter()

    def decide() -> None:
        """Run by the barrier while all wait, so that all see the same."""
        nonlocal over
        num_rounds = len(times_s[0])
        over = num_rounds > MAX_ROUNDS or (num_rounds > MIN_ROUNDS and time.perf_counter() - start_s > budget_s)

    barrier = threading.Barrier(len(calls), action=decide)

    def body(worker: int) -> None:
        for call in calls[worker]:
            call()
        while True:
            round_s = []
            for call in calls[worker]:
                barrier.wait(WAIT_LIMIT_S)
                round_s.append(_timed(call, 1))
            times_s[worker].append(round_s)
            barrier.wait(WAIT_LIMIT_S)
            if over:
                return

    def guarded(worker: int) -> None:
        try:
            body(worker)
        except BaseException:
            barrier.abort()
            raise

    on_pinned_threads(cores, [functools.partial(guarded, worker) for worker in range(len(calls))])
    rounds = list(zip(*times_s, strict=True))[1:]  # the first one still warms up
    slowest_s = [[max(part_s) for part_s in zip(*workers, strict=True)] for workers in rounds]
    return [statistics.median(part_s) for part_s in zip(*slowest_s, strict=True)]


def _timed(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def on_pinned_threads(cores: Sequence[tuple[int, ...]], bodies: Sequence[Callable[[], object]]) -> None:
    """Run each body on a new thread pinned to its cores; re-raise the first failure."""
    failures: list[BaseException] = []

    def run(place: tuple[int, ...], body: Callable[[], object]) -> None:
        before = torch.get_num_threads()
        try:
            if place and hasattr(os, "sched_setaffinity"):
                with contextlib.suppress(
                    OSError
                ):  # a container may forbid some cores; times are then of what it allows
                    os.sched_setaffinity(0, place)
            torch.set_num_threads(max(len(place), 1))
            with torch.no_grad():
                body()
        except BaseException as error:
            failures.append(error)
        finally:
            torch.set_num_threads(before)

    # No daemons: after an interruption here, the interpreter must wait until they have left their ops before it ends.
    threads = [threading.Thread(target=run, args=pair) for pair in zip(cores, bodies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        real = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
        raise (real or failures)[0]
