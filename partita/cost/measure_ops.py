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

REPEAT_S = 0.002  # one sample repeats the op for about this long, so that the clock's grain does not matter
NUM_SAMPLES = 5


def make_tensor(spec: torch.Tensor, high: int = 1) -> torch.Tensor:
    """A real CPU tensor with the shape, strides and dtype of `spec`. Integers are valid indices below `high`."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride(), strict=True) if size)
    storage = torch.empty(max(extent, 1) if spec.numel() else 0, dtype=spec.dtype)
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        storage.normal_()
    elif spec.dtype is torch.bool:
        storage.bernoulli_(0.5)
    else:
        storage.random_(0, max(min(high, 127), 1))
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
    return tuple(args), dict(kwargs)


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


def measure_nodes(nodes: Sequence[fx.Node], cores: tuple[int, ...], *, budget_s: float) -> list[float | None]:
    """Seconds of each op on a thread pinned to `cores` with that many torch threads; None where the budget had run
    out or the op
    cannot be run alone (the caller then uses the roofline)."""
    results: list[float | None] = []

    def body() -> None:
        end = time.perf_counter() + budget_s
        for node in nodes:
            results.append(_measure_node(node) if time.perf_counter() < end else None)

    _on_pinned_threads([cores], [body])
    return results


def measure_dispatch_s(cores: tuple[int, ...]) -> float:
    """Seconds of Python and dispatcher per op: an op on one element does next to nothing else."""
    found: list[float] = []
    value = torch.ones(1)
    _on_pinned_threads([cores], [lambda: found.append(time_call(lambda: torch.ops.aten.neg.default(value)))])
    return found[0]


def measure_concurrent(
    calls: Sequence[Callable[[], object]], cores: Sequence[tuple[int, ...]], *, budget_s: float
) -> float:
    """Median seconds of one call while all `calls` run at the same time, each in a loop on its own pinned thread."""
    barrier = threading.Barrier(len(calls))
    samples: list[float] = []

    def body(call: Callable[[], object]) -> None:
        call()
        barrier.wait(timeout=600)
        end = time.perf_counter() + budget_s
        for _ in range(1000):
            start = time.perf_counter()
            call()
            now = time.perf_counter()
            samples.append(now - start)  # list.append is atomic
            if now > end:
                break

    def guarded(call: Callable[[], object]) -> None:
        try:
            body(call)
        except BaseException:
            barrier.abort()
            raise

    _on_pinned_threads(cores, [functools.partial(guarded, call) for call in calls])
    return statistics.median(samples)


def _measure_node(node: fx.Node) -> float | None:
    assert callable(node.target)
    target: Callable[..., object] = node.target
    try:
        args, kwargs = make_arguments(node)
        with torch.no_grad():
            return time_call(lambda: target(*args, **kwargs))
    except (RuntimeError, KeyError, IndexError, NotImplementedError):
        return None  # cannot run on made-up values; not an error of the user's


def _on_pinned_threads(cores: Sequence[tuple[int, ...]], bodies: Sequence[Callable[[], None]]) -> None:
    """Run each body on a new thread pinned to its cores; re-raise the first failure."""
    failures: list[BaseException] = []

    def run(place: tuple[int, ...], body: Callable[[], None]) -> None:
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

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in zip(cores, bodies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        real = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
        raise (real or failures)[0]
