"""`CostTable`: measured op and segment times of this machine, kept on disk; a roofline where nothing was measured.

Contention: `num_active` workers share the memory, so an op that moves n bytes takes at least ``num_active * n /
bandwidth``; and
not-compiled ops hold the interpreter for `dispatch_s` each, so `num_active` workers together need at least
``num_active * dispatch_s``
for one op each. A compiled segment that was not measured is taken as its ops without dispatch, where ops other than
contractions cost `FUSED_SHARE` (fusion saves the writing and reading of what lies between them).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from partita.cache import read_json, write_json
from partita.cluster.model import Cluster
from partita.cost.collectives import collective_time_s, link_between
from partita.cost.measure_ops import index_bound, make_tensor, measure_concurrent, measure_dispatch_s, measure_nodes
from partita.cost.memory import update_traffic_bytes
from partita.cost.model import CollectiveKind, Place
from partita.cost.roofline import Rates, rates_of, roofline_s
from partita.graph.graph import OpInfo
from partita.sharding.communication import COMMUNICATION_OPS
from partita.units import fingerprint

FUSED_SHARE = 0.4
WAIT_S = 20e-6  # waking a waiting thread of this process
DISPATCH_S = 4e-6  # of a CPU op, where not measured
GPU_LAUNCH_S = 6e-6
UNCERTAINTY_MEASURED = 0.15
UNCERTAINTY_ROOFLINE = 0.5
MEASURE_LIMIT_BYTES = 2**30  # ops that touch more are left to the roofline: measuring them could exhaust the memory

MeasureNodes = Callable[..., list[float | None]]


def op_key(node: fx.Node, num_threads: int) -> str:
    """What the time of an op depends on: the op, its inputs' shapes, strides and dtypes, other arguments, and
    threads."""

    def text(leaf: Any) -> str:
        if not isinstance(leaf, fx.Node):
            return repr(leaf)
        value = leaf.meta.get("val")
        tensors = pytree.tree_leaves(value)
        return ";".join(
            f"{t.dtype}{tuple(t.shape)}{t.stride()}" if isinstance(t, torch.Tensor) else repr(t) for t in tensors
        )

    leaves: list[str] = []
    structure = fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: leaves.append(text(leaf)))
    return f"{node.target}|{fingerprint([structure, *leaves])}|{num_threads}"


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

    def __init__(self, cluster: Cluster, *, optimizer_efficiency: float = 0.5, read_cache: bool = True) -> None:
        self._cluster = cluster
        self._efficiency = optimizer_efficiency
        hardware = [(m.cpu, len(m.cores), m.cache_bytes, tuple(g.name for g in m.gpus)) for m in cluster.machines]
        self._name = f"cost/{fingerprint([*hardware, torch.__version__])}.json"
        self._ops: dict[str, float] = {}
        self._segments: dict[str, float] = {}
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

    @property
    def uncertainty(self) -> float:
        return UNCERTAINTY_MEASURED if self._ops else UNCERTAINTY_ROOFLINE

    def op_time_s(self, node: fx.Node, place: Place, *, num_active: int = 1) -> float:
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
        self, module: fx.GraphModule, key: str, place: Place, *, compiled: bool, num_active: int = 1
    ) -> float:
        measured = self._segments.get(_segment_key(key, len(place.cores), compiled, num_active))
        if measured is not None:
            return measured
        total = 0.0
        for node in module.graph.nodes:
            if is_free(node):
                continue
            time_s = self.op_time_s(node, place, num_active=num_active)
            if compiled:
                floor = GPU_LAUNCH_S if place.gpu is not None else self._dispatch_s * max(num_active, 1)
                time_s = max(time_s - floor, 0.0) * (1.0 if _is_contraction(node) else FUSED_SHARE)
            total += time_s
        return total + (self._dispatch_s if compiled else 0.0)

    def update_time_s(self, num_elements: int, optimizer: str, place: Place, *, num_active: int = 1) -> float:
        if not num_elements:
            return 0.0
        num_bytes = num_elements * update_traffic_bytes(optimizer) / self._efficiency
        return roofline_s(self._rates(place), 0, num_bytes, num_active=num_active)

    def transfer_time_s(self, num_bytes: int, source: Place, target: Place) -> float:
        link = link_between(self._cluster, source, target)
        return WAIT_S if link is None else WAIT_S + link.latency_s + num_bytes / link.bytes_per_s

    def collective_time_s(self, kind: CollectiveKind, num_bytes: int, group: tuple[Place, ...]) -> float:
        return collective_time_s(self._cluster, kind, num_bytes, group, wait_s=WAIT_S)

    def instruction_time_s(self) -> float:
        return self._dispatch_s

    def step_time_s(self) -> float:
        return 2 * WAIT_S

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
        """Measure what `missing` names on `cores`, the ops that move most first, for about `budget_s` seconds, and
        keep the results.
        Returns the number of ops measured. Does nothing for a cluster that is only described."""
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
        self._ops.update(known)
        if known:
            self._store()
        return len(known)

    def measure_segments(
        self,
        modules: Mapping[str, fx.GraphModule],
        cores: Sequence[tuple[int, ...]],
        *,
        compiled: bool,
        budget_s: float,
        compiler: Callable[[fx.GraphModule, list[torch.Tensor]], Callable[..., object]] | None = None,
    ) -> int:
        """Run each module on ``len(cores)`` pinned threads at once and keep its time under its key. `compiler` turns
        a module and example
        inputs into a callable; it is required if `compiled`. The values kept replace the sum of ops. Returns the
        number measured."""
        if compiled and compiler is None:
            raise ValueError("measure_segments(compiled=True) needs a compiler.")
        if not self._cluster.is_here or not modules:
            return 0
        share_s = budget_s / len(modules)
        for key, module in modules.items():
            placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
            inputs = [make_tensor(node.meta["val"], _placeholder_bound(node)) for node in placeholders]
            run = compiler(module, inputs) if compiled and compiler is not None else module
            calls = [lambda run=run, inputs=inputs: run(*inputs) for _ in cores]
            seconds = measure_concurrent(calls, cores, budget_s=share_s)
            self._segments[_segment_key(key, len(cores[0]), compiled, len(cores))] = seconds
        self._store()
        return len(modules)

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
        for field, target in (("ops", self._ops), ("segments", self._segments)):
            values = kept.get(field)
            if isinstance(values, dict):
                target.update({k: float(v) for k, v in values.items() if isinstance(v, int | float) and v >= 0})
        if isinstance(kept.get("dispatch_s"), float):
            self._dispatch_s, self._dispatch_measured = kept["dispatch_s"], True

    def _store(self) -> None:
        kept = read_json(self._name) or {}  # another process may have added to it
        merged: dict[str, Any] = {"ops": self._ops, "segments": self._segments}
        for field in merged:
            if isinstance(kept.get(field), dict):
                merged[field] = {**kept[field], **merged[field]}
        if self._dispatch_measured:
            merged["dispatch_s"] = self._dispatch_s
        write_json(self._name, merged)


class _Here:
    """A place on machine 0, for measuring."""

    process, machine, gpu = 0, 0, None

    def __init__(self, cores: tuple[int, ...]) -> None:
        self.cores = cores


def _ops_of(modules: Iterable[fx.GraphModule]) -> Iterator[fx.Node]:
    for module in modules:
        yield from (node for node in module.graph.nodes if not is_free(node))


def _segment_key(key: str, num_threads: int, compiled: bool, num_active: int) -> str:
    return f"{key}|{num_threads}|{'compiled' if compiled else 'ops'}|{num_active}"


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


def _placeholder_bound(node: fx.Node) -> int:
    """The bound of valid indices for an integer input: the smallest among the ops that read it."""
    return min((index_bound(user) for user in node.users), default=1)
