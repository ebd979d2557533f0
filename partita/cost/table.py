"""`CostTable`: measured times of ops, segments and updates on this machine; a roofline where nothing was measured.

Times of ops and the runtime's overheads are kept on disk. Times of whole segments and updates replace the sum of their
parts for as long as the table lives: they depend on more than their names tell (values, what else ran).

Contention, where it was not measured: `num_active` workers share the memory, so an op that moves n bytes takes at least
``num_active * n / bandwidth``; and not-compiled ops hold the interpreter for `dispatch_s` each, so `num_active` workers
together need at least ``num_active * dispatch_s`` for one op each. A compiled segment that was not measured is taken as
its ops without dispatch, where ops other than contractions cost `FUSED_SHARE` (fusion saves the writing and reading of
what lies between them).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import fx

from partita.cache import read_json, write_json
from partita.cluster.model import Cluster
from partita.cost.collectives import collective_time_s, link_between
from partita.cost.measure_nodes import measure_in_place, measure_nodes
from partita.cost.measure_ops import measure_dispatch_s, op_key
from partita.cost.memory import update_traffic_bytes
from partita.cost.model import CollectiveKind, Place
from partita.cost.overheads import Overheads
from partita.cost.roofline import Rates, rates_of, roofline_s
from partita.cost.sums import EXACT_SUM, SumCost
from partita.graph.graph import OpInfo
from partita.sharding.communication import COMMUNICATION_OPS
from partita.units import fingerprint

FORMAT = "couriers"  # of the kept times: those of other kernels mean nothing now
IN_PLACE = "|in place"  # after the key of an op: its time where compiled code forms it in place
FUSED_SHARE = 0.4
UPDATE_TENSOR_S = 12e-6  # what an optimizer takes for each tensor, whatever its size
DISPATCH_S = 4e-6  # of a CPU op, where not measured
GPU_LAUNCH_S = 6e-6
UNCERTAINTY_MEASURED = 0.15
UNCERTAINTY_COMPILED = 0.4  # the sum of measured ops says little of segments that fuse them
UNCERTAINTY_REFINED = 0.08
UNCERTAINTY_ROOFLINE = 0.5
MEASURE_LIMIT_BYTES = 2**30  # ops that touch more are left to the roofline: measuring them could exhaust the memory

MeasureNodes = Callable[..., list[float | None]]


def is_free(node: fx.Node) -> bool:
    """Whether the node takes no time of its own: not an op, taking an element of a tuple, an exchange."""
    return node.op != "call_function" or node.target is operator.getitem or node.target in COMMUNICATION_OPS


class CostTable:
    """Implements `partita.cost.model.CostModel` for `cluster`.

    Example:
        >>> table = CostTable(cluster)
        >>> table.measure([graph.module], cluster.processes[0].cores[:1], budget_s=5.0)
        >>> table.op_time_s(node, worker)
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        sums: SumCost = EXACT_SUM,
        optimizer_efficiency: float = 0.5,
        read_cache: bool = True,
    ) -> None:
        self._cluster, self._sums = cluster, sums
        self._efficiency = optimizer_efficiency
        hardware = [(m.cpu, len(m.cores), m.cache_bytes, tuple(g.name for g in m.gpus)) for m in cluster.machines]
        self._name = f"cost/{fingerprint([*hardware, torch.__version__, FORMAT])}.json"
        self._ops: dict[str, float] = {}
        self._wholes: dict[tuple[object, ...], dict[float, float]] = {}  # segment or update -> num_active -> seconds
        self._overheads: Overheads | None = None
        self._dispatch_s = DISPATCH_S
        self._dispatch_measured = False
        self._keys: dict[tuple[int, int], tuple[fx.Node, str]] = {}
        if read_cache and cluster.is_here:
            self._load()

    @property
    def num_measured_ops(self) -> int:
        return len(self._ops)

    @property
    def dispatch_s(self) -> float:
        """Seconds of interpreter and dispatcher per op that is not compiled."""
        return self._dispatch_s

    def uncertainty(self, *, compiled: bool) -> float:
        if not self._ops:
            return UNCERTAINTY_ROOFLINE
        return UNCERTAINTY_COMPILED if compiled else UNCERTAINTY_MEASURED

    @property
    def refined_uncertainty(self) -> float:
        return UNCERTAINTY_REFINED

    @property
    def overheads(self) -> Overheads:
        """What the runtime takes for itself: measured, or the defaults."""
        return self._overheads or Overheads()

    def op_time_s(self, node: fx.Node, place: Place, *, num_active: float = 1) -> float:
        if is_free(node):
            return 0.0
        rates, num_bytes = self._rates(place), _num_bytes(node)
        measured = self._ops.get(self._key(node, len(place.cores))) if place.gpu is None else None
        if measured is None:
            alone_s = roofline_s(rates, _flops(node), num_bytes, num_active=num_active)
        else:
            alone_s = max(measured, num_active * num_bytes / rates.machine_bytes_per_s)
        return max(alone_s, num_active * self._dispatch_s) if place.gpu is None else alone_s

    def segment_time_s(
        self, module: fx.GraphModule, key: str, place: Place, *, compiled: bool, num_active: float = 1
    ) -> float:
        def sum_s(active: float) -> float:
            return self._sum_of_ops_s(module, place, compiled, active)

        return _between(self._wholes.get(_segment_key(key, len(place.cores), compiled), {}), num_active, sum_s)

    def _sum_of_ops_s(self, module: fx.GraphModule, place: Place, compiled: bool, num_active: float) -> float:
        total = 0.0
        for node in module.graph.nodes:
            if is_free(node):
                continue
            in_place_s = self._in_place_s(node, place, num_active) if compiled else None
            if in_place_s is not None:
                total += in_place_s
                continue
            time_s = self.op_time_s(node, place, num_active=num_active)
            if compiled:
                floor = GPU_LAUNCH_S if place.gpu is not None else self._dispatch_s * max(num_active, 1)
                time_s = max(time_s - floor, 0.0) * (1.0 if _is_contraction(node) else FUSED_SHARE)
            total += time_s
        return total + (self._dispatch_s if compiled else 0.0)

    def _in_place_s(self, node: fx.Node, place: Place, num_active: float) -> float | None:
        """Seconds of an op that compiled code forms in place; None of others."""
        if place.gpu is not None or len(place.cores) != 1:
            return None
        measured = self._ops.get(self._key(node, 1) + IN_PLACE)
        return measured and max(measured, num_active * _num_bytes(node) / self._rates(place).machine_bytes_per_s)

    def update_time_s(self, sizes: tuple[int, ...], optimizer: str, place: Place, *, num_active: float = 1) -> float:
        if not sizes:
            return 0.0

        def formula_s(active: float) -> float:
            num_bytes = sum(sizes) * update_traffic_bytes(optimizer) / self._efficiency
            return roofline_s(self._rates(place), 0, num_bytes, num_active=active) + len(sizes) * UPDATE_TENSOR_S

        return _between(self._wholes.get(_update_key(sizes, optimizer, len(place.cores)), {}), num_active, formula_s)

    def transfer_time_s(self, num_bytes: int, source: Place, target: Place) -> float:
        link = link_between(self._cluster, source, target)
        handover_s = self.overheads.handover_s
        return handover_s if link is None else handover_s + link.latency_s + num_bytes / link.bytes_per_s

    def collective_time_s(
        self, kind: CollectiveKind, num_bytes: int, group: tuple[Place, ...], *, num_tensors: int = 1
    ) -> float:
        return collective_time_s(
            self._cluster, kind, num_bytes, group, overheads=self.overheads, num_tensors=num_tensors
        )

    def gradient_sum_time_s(self, num_bytes: int, group: tuple[Place, ...], *, num_tensors: int = 1) -> float:
        return collective_time_s(
            self._cluster,
            "all_reduce",
            num_bytes,
            group,
            overheads=self.overheads,
            num_tensors=num_tensors,
            sums=self._sums,
        )

    def interruption_s(self, num_bytes: int, place: Place, *, num_processes: int, num_busy: int) -> float:
        if place.gpu is not None or num_busy < len(self._cluster.processes[place.process].cores):
            return 0.0
        computed_s = num_bytes * self._sums.compute_s_per_byte
        return computed_s + self.overheads.courier_of(num_bytes * self._sums.sent_share, num_processes)

    @property
    def sent_share(self) -> float:
        return self._sums.sent_share

    def instruction_time_s(self) -> float:
        return self.overheads.instruction_s

    def step_time_s(self, num_workers: int) -> float:
        return self.overheads.step_of(num_workers)

    def missing(self, modules: Iterable[fx.GraphModule], num_threads: int) -> list[fx.Node]:
        """One node for each kind of op that the table has no time for."""
        found: dict[str, fx.Node] = {}
        for node in _ops_of(modules):
            key = self._key(node, num_threads)
            if key not in self._ops and _num_bytes(node) <= MEASURE_LIMIT_BYTES:
                found.setdefault(key, node)
        return list(found.values())

    def measure(
        self,
        modules: Iterable[fx.GraphModule],
        cores: tuple[int, ...],
        *,
        budget_s: float,
        measurer: MeasureNodes = measure_nodes,
    ) -> int:
        """Measure what `missing` names on `cores`, the ops that move most first, for about `budget_s` seconds, and keep
        the results; for half as long, what compiled code takes for those that it forms in place. Returns the number of
        ops measured. Does nothing for a cluster that is only described."""
        if not self._cluster.is_here:
            return 0
        if not self._dispatch_measured and measurer is measure_nodes:
            self._dispatch_s, self._dispatch_measured = measure_dispatch_s(cores[:1]), True
        rates = self._rates_for(cores)
        nodes = sorted(self.missing(modules, len(cores)), key=lambda n: -roofline_s(rates, _flops(n), _num_bytes(n)))
        times = measurer(nodes, cores, budget_s=budget_s)
        known = {
            self._key(node, len(cores)): time_s for node, time_s in zip(nodes, times, strict=True) if time_s is not None
        }
        if measurer is measure_nodes:
            in_place = zip(nodes, measure_in_place(nodes, cores, budget_s=budget_s / 2), strict=True)
            known |= {self._key(node, 1) + IN_PLACE: time_s for node, time_s in in_place if time_s is not None}
        self._ops.update(known)
        if known:
            self._store()
        return sum(time_s is not None for time_s in times)

    def measure_overheads(self, measurer: Callable[[Sequence[int]], Overheads]) -> None:
        """Have `measurer` find the runtime's overheads on the cores of process 0, unless they are known. Does nothing
        for a cluster that is only described."""
        if self._cluster.is_here and self._overheads is None:
            self._overheads = measurer(self._cluster.processes[0].cores)
            self._store()

    def keep_segment_time(
        self, key: str, time_s: float, *, num_threads: int, compiled: bool, num_active: float = 1
    ) -> None:
        """From now on the segment takes `time_s` while `num_active` workers run."""
        self._wholes.setdefault(_segment_key(key, num_threads, compiled), {})[num_active] = time_s

    def knows_segment(self, key: str, *, num_threads: int, compiled: bool, num_active: float = 1) -> bool:
        return num_active in self._wholes.get(_segment_key(key, num_threads, compiled), {})

    def keep_update_time(
        self, sizes: tuple[int, ...], optimizer: str, time_s: float, *, num_threads: int, num_active: float = 1
    ) -> None:
        """From now on the update of slices of these sizes takes `time_s` while `num_active` workers run."""
        self._wholes.setdefault(_update_key(sizes, optimizer, num_threads), {})[num_active] = time_s

    def knows_update(self, sizes: tuple[int, ...], optimizer: str, *, num_threads: int, num_active: float = 1) -> bool:
        return num_active in self._wholes.get(_update_key(sizes, optimizer, num_threads), {})

    def _key(self, node: fx.Node, num_threads: int) -> str:
        cached = self._keys.get((id(node), num_threads))
        if cached is None or cached[0] is not node:
            cached = (node, op_key(node, num_threads))
            self._keys[id(node), num_threads] = cached
        return cached[1]

    def _rates(self, place: Place) -> Rates:
        launch_s = GPU_LAUNCH_S if place.gpu is not None else self._dispatch_s
        return rates_of(self._cluster.machines[place.machine], place, launch_s=launch_s)

    def _rates_for(self, cores: tuple[int, ...]) -> Rates:
        return self._rates(_Here(cores))

    def _load(self) -> None:
        kept = read_json(self._name) or {}
        values = kept.get("ops")
        if isinstance(values, dict):
            self._ops.update({k: float(v) for k, v in values.items() if isinstance(v, int | float) and v >= 0})
        with contextlib.suppress(msgspec.ValidationError):
            self._overheads = msgspec.convert(kept.get("overheads"), Overheads, strict=False)
        if isinstance(kept.get("dispatch_s"), float):
            self._dispatch_s, self._dispatch_measured = kept["dispatch_s"], True

    def _store(self) -> None:
        kept = read_json(self._name) or {}  # another process may have added to it
        known = kept.get("ops")
        merged: dict[str, Any] = {"ops": {**(known if isinstance(known, dict) else {}), **self._ops}}
        if self._dispatch_measured:
            merged["dispatch_s"] = self._dispatch_s
        if self._overheads is not None:
            merged["overheads"] = msgspec.to_builtins(self._overheads, str_keys=True)
        write_json(self._name, merged)


