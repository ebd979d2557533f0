"""Repeated blocks: modules whose ops, shapes and dtypes are equal, such as the layers of a transformer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import fx

from partita.graph.flops import tensors_of
from partita.graph.graph import OpInfo, Phase
from partita.units import fingerprint


def repeated_blocks(nodes: Iterable[fx.Node]) -> tuple[tuple[str, ...], ...]:
    """Groups of module paths with equal forward ops; of nested groups only the outermost are given.

    Example:
        A 12-layer GPT gives ``(("transformer.h.0", ..., "transformer.h.11"),)``.
    """
    signatures: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        info = node.meta.get("op")
        if not isinstance(info, OpInfo) or info.phase is not Phase.FORWARD or not info.module:
            continue
        text = _signature(node)
        parts = info.module.split(".")
        for length in range(1, len(parts) + 1):
            signatures[".".join(parts[:length])].append(text)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, texts in signatures.items():
        parent = path.rpartition(".")[0]
        groups[parent, fingerprint(texts)].append(path)
    repeated = [tuple(paths) for paths in groups.values() if len(paths) > 1 and len(signatures[paths[0]]) > 1]
    covered = {path for paths in repeated for path in paths}
    return tuple(paths for paths in repeated if not _inside(paths[0], covered))


def _inside(path: str, covered: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:length]) in covered for length in range(1, len(parts)))


def _signature(node: fx.Node) -> str:
    shapes = [(tuple(t.shape), t.dtype) for t in tensors_of(node.meta.get("val"))]
    arguments = [item for item in node.args if not isinstance(item, fx.Node)]
    return f"{node.target}{shapes}{arguments if not _holds_node(arguments) else ''}"


def _holds_node(arguments: Sequence[object]) -> bool:
    return any(isinstance(item, (list, tuple)) and any(isinstance(i, fx.Node) for i in item) for item in arguments)
