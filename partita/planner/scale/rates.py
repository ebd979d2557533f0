"""Rates between machines for many degrees at once: exchanges over the data axis and sends between stages.

The formulas are those of `partita.cost.networks`; here each distinct group of ranks is looked up once, as seconds for
each byte and seconds besides. `exchanges` are those that ranks from the first on see; `best_exchanges` and `sends` take
the best of all kinds of machines, so that bounds made of them hold wherever a stage lies.

Why a channel over several kinds of machines is no better than that of one of them alone (`ideal_groups`): of the kinds
that it touches let j be one with the fewest ranks k_j in a machine. The mixed channel has k = k_j, at least as many
machines (h >= h_j), no higher rates and no lower latencies. Its ring has the rate across machines if k = 1, as j's has,
and else the lesser of both rates, which is at most j's. Its latencies ``(n - h) a1 + (h - 1) a2`` are at least j's
``(n - h_j) a1 + (h_j - 1) a2`` if ``a1 <= a2``; `ideal_groups` therefore lowers a1 to a2 where it is higher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from partita.cluster.model import Link
from partita.cost.calibration import Calibration
from partita.cost.model import CollectiveKind
from partita.cost.networks import Fabric, channel, edge_s

_UNIT = 1e9  # bytes
Array = np.ndarray


class Groups:
    """Groups of ranks, one for each row of a table: how far their ranks lie apart, and how many there are."""

    def __init__(self, stride: Array, ranks: Array) -> None:
        wide = 1 << 32
        keys, self._where = np.unique(stride.astype(np.int64) * wide + ranks.astype(np.int64), return_inverse=True)
        self._distinct = [divmod(int(key), wide) for key in keys]

    def each(self, make: Callable[[int, int], tuple[float, float]]) -> tuple[Array, Array]:
        """``make(stride, ranks)``, called once for each distinct group, as two columns."""
        found = np.array([make(*pair) for pair in self._distinct], dtype=float).reshape(-1, 2).T
        return found[0][self._where], found[1][self._where]


@dataclass
class Rates:
    """Of one fabric."""

    fabric: Fabric
    calibration: Calibration
    _known: dict[tuple[object, ...], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.alone = ideal_groups(self.fabric)
        self.overlap = max(self.calibration.of(group.kind.generation).overlap for group in self.fabric.groups)
        self.bandwidth = max(
            group.kind.gpu.memory_bytes_per_s * self.calibration.of(group.kind.generation).memory
            for group in self.fabric.groups
        )

    def exchanges(self, groups: Groups) -> tuple[Array, Array]:
        """Seconds for each byte, and besides, of a reduce-scatter in each of ``groups``."""
        return groups.each(lambda stride, ranks: self._collective([self.fabric], stride, ranks, "reduce_scatter"))

    def best_exchanges(self, groups: Groups, kind: CollectiveKind = "reduce_scatter") -> tuple[Array, Array]:
        """Seconds for each byte and besides, each on the machines that are best at it: no such exchange takes less.

        An all-reduce takes the better of two algorithms: its seconds besides are those of the better one, for each byte
        twice those of a reduce-scatter, which neither undercuts.
        """
        return groups.each(lambda stride, ranks: self._collective(self.alone, stride, ranks, kind))

    def sends(self, groups: Groups) -> tuple[Array, Array]:
        """Seconds for each byte, and besides, of a send between stages of all devices of ``groups``, at the least."""
        most = max(group.gpus_per_machine for group in self.fabric.groups)
        return groups.each(lambda stride, ranks: self._send(min(stride * ranks, most)))

    def _collective(
        self, fabrics: Sequence[Fabric], stride: int, ranks: int, kind: CollectiveKind
    ) -> tuple[float, float]:
        key = (len(fabrics), stride, ranks, kind)
        if key not in self._known:
            pairs = []
            for fabric in fabrics if ranks > 1 else ():
                one = channel(fabric, self.calibration, num_ranks=ranks, stride=stride, span=ranks * stride)
                times = 2 if kind == "all_reduce" else 1
                byte_s = (one.collective_s("reduce_scatter", _UNIT) - one.collective_s("reduce_scatter", 0.0)) / _UNIT
                pairs.append((times * byte_s, one.collective_s(kind, 0.0)))
            self._known[key] = _best(pairs)
        return self._known[key]

    def _send(self, span: int) -> tuple[float, float]:
        """Between neighbours in one machine, or between machines, whichever is less (stages may straddle them)."""
        if ("send", span) not in self._known:
            self._known["send", span] = self._best_send(span)
        return self._known["send", span]

    def _best_send(self, span: int) -> tuple[float, float]:
        pairs = []
        several = len(self.alone) > 1
        for fabric in self.alone:
            group = fabric.groups[0]
            size = group.gpus_per_machine
            if several:  # its network may lead to machines of another kind, even if it has but one machine
                fabric = Fabric(groups=(replace(group, num_machines=group.num_machines + 1 + span // size),))
            for target in [span] if span >= size else [span, size]:
                if target < fabric.num_gpus:
                    fixed_s = edge_s(fabric, self.calibration, 0, target, span, 0.0)
                    pairs.append(
                        ((edge_s(fabric, self.calibration, 0, target, span, _UNIT) - fixed_s) / _UNIT, fixed_s)
                    )
        return _best(pairs)


def ideal_groups(fabric: Fabric) -> list[Fabric]:
    """Each group of equal machines alone; of several none has higher latencies inside a machine than outside."""
    if len(fabric.groups) == 1:
        return [fabric]
    return [
        Fabric(
            groups=(
                replace(
                    group,
                    link=Link(
                        bytes_per_s=group.link.bytes_per_s,
                        latency_s=min(group.link.latency_s, group.network.latency_s),
                    ),
                ),
            )
        )
        for group in fabric.groups
    ]


def _best(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min((one for one, _ in pairs), default=0.0), min((two for _, two in pairs), default=0.0)
