"""Recognises repeated blocks: modules that run the same ops on the same shapes, such as the layers of a transformer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from partita.graph.graph import OpInfo, Phase
from partita.units import fingerprint

_ABOUT_EQUAL = 1.2  # work within this factor counts as equal


def _ancestors(path: str) -> Iterator[str]:
    """The path itself and every module around it, without the model: ``a.b.c -> a.b.c, a.b, a``."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _describe(value: Any) -> str:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return ";".join(f"{tuple(t.shape)}{t.dtype}" if isinstance(t, torch.Tensor) else str(t) for t in items)


def _signature(path: str, nodes: Sequence[fx.Node]) -> str:
    """A hash of the ops of a module: targets, shapes, types, arguments, inner wiring and relative module paths."""
    position = {node: index for index, node in enumerate(nodes)}

    def name(item: fx.Node) -> str:
        return f"%{position[item]}" if item in position else f"outside:{_describe(item.meta.get('val'))}"

    parts: list[object] = []
    for node in nodes:
        info = node.meta.get("op")
        inner = info.module[len(path) :] if isinstance(info, OpInfo) else ""
        args = fx.map_arg((node.args, node.kwargs), lambda item: _Text(name(item)))
        parts += [node.target, inner, _describe(node.meta.get("val")), args]
    return fingerprint(parts)


class _Text(str):
    """A text that prints without quotes, so that arguments hash alike in every position."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def find_blocks(nodes: Sequence[fx.Node], parameters: frozenset[fx.Node]) -> tuple[tuple[str, ...], ...]:
    """Groups of module paths whose forward ops are equal, none inside another.

    Of nested candidates those are taken that cover most work (FLOPs, and one for each op); of those that cover about as
    much, those with more members: the six layers rather than the two stages of three. Modules without parameters are no
    blocks.

    Args:
        nodes: all op nodes in order, with ``meta["op"]``.
        parameters: placeholder nodes of the parameters.
    """
    members: dict[str, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        info = node.meta.get("op")
        if isinstance(info, OpInfo) and info.phase is Phase.FORWARD:
            for path in _ancestors(info.module):
                members[path].append(node)
    groups: dict[str, list[str]] = defaultdict(list)
    for path, inside in members.items():
        if any(item in parameters for node in inside for item in node.all_input_nodes):
            groups[_signature(path, inside)].append(path)
    repeated = [tuple(paths) for paths in groups.values() if len(paths) > 1]

    def rank(paths: tuple[str, ...]) -> tuple[int, int]:
        covered_work = len(paths) * sum(1 + node.meta["op"].flops for node in members[paths[0]] if "op" in node.meta)
        return round(math.log(covered_work, _ABOUT_EQUAL)), len(paths)

    taken: list[tuple[str, ...]] = []
    covered: set[str] = set()
    for paths in sorted(repeated, key=lambda paths: (*(-value for value in rank(paths)), paths)):
        if not any(_related(path, other) for path in paths for other in covered):
            taken.append(paths)
            covered.update(paths)
    return tuple(sorted(taken))


def _related(path: str, other: str) -> bool:
    return path == other or path.startswith(other + ".") or other.startswith(path + ".")
