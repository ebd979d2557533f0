"""Which storages the values of a functional graph show, and how much memory the graph needs.

Many values own no memory: a view shows its input's storage, an item of a tuple that of the tuple, and a small view
keeps the whole of a large storage alive. A storage lives while any value that shows it does: values are let go right
after their last use (`last_uses`), as plain code and autograd do, and results stay.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from partita.graph import torch_adapter
from partita.graph.workspace import workspace_bytes


@dataclass(frozen=True)
class GraphMemory:
    """What running a graph holds besides its inputs.

    Attributes:
        peak_bytes: peak of all that its ops allocate, results and workspaces among it.
        storages: bytes of the storages that its results show and that it made itself.
        shown: per result an index into `storages`, or ``-1 - i`` where the result shows the storage of input i.
        is_dense: per result, whether its elements lie in memory in order, without gaps: flattening it copies nothing.
        takes_dense: per input, whether it is expected to lie like that.
    """

    peak_bytes: int = 0
    storages: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()
    is_dense: tuple[bool, ...] = ()
    takes_dense: tuple[bool, ...] = ()


def graph_memory(graph: fx.Graph) -> GraphMemory:
    """The memory of a functional graph whose nodes carry fake values in ``meta["val"]`` and whose output is a tuple.

    Example:
        >>> module = make_fx(lambda x: (x.t(), (x + 1)[0]), tracing_mode="fake")(torch.ones(2, 3))
        >>> graph_memory(module.graph).storages, graph_memory(module.graph).shown
        ((24,), (-1, 0))
    """
    storages = Storages(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    results: Sequence[fx.Node] = graph.output_node().args[0]  # type: ignore[assignment]
    outside = {storages.shown[node]: -1 - index for index, node in enumerate(placeholders)}
    own: dict[int, int] = {}
    shown = []
    for node in results:
        number = storages.shown[node]
        shown.append(outside[number] if number in outside else own.setdefault(number, len(own)))
    return GraphMemory(
        peak_bytes=_peak_bytes(graph, storages),
        storages=tuple(storages.num_bytes[number] for number in own),
        shown=tuple(shown),
        is_dense=tuple(node.meta["val"].is_contiguous() for node in results),
        takes_dense=tuple(node.meta["val"].is_contiguous() for node in placeholders),
    )


def last_uses(graph: fx.Graph) -> Mapping[fx.Node, list[fx.Node]]:
    """Node -> values whose last use it is. Values that nobody uses are let go where they are made."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            last[node] = node
        for value in node.all_input_nodes:
            last[value] = node
    result: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if value.op != "output":
            result.setdefault(node, []).append(value)
    return result


def tensor_bytes(value: torch.Tensor) -> int:
    """Bytes of the smallest storage that holds a tensor of this shape and these strides."""
    if value.numel() == 0:
        return 0
    last = sum((extent - 1) * stride for extent, stride in zip(value.shape, value.stride(), strict=True))
    return int(last + 1) * value.element_size()


class Storages:
    """The storages of a graph, numbered in the order in which they come into being.

    Attributes:
        num_bytes: by storage; 0 for those of placeholders and attributes, which live longer than the graph runs.
        made: by op, the storages that it allocates.
        shown: by node, what its value shows: the number of a storage, for several tensors a tuple of them.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.num_bytes: list[int] = []
        self.made: dict[fx.Node, range] = {}
        self.shown: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.shown[node] = self._new(0)
            elif node.op != "output":
                first = len(self.num_bytes)
                self.shown[node] = self._result(node)
                self.made[node] = range(first, len(self.num_bytes))

    def of(self, node: fx.Node) -> set[int]:
        """All storages that a node's value shows."""
        return set(_numbers(self.shown[node]))

    def _new(self, num_bytes: int) -> int:
        self.num_bytes.append(num_bytes)
        return len(self.num_bytes) - 1

    def _result(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            return self.shown[source][index]
        value, viewed = node.meta.get("val"), _viewed(node)
        if viewed is None:
            return _of_tensors(value, lambda tensor: self._new(tensor_bytes(tensor)))
        number = next(_numbers(self.shown[viewed]))
        return _of_tensors(value, lambda _: number)


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose storage the op's results show, None where it allocates them."""
    for place in torch_adapter.viewed_arguments(node.target):
        name = node.target._schema.arguments[place].name  # type: ignore[union-attr]
        value = node.args[place] if place < len(node.args) else node.kwargs.get(name)
        if isinstance(value, fx.Node):
            return value
    return None


def _of_tensors(value: Any, function: Any) -> Any:
    """``function(tensor)`` of a tensor, or a tuple of these for several; None for what is no tensor."""
    if isinstance(value, (tuple, list)):
        return tuple(_of_tensors(item, function) for item in value)
    return function(value) if isinstance(value, torch.Tensor) else None


def _numbers(shown: Any) -> Iterator[int]:
    if isinstance(shown, tuple):
        for item in shown:
            yield from _numbers(item)
    elif shown is not None:
        yield shown


def _peak_bytes(graph: fx.Graph, storages: Storages) -> int:
    ends = last_uses(graph)
    num_values: Counter[int] = Counter()  # by storage, the values that show it and are still needed
    now = peak = 0
    for node, made in storages.made.items():
        now += sum(storages.num_bytes[number] for number in made)
        peak = max(peak, now + workspace_bytes(node))
        num_values.update(storages.of(node))
        for value in ends.get(node, ()):
            for number in storages.of(value):
                num_values[number] -= 1
                if num_values[number] == 0:
                    now -= storages.num_bytes[number]
    return peak
