"""Windows over a cut dim: which entries a worker needs or touches beyond its own, and how they come and go.

With ``N`` the extent of the whole dim, worker ``i``'s window is ``[starts[i], ends[i])``; it may begin before 0 and end
after N (padding). Its real part is ``[max(start, 0), min(end, N))``. A window conversion is an exchange of real parts
and a local step that adds or drops the rest:

* Shard -> Windows: `communication.halo_exchange`, then pad with the fill value;
* Replicate -> Windows: slice the real part, then pad;
* WindowSums -> Shard: slice the real part, then `communication.halo_sum`;
* WindowSums -> Partial: slice the real part, then pad with zeros to the whole extent.

The second pair is the transpose of the first, as the gradient of a stencil is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from partita.sharding import communication
from partita.sharding.calls import Slot
from partita.sharding.placement import Shard, Windows, WindowSums, local_shape

if TYPE_CHECKING:
    from partita.sharding.localize import Localizer
    from partita.sharding.propagate import Conversion

aten = torch.ops.aten
WINDOW_KINDS = frozenset({"window", "unwindow", "halo_exchange", "halo_sum"})


def real_parts(window: Windows | WindowSums, extent: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and ends of every worker's window, without what lies outside of ``[0, extent)``.

    Example:
        >>> real_parts(Windows(0, (-1, 3), (5, 9)), 8)
        ((0, 3), (5, 8))
    """
    starts = tuple(min(max(start, 0), extent) for start in window.starts)
    ends = tuple(max(min(end, extent), start) for start, end in zip(starts, window.ends, strict=True))
    return starts, ends


def write_window_conversion(localizer: Localizer, step: Conversion, node: fx.Node, meta: dict[str, Any]) -> fx.Node:
    """The local ops and the exchange of one window conversion; the node that holds the result."""
    writer = _Writer(localizer, step, meta)
    return writer.to_windows(node) if isinstance(step.target, Windows) else writer.from_sums(node)


class _Writer:
    def __init__(self, localizer: Localizer, step: Conversion, meta: dict[str, Any]) -> None:
        self.localizer, self.step, self.meta = localizer, step, meta
        window = step.target if isinstance(step.target, Windows) else step.source
        assert isinstance(window, (Windows, WindowSums))
        self.window = window
        self.shape = step.value.spec.shape
        self.extent = self.shape[window.dim]
        self.starts, self.ends = real_parts(window, self.extent)
        self.start, self.end = self.starts[localizer.coordinate], self.ends[localizer.coordinate]

    def to_windows(self, node: fx.Node) -> fx.Node:
        assert isinstance(self.window, Windows)
        if isinstance(self.step.source, Shard):
            node = self._exchange(communication.halo_exchange, node, self.step.source.sizes)
        else:
            node = self._slice(node, self.start, self.end)
        own = self.localizer.coordinate
        return self._pad(node, self.start - self.window.starts[own], self.window.ends[own] - self.end, self.window.fill)

    def from_sums(self, node: fx.Node) -> fx.Node:
        first = self.window.starts[self.localizer.coordinate]
        node = self._slice(node, self.start - first, self.end - first)
        if isinstance(self.step.target, Shard):
            return self._exchange(communication.halo_sum, node, self.step.target.sizes)
        return self._pad(node, self.start, self.extent - self.end, 0)

    def _slice(self, node: fx.Node, start: int, end: int) -> fx.Node:
        return self._emit(aten.slice.Tensor, (Slot(0), self.window.dim, start, end), node)

    def _pad(self, node: fx.Node, before: int, after: int, fill: float) -> fx.Node:
        """Left out where no worker pads, so that all workers' graphs look alike."""
        window, is_sum = self.window, isinstance(self.window, WindowSums)
        if not is_sum and (window.starts, window.ends) == (self.starts, self.ends):
            return node
        pads = [0, 0] * (len(self.shape) - 1 - window.dim) + [before, after]
        return self._emit(aten.constant_pad_nd.default, (Slot(0), pads, fill), node)

    def _emit(self, target: Any, args: tuple[Any, ...], node: fx.Node) -> fx.Node:
        name = self.step.name(self.localizer.layout.axis)
        new = self.localizer._emit(target, args, {}, (node,), name, self.meta)
        self.localizer._local_info(new, self.step.value)
        return new

    def _exchange(self, function: Any, node: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
        localizer, step, dim = self.localizer, self.step, self.window.dim
        options: dict[str, Any] = {"axis": localizer.layout.axis, "dim": dim, "sizes": sizes}
        options |= {"starts": self.starts, "ends": self.ends}
        name = step.name(localizer.layout.axis)
        new = localizer.graph.create_node("call_function", function, (node,), options, name)
        after = Windows(dim, self.starts, self.ends) if function is communication.halo_exchange else Shard(dim, sizes)
        shape = local_shape(self.shape, after, localizer.coordinate)
        new.meta = {**self.meta, "val": localizer.runner.empty(shape, step.value.meta)}
        return new