class _Here:
    """A place on machine 0, for measuring."""

    process, machine, gpu = 0, 0, None

    def __init__(self, cores: tuple[int, ...]) -> None:
        self.cores = cores


def _ops_of(modules: Iterable[fx.GraphModule]) -> Iterator[fx.Node]:
    for module in modules:
        yield from (node for node in module.graph.nodes if not is_free(node))


def _segment_key(key: str, num_threads: int, compiled: bool) -> tuple[object, ...]:
    return ("segment", key, num_threads, compiled)


def _update_key(sizes: tuple[int, ...], optimizer: str, num_threads: int) -> tuple[object, ...]:
    return ("update", sizes, optimizer, num_threads)


def _between(measured: Mapping[float, float], num_active: float, formula_s: Callable[[float], float]) -> float:
    """Seconds at `num_active` from what was measured at other numbers: linear between two of them; beyond them, and
    with a single one, in proportion to the formula; the formula itself where nothing was measured."""
    if not measured:
        return formula_s(num_active)
    low = max((active for active in measured if active <= num_active), default=None)
    high = min((active for active in measured if active >= num_active), default=None)
    if low is not None and high is not None:
        share = (num_active - low) / (high - low) if high > low else 0.0
        return measured[low] + share * (measured[high] - measured[low])
    nearest = low if high is None else high
    assert nearest is not None
    base_s = formula_s(nearest)
    return measured[nearest] * (formula_s(num_active) / base_s if base_s > 0 else 1.0)


def _flops(node: fx.Node) -> int:
    info = node.meta.get("op")
    return info.flops if isinstance(info, OpInfo) else 0


def _num_bytes(node: fx.Node) -> int:
    info = node.meta.get("op")
    return info.num_bytes if isinstance(info, OpInfo) else 0


def _is_contraction(node: fx.Node) -> bool:
    """Matrix products, convolutions, attention: at least 2 FLOPs for every byte moved are no matter of fusion."""
    return _flops(node) > 2 * max(_num_bytes(node), 1) or any(
        part in str(node.target) for part in ("mm", "convolution", "attention", "lstm", "gru")
    )
