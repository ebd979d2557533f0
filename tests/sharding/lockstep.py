"""Test helper: capture small models, and run all workers' local graphs in lockstep with real exchanges."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from partita.graph.capture import capture
from partita.graph.graph import InputKind
from partita.sharding import communication
from partita.sharding.placement import Partial, Placement, Replicate, Shard
from partita.sharding.shard import ShardedGraph


def joint_graph(
    model: torch.nn.Module, loss_fn: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, ...]
) -> tuple[fx.GraphModule, list[torch.Tensor], list[str]]:
    """The captured graph, its real inputs in order, and the names of the batch placeholders."""
    graph = capture(model, loss_fn, batch)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    flat, names = [], []
    for item in graph.inputs:
        if item.kind is InputKind.BATCH:
            flat.append(batch[item.leaf])
            names.append(item.node)
        elif item.kind is InputKind.CONSTANT:
            flat.append(graph.constants[item.name])
        elif item.kind is InputKind.SEED:
            flat.append(torch.ones(()))
        else:
            flat.append(state[item.name].detach().clone())
    return graph.module, flat, names


def pieces(value: torch.Tensor, placement: Placement, size: int) -> list[torch.Tensor]:
    if isinstance(placement, Shard):
        return [p.clone() for p in torch.split(value, list(placement.sizes), placement.dim)]
    assert isinstance(placement, Replicate)
    return [value.clone() for _ in range(size)]


def exchange(node: fx.Node, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What every worker has after the exchange ``node``."""
    kw, size = node.kwargs, len(parts)
    if node.target is communication.all_reduce:
        return [sum(parts[1:], parts[0]).clone() for _ in range(size)]
    if node.target is communication.reduce_scatter:
        return [p.clone() for p in torch.split(sum(parts[1:], parts[0]), list(kw["sizes"]), kw["dim"])]
    assert [p.shape[kw["dim"]] for p in parts] == list(kw["sizes"])
    whole = torch.cat(parts, kw["dim"])
    if node.target is communication.all_gather:
        return [whole.clone() for _ in range(size)]
    return [p.clone() for p in torch.split(whole, list(kw["new_sizes"]), kw["new_dim"])]


def run_sharded(sharded: ShardedGraph, inputs: Mapping[str, torch.Tensor]) -> list[Any]:
    """Outputs, recombined, of all workers running in lockstep."""
    values = dict(inputs)
    if sharded.prologue is not None:
        needed = [n.name for n in sharded.prologue.graph.nodes if n.op == "placeholder"]
        values.update(zip(sharded.hoisted, sharded.prologue(*[inputs[n] for n in needed]), strict=True))
    graphs = [sharded.local(c).graph for c in range(sharded.size)]
    envs: list[dict[fx.Node, Any]] = [{} for _ in graphs]
    runners = [_run_until_exchange(graph, env) for graph, env in zip(graphs, envs, strict=True)]
    for env, graph, coordinate in zip(envs, graphs, range(sharded.size), strict=True):
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = pieces(values[node.name], sharded.input_placements[node.name], sharded.size)[coordinate]
    while True:
        events = [next(runner) for runner in runners]
        if isinstance(events[0], tuple):
            break
        assert len({(e.target, str(e.kwargs)) for e in events}) == 1, "workers must take part in the same exchange"
        parts = exchange(events[0], [env[e.args[0]] for env, e in zip(envs, events, strict=True)])
        for env, event, part in zip(envs, events, parts, strict=True):
            assert part.shape == event.meta["val"].shape
            env[event] = part
    return [_combine([e[i] for e in events], p) for i, p in enumerate(sharded.output_placements)]


def _combine(parts: list[Any], placement: Placement) -> Any:
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    if isinstance(placement, Partial):
        return sum(parts[1:], parts[0])
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0])
    return parts[0]


def _run_until_exchange(graph: fx.Graph, env: dict[fx.Node, Any]) -> Any:
    for node in graph.nodes:
        if node.op == "output":
            yield tuple(env[a] if isinstance(a, fx.Node) else a for a in node.args[0])
        elif node.op == "call_function" and node.target in communication.COMMUNICATION_OPS:
            yield node
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)
            if node.target is not operator.getitem and isinstance(env[node], torch.Tensor):
                assert env[node].shape == node.meta["val"].shape, node.name
