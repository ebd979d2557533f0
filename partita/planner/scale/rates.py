"""Rates between machines for many degrees at once: exchanges over the data axis and sends between stages.

The formulas are those of `partita.cost.networks`; here each distinct group of ranks is looked up once, as seconds for
each byte and seconds besides. `exchanges` are those that ranks from the first on see; `best_exchanges` and `sends` take
the best of all kinds of machines, so that bounds made of them hold wherever a stage lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from partita.cost.calibration import Calibration
from partita.cost.networks import Fabric, channel, edge_s

_UNIT = 1e9  # bytes


@dataclass
class Rates:
    """Of one fabric."""

    fabric: Fabric
    calibration: Calibration
    _known: dict[tuple[object, ...], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.alone = [Fabric(groups=(group,)) for group in self.fabric.groups]
        self.overlap = max(self.calibration.of(group.kind.generation).overlap for group in self.fabric.groups)
        self.bandwidth = max(
            group.kind.gpu.memory_bytes_per_s * self.calibration.of(group.kind.generation).memory
            for group in self.fabric.groups
        )

    def exchanges(self, stride: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds for each byte, and besides, of a reduce-scatter over ``ranks`` ranks ``stride`` apart."""
        return self._each(stride, ranks, lambda s, n: self._scatter([self.fabric], s, n))

    def best_exchanges(self, stride: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same on the best machines."""
        fabrics = self.alone if len(self.alone) > 1 else [self.fabric]
        return self._each(stride, ranks, lambda s, n: self._scatter(fabrics, s, n))

    def sends(self, span: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds besides, and for each byte, of a send between stages of ``span`` devices, at the least."""
        most = max(group.gpus_per_machine for group in self.fabric.groups)
        byte_s, fixed_s = self._each(np.minimum(span, most), np.zeros_like(span), lambda s, _: self._send(s))
        return fixed_s, byte_s

    def _each(
        self, left: np.ndarray, right: np.ndarray, make: Callable[[int, int], tuple[float, float]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """``make`` once for each distinct pair."""
        wide = 1 << 32
        keys, where = np.unique(left.astype(np.int64) * wide + right.astype(np.int64), return_inverse=True)
        found = np.array([make(*divmod(int(key), wide)) for key in keys], dtype=float).reshape(-1, 2)
        return found[where, 0], found[where, 1]

    def _scatter(self, fabrics: Sequence[Fabric], stride: int, ranks: int) -> tuple[float, float]:
        key = (len(fabrics), stride, ranks)
        if key not in self._known:
            pairs = []
            for fabric in fabrics if ranks > 1 else ():
                one = channel(fabric, self.calibration, num_ranks=ranks, stride=stride, span=ranks * stride)
                fixed_s = one.collective_s("reduce_scatter", 0.0)
                pairs.append(((one.collective_s("reduce_scatter", _UNIT) - fixed_s) / _UNIT, fixed_s))
            self._known[key] = _best(pairs)
        return self._known[key]

    def _send(self, span: int) -> tuple[float, float]:
        """Between neighbours in one machine, or between machines, whichever is less (stages may straddle them)."""
        pairs = []
        for fabric in self.alone:
            size = fabric.groups[0].gpus_per_machine
            targets = [span] if span >= size else [span, size]
            for target in targets:
                if target < fabric.num_gpus:
                    fixed_s = edge_s(fabric, self.calibration, 0, target, span, 0.0)
                    pairs.append(
                        ((edge_s(fabric, self.calibration, 0, target, span, _UNIT) - fixed_s) / _UNIT, fixed_s)
                    )
        return _best(pairs)


def _best(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min((one for one, _ in pairs), default=0.0), min((two for _, two in pairs), default=0.0)
