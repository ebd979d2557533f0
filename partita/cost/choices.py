"""Choices between kernels: which of two ways to compute an op is faster here is measured once and kept on disk."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from partita.cache import read_json, write_json
from partita.cluster.hardware import cpu_name
from partita.cost.measure_ops import on_pinned_threads, op_key
from partita.units import fingerprint

T = TypeVar("T")  # nodes, mostly
Make = Callable[[fx.Graph, fx.Node, Mapping[fx.Node, Any]], Any]


class Choices(Generic[T]):
    """By op, shapes, strides and number of threads: whether another kernel takes the place of the op's own.

    Args:
        name: of the other kernel.
        measure: runs both for a node, in the calling thread, and tells whether the other one is to be taken.
        key: what a choice depends on, given a node and the number of threads; it may be made for whatever has a key.

    Example:
        >>> choices: Choices[fx.Node] = Choices("onednn", lambda node: True)
        >>> choices.of(products, num_threads=1) == products
        True
    """

    def __init__(self, name: str, measure: Callable[[T], bool], *, key: Callable[[Any, int], str] = op_key) -> None:
        self._kernel, self._measure, self._key = name, measure, key
        self._known: dict[str, bool] | None = None  # None: not read yet
        self._lock = threading.Lock()  # held by whoever reads or adds choices

    def of(self, nodes: Iterable[T], num_threads: int) -> list[T]:
        """Those of `nodes` for which it is taken on `num_threads` threads; what is not known is measured now."""
        keyed = [(node, self._key(node, num_threads)) for node in nodes]
        with self._lock:
            known = self._read()
            missing = {key: node for node, key in keyed if key not in known}
            if missing:
                known.update(self._measured(missing, num_threads))
                self._store(known)
            return [node for node, key in keyed if known[key]]

    def applied(
        self: Choices[fx.Node], module: fx.GraphModule, nodes: Iterable[fx.Node], num_threads: int, make: Make
    ) -> fx.GraphModule:
        """The module with the other kernel in the place of those of `nodes` for which it is taken; the module itself if
        there are none.

        Args:
            make: adds the other kernel for a node to a new graph, given the copies of all nodes before it; returns what
                stands for the node, a sequence of nodes where the node has several results.
        """
        chosen = {node.name for node in self.of(nodes, num_threads)}
        if not chosen:
            return module
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            source = node.args[0] if node.target is operator.getitem else None
            if node.name in chosen:
                copies[node] = make(graph, node, copies)
            elif isinstance(source, fx.Node) and source.name in chosen:
                copies[node] = copies[source][node.args[1]]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.eliminate_dead_code()  # views that nobody reads any more
        return fx.GraphModule(module, graph)

    def settle(self, node: T, num_threads: int, found: Callable[[], bool]) -> bool:
        """The choice for a node: `found` by the caller, if it is not known. It is kept by the next `keep`."""
        with self._lock:
            return self._read().setdefault(self._key(node, num_threads), found())

    def keep(self) -> None:
        """Has other processes and later ones know what was chosen here."""
        with self._lock:
            self._store(self._read())

    def forget(self) -> None:
        """Read from disk again, next time."""
        with self._lock:
            self._known = None

    def __len__(self) -> int:
        with self._lock:
            return len(self._read())

    def _measured(self, nodes: dict[str, T], num_threads: int) -> dict[str, bool]:
        found: dict[str, bool] = {}

        def body() -> None:
            torch.set_num_threads(num_threads)
            for key, node in nodes.items():
                found[key] = self._measure(node)

        on_pinned_threads([()], [body])
        return found

    @property
    def _file(self) -> str:
        processor = (cpu_name(Path("/")), torch.backends.cpu.get_cpu_capability(), torch.__version__)
        return f"variants/{fingerprint((self._kernel, *processor))}.json"

    def _read(self) -> dict[str, bool]:
        if self._known is None:
            self._known = {key: value for key, value in self._kept().items() if isinstance(value, bool)}
        return self._known

    def _kept(self) -> dict[str, object]:
        kept = (read_json(self._file) or {}).get(self._kernel)
        return kept if isinstance(kept, dict) else {}

    def _store(self, choices: dict[str, bool]) -> None:
        write_json(self._file, {self._kernel: {**self._kept(), **choices}})  # another process may have added to it
