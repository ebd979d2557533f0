"""Reference execution of a sharded graph: all workers in one thread, in lockstep, with exchanges done by hand.

Slow and simple on purpose: what a rule or a plan claims is held against this, independently of programs and runtime.

Example:
    >>> outputs = run_sharded(shard(module, {"x": Shard(0, (4, 3))}, axis="data", size=2), {"x": torch.randn(7, 5)})
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from partita.sharding import communication
from partita.sharding.placement import Partial, Placement, Shard
from partita.sharding.shard import ShardedGraph


def run_sharded(sharded: ShardedGraph, inputs: Mapping[str, Tensor]) -> list[Any]:
    """The outputs, put together from those of all workers.

    Args:
        sharded: of `shard`.
        inputs: whole values by placeholder name, without the hoisted ones.

    Raises:
        AssertionError: workers disagree about an exchange, about a value that all should have, or a value has not the
            shape that its graph says.
    """
    values = dict(inputs)
    if sharded.prologue is not None:
        needed = [node.name for node in sharded.prologue.graph.nodes if node.op == "placeholder"]
        values.update(zip(sharded.hoisted, sharded.prologue(*[inputs[name] for name in needed]), strict=True))
    graphs = [sharded.local(coordinate).graph for coordinate in range(sharded.size)]
    tables: list[dict[fx.Node, Any]] = [{} for _ in graphs]
    for coordinate, (graph, table) in enumerate(zip(graphs, tables, strict=True)):
        for node in graph.nodes:
            if node.op == "placeholder":
                placement = sharded.input_placements[node.name]
                table[node] = take_apart(values[node.name], placement, sharded.size)[coordinate]
    workers = [_run_until_exchange(graph, table) for graph, table in zip(graphs, tables, strict=True)]
    while True:
        events = [next(worker) for worker in workers]
        if not isinstance(events[0], fx.Node):
            break
        _exchange_all(events, tables)
    outputs = zip(sharded.output_placements, *events, strict=True)
    return [_put_together(list(parts), placement) for placement, *parts in outputs]


def take_apart(value: Tensor, placement: Placement, size: int) -> list[Tensor]:
    """Every worker's part of a whole value (Replicate or Shard)."""
    if isinstance(placement, Shard):
        return [part.clone() for part in torch.split(value, list(placement.sizes), placement.dim)]
    if isinstance(placement, Partial):
        raise AssertionError("a whole value has no summands")
    return [value.clone() for _ in range(size)]


def exchange(node: fx.Node, parts: list[Tensor]) -> list[Tensor]:
    """What every worker has after the exchange ``node``, from what each had before."""
    options: Mapping[str, Any] = node.kwargs
    if node.target is communication.all_reduce:
        return [_sum(parts).clone() for _ in parts]
    if node.target is communication.reduce_scatter:
        return [part.clone() for part in torch.split(_sum(parts), list(options["sizes"]), options["dim"])]
    if node.target is communication.halo_sum:
        return _sum_windows(parts, **{name: options[name] for name in ("dim", "starts", "ends", "sizes")})
    assert [part.shape[options["dim"]] for part in parts] == list(options["sizes"])
    whole = torch.cat(parts, options["dim"])
    if node.target is communication.all_gather:
        return [whole.clone() for _ in parts]
    if node.target is communication.halo_exchange:
        windows = zip(options["starts"], options["ends"], strict=True)
        return [whole.narrow(options["dim"], start, end - start).clone() for start, end in windows]
    return [part.clone() for part in torch.split(whole, list(options["new_sizes"]), options["new_dim"])]


def _sum_windows(
    parts: list[Tensor], *, dim: int, starts: tuple[int, ...], ends: tuple[int, ...], sizes: tuple[int, ...]
) -> list[Tensor]:
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)
    whole = parts[0].new_zeros(shape)
    for part, start, end in zip(parts, starts, ends, strict=True):
        assert part.shape[dim] == end - start
        whole.narrow(dim, start, end - start).add_(part)
    return [part.clone() for part in torch.split(whole, list(sizes), dim)]


def _exchange_all(events: list[Any], tables: list[dict[fx.Node, Any]]) -> None:
    kinds = {(event.target, str(event.kwargs)) if isinstance(event, fx.Node) else "the end" for event in events}
    assert len(kinds) == 1, f"all workers must take part in the same exchange, but they are at {kinds}"
    parts = exchange(events[0], [table[event.args[0]] for table, event in zip(tables, events, strict=True)])
    for table, event, part in zip(tables, events, parts, strict=True):
        assert part.shape == event.meta["val"].shape, event.name
        table[event] = part


def _run_until_exchange(graph: fx.Graph, table: dict[fx.Node, Any]) -> Iterator[Any]:
    """Gives every exchange node when its turn comes, at last the tuple of outputs."""
    for node in graph.nodes:
        if node.op == "output":
            yield tuple(table[item] if isinstance(item, fx.Node) else item for item in node.args[0])
        elif node.op == "call_function" and node.target in communication.COMMUNICATION_OPS:
            yield node
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: table[item])
            table[node] = node.target(*args, **kwargs)
            if node.target is not operator.getitem and isinstance(table[node], Tensor):
                assert table[node].shape == node.meta["val"].shape, node.name


def _put_together(parts: list[Any], placement: Placement) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if isinstance(placement, Partial):
        return _sum(parts)
    if isinstance(placement, Shard):
        return torch.cat(parts, placement.dim)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], equal_nan=True)
    return parts[0]


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
