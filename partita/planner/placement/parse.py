"""Values out of a decoded JSON file, or an `InputError` that names the key and the place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from partita.errors import InputError


def value_of(data: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise InputError(
            f"{where} must have the key `{key}`, but it has {', '.join(map(str, data)) or 'none'}; add it."
        )
    return data[key]


def mapping_of(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object with keys, but it is {type(value).__name__}.")
    return value


def list_of(data: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    value = value_of(data, key, where)
    if not isinstance(value, list):
        raise InputError(f"`{key}` of {where} must be a list, but it is {type(value).__name__}.")
    return value


def number_of(data: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number that is not negative."""
    value = value_of(data, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(f"`{key}` of {where} must be a finite number of at least 0, but got {value!r}.")
    return float(value)


def count_of(data: Mapping[str, Any], key: str, where: str, *, least: int = 1) -> int:
    """A whole number of at least `least`; 3.0 counts as whole."""
    value = number_of(data, key, where)
    if value != int(value) or value < least:
        raise InputError(f"`{key}` of {where} must be a whole number of at least {least}, but got {value:g}.")
    return int(value)


def truth_of(data: Mapping[str, Any], key: str, where: str, *, default: bool | None = None) -> bool:
    """A boolean, also as 0 or 1."""
    value = data.get(key, default) if default is not None else value_of(data, key, where)
    if value not in (0, 1):
        raise InputError(f"`{key}` of {where} must be true, false, 0 or 1, but got {value!r}.")
    return bool(value)


def limits_of(data: Mapping[str, Any], names: Sequence[str], overrides: Mapping[str, float] | None) -> dict[str, Any]:
    """The file's limits, those of `overrides` in their place; no others are known."""
    limits = {name: value_of(data, name, "the file") for name in names} | dict(overrides or {})
    if unknown := sorted(set(limits) - set(names)):
        raise InputError(f"overrides must be of {', '.join(names)}, but got {', '.join(unknown)}.")
    return limits


def nodes_of(data: Mapping[str, Any], what: str) -> tuple[list[Mapping[str, Any]], dict[Any, int]]:
    """The file's nodes, which are `what`, and the position of each id."""
    nodes = [mapping_of(node, f"node {i}") for i, node in enumerate(list_of(data, "nodes", "the file"))]
    if not nodes:
        raise InputError(f"`nodes` of the file must hold at least one node, but it is empty; add the {what}.")
    position = {value_of(node, "id", "a node"): i for i, node in enumerate(nodes)}
    if len(position) != len(nodes):
        raise InputError(f"node ids must differ, but {len(nodes)} nodes have {len(position)} ids; rename the repeated.")
    return nodes, position


def topological_order(ids: Sequence[Any], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Positions in an order that all edges follow; raises `InputError` that names nodes of a cycle."""
    heads: list[list[int]] = [[] for _ in ids]
    missing = [0] * len(ids)
    for tail, head in edges:
        heads[tail].append(head)
        missing[head] += 1
    order = [i for i, count in enumerate(missing) if count == 0]
    for i in order:
        for head in heads[i]:
            missing[head] -= 1
            if missing[head] == 0:
                order.append(head)
    if len(order) < len(ids):
        rest = [str(ids[i]) for i, count in enumerate(missing) if count > 0][:6]
        raise InputError(
            f"the graph must have no cycle, but nodes {', '.join(rest)} are on or behind one; cut an edge."
        )
    return order
