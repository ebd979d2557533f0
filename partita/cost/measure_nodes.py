"""Measuring every op of a list alone, by the kernel that will run: the chosen variant where it has several, and for
random ops the one that draws from a worker's generator."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import fx

from partita.cost import attention, inline
from partita.cost.measure_ops import make_arguments, on_pinned_threads, time_call
from partita.cost.variants import CHOICES, product_of, time_of_chosen
from partita.graph.randomness import is_random, with_generator


def measure_nodes(nodes: Sequence[fx.Node], cores: tuple[int, ...], *, budget_s: float) -> list[float | None]:
    """Seconds of each op on a thread pinned to `cores` with that many torch threads; None where the budget had run
    out or the op cannot be run alone (the caller then uses the roofline)."""
    results = _each(nodes, cores, budget_s, lambda node: _measure_node(node, max(len(cores), 1)))
    if any(map(product_of, nodes)):
        CHOICES.keep()
    return results


def measure_in_place(nodes: Sequence[fx.Node], cores: tuple[int, ...], *, budget_s: float) -> list[float | None]:
    """Seconds of each op as compiled code forms it in place on a thread pinned to `cores`; None where it does not, or
    where the budget had run out."""
    if not inline.is_possible(len(cores)):
        return [None] * len(nodes)
    return _each(nodes, cores, budget_s, _in_place_s)


def _each(
    nodes: Sequence[fx.Node], cores: tuple[int, ...], budget_s: float, measure: Callable[[fx.Node], float | None]
) -> list[float | None]:
    """What `measure` finds for each node on a thread pinned to `cores`; None once the budget has run out."""
    results: list[float | None] = []

    def body() -> None:
        end = time.perf_counter() + budget_s
        for node in nodes:
            results.append(measure(node) if time.perf_counter() < end else None)

    on_pinned_threads([cores], [body])
    return results


def _in_place_s(node: fx.Node) -> float | None:
    """None also where a library is chosen."""
    if inline.can_be_inline(node) and inline.CHOICES.of([node], 1):
        return inline.in_place_s(node)
    if attention.can_be_replaced(node) and attention.CHOICES.of([node], 1):
        return attention.in_place_s(node)
    return None


def _measure_node(node: fx.Node, num_threads: int) -> float | None:
    assert callable(node.target)
    target: Callable[..., object] = node.target
    if is_random(node):
        target = functools.partial(with_generator(node.target), torch.Generator())
    try:
        if product_of(node) is not None:
            return time_of_chosen(node, num_threads)
        args, kwargs = make_arguments(node)
        with torch.no_grad():
            return time_call(lambda: target(*args, **kwargs))
    except (RuntimeError, KeyError, IndexError, NotImplementedError):
        return None  # cannot run on made-up values; not an error of the user's
