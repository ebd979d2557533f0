"""From the captured graph to local graphs: draws hoisted, the batch split in time (microbatches), then over the data
axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import fx

from partita.errors import PlanError
from partita.graph.graph import Graph, InputKind
from partita.graph.simplify import is_random
from partita.program.draws import hoist_draws
from partita.program.instructions import Draw
from partita.sharding.placement import Placement, Replicate, Shard
from partita.sharding.shard import ShardedGraph, shard
from partita.units import split_evenly

TIME, DATA = "time", "data"


@dataclass(frozen=True)
class Piece:
    """Entries ``start:start+length`` of dim `dim` of a batch leaf or draw; `dim` -1: the whole."""

    dim: int = -1
    start: int = 0
    length: int = 0


@dataclass(frozen=True)
class Local:
    """What data coordinate `data` runs for microbatch `microbatch`, and which pieces of leaves and draws it reads."""

    microbatch: int
    data: int
    module: fx.GraphModule
    pieces: Mapping[str, Piece]  # by placeholder name


@dataclass(frozen=True)
class Split:
    """The local graphs of every (microbatch, data coordinate); `output_placements` is along the data axis, summed over
    microbatches. `prologues` (by data coordinate) compute the values named by `hoisted` once a step; empty if none."""

    draws: tuple[Draw, ...]
    locals: Mapping[tuple[int, int], Local]
    output_placements: tuple[Placement, ...]
    placements: Mapping[str, Placement]
    hoisted: tuple[str, ...]
    prologues: tuple[Local, ...]
    draw_of: Mapping[str, str]  # placeholder name -> name of the draw that it stands for


def microbatch_verdict(graph: Graph, num_microbatches: int, *, local_statistics: bool = False) -> str | None:
    """None if `num_microbatches` gives the same result as the whole batch, else the reason why it would not.

    Example:
        >>> microbatch_verdict(graph_of_a_model_with_batch_norm, 4)
        'samples are coupled by native_batch_norm at net.py:12 (all_reduce), so the batch cannot be cut in time'
    """
    if num_microbatches == 1:
        return None
    if graph.batch_size == 0:
        return "no tensor of the batch has dims, so there is nothing to cut in time"
    if num_microbatches > graph.batch_size:
        return (
            f"num_microbatches <= rows of the batch must hold, but got {num_microbatches} for {graph.batch_size} rows"
        )
    _, rest = hoist_draws(graph)
    return _time_verdict(rest, _split_time(graph, rest, num_microbatches, local_statistics))


def _time_verdict(module: fx.GraphModule, time: ShardedGraph) -> str | None:
    for node in module.graph.nodes:
        if is_random(node):
            return (
                f"{node.name} draws random numbers that depend on data or come after such a draw, so the batch "
                "cannot be cut in time with the same draws"
            )
    if time.exchanges:
        first = time.exchanges[0]
        where = f" at {first.source}" if first.source else ""
        return f"samples are coupled by {first.node}{where} ({first.kind}), so the batch cannot be cut in time"
    return None


def _batch_leaves(graph: Graph) -> list[str]:
    return [
        item.node
        for item in graph.inputs_of(InputKind.BATCH)
        if item.shape and graph.batch_size and item.shape[0] == graph.batch_size
    ]


def _split_time(graph: Graph, module: fx.GraphModule, num_microbatches: int, local_statistics: bool) -> ShardedGraph:
    sizes = split_evenly(graph.batch_size, num_microbatches)
    return shard(
        module,
        {name: Shard(0, sizes) for name in _batch_leaves(graph)},
        axis=TIME,
        size=num_microbatches,
        must_be_partial=frozenset(range(len(graph.outputs))),
        free_inputs=frozenset(_draw_placeholders(module)),
        hoist=True,
        local_statistics=local_statistics,
    )


def _draw_placeholders(module: fx.GraphModule) -> dict[str, str]:
    """Placeholder name -> draw name."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder" and "draw" in node.meta]
    return {node.name: node.meta["draw"] for node in nodes}


_SPLITS: WeakKeyDictionary[fx.GraphModule, dict[object, Split]] = WeakKeyDictionary()


def split(graph: Graph, *, num_microbatches: int, shares: tuple[int, ...], local_statistics: bool = False) -> Split:
    """Cuts the batch into microbatches and each of them over the data axis with extents in proportion to `shares`.

    Raises:
        PlanError: microbatches would change the result; says which op couples the samples.
    """
    kept = _SPLITS.setdefault(graph.module, {})  # candidate plans of one graph share most splits
    key = (num_microbatches, shares, local_statistics)
    if key not in kept:
        kept[key] = _split(graph, num_microbatches, shares, local_statistics)
    return kept[key]


def _split(graph: Graph, num_microbatches: int, shares: tuple[int, ...], local_statistics: bool) -> Split:
    draws, rest = hoist_draws(graph)
    leaves = _batch_leaves(graph)
    draw_of = _draw_placeholders(rest)
    hoisted: tuple[str, ...] = ()
    prologues: tuple[Local, ...] = ()
    if num_microbatches == 1:
        whole: dict[str, Placement] = {name: Replicate() for name in draw_of}
        parts = [(rest, whole, 0)]
    else:
        time = _split_time(graph, rest, num_microbatches, local_statistics)
        reason = _time_verdict(rest, time)
        if reason is not None:
            raise PlanError(
                f"num_microbatches={num_microbatches} must give the same result as the whole batch, but {reason}; "
                "use num_microbatches=1, or local_statistics=True if that is what couples them"
            )
        hoisted = time.hoisted
        if time.prologue is not None:
            prologues = _split_prologue(time.prologue, leaves, shares, graph.batch_size)
        parts = [(time.local(k), dict(time.input_placements), k) for k in range(num_microbatches)]
    data = _DataAxis(graph, leaves, shares or (graph.batch_size,), frozenset(draw_of), local_statistics)
    found, outputs, placements = data.split(parts)
    return Split(draws, found, outputs, placements, hoisted, prologues, draw_of)


def proportional(total: int, shares: tuple[int, ...]) -> tuple[int, ...]:
    """Whole numbers that add up to `total`, as near as possible in proportion to `shares`, each at least 1 if it can
    be."""
    weight = sum(shares)
    exact = [total * share / weight for share in shares]
    sizes = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (sizes[i] - exact[i], i))
    for index in order[: total - sum(sizes)]:
        sizes[index] += 1
    for index, size in enumerate(sizes):
        if size == 0 and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[index] = 1
    return tuple(sizes)


@dataclass(frozen=True)
class _DataAxis:
    graph: Graph
    leaves: list[str]
    shares: tuple[int, ...]
    draws: frozenset[str]  # placeholders that stand for draws
    local_statistics: bool

    def split(
        self, parts: list[tuple[fx.GraphModule, dict[str, Placement], int]]
    ) -> tuple[dict[tuple[int, int], Local], tuple[Placement, ...], Mapping[str, Placement]]:
        found: dict[tuple[int, int], Local] = {}
        outputs: tuple[Placement, ...] = (Replicate(),) * len(self.graph.outputs)
        placements: Mapping[str, Placement] = {}
        cache: dict[int, ShardedGraph] = {}
        for module, time, k in parts:
            names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
            if len(self.shares) == 1:
                found[k, 0] = Local(k, 0, module, _pieces(names, time, {}, k, 0))
                continue
            if id(module) not in cache:
                cache[id(module)] = self._shard(module, time)
            data = cache[id(module)]
            outputs, placements = data.output_placements, data.placements
            for coordinate in range(len(self.shares)):
                pieces = _pieces(names, time, data.input_placements, k, coordinate)
                found[k, coordinate] = Local(k, coordinate, data.local(coordinate), pieces)
        return found, outputs, placements

    def _shard(self, module: fx.GraphModule, time: Mapping[str, Placement]) -> ShardedGraph:
        sizes = self._sizes(module)
        free = self.draws
        while True:
            data = shard(
                module,
                {name: Shard(0, sizes) for name in self.leaves},
                axis=DATA,
                size=len(self.shares),
                free_inputs=free,
                local_statistics=self.local_statistics,
            )
            # A draw that is cut along two different dims comes cut in time only; the local graph cuts the rest.
            twice = {name for name in free if _dims_differ(time.get(name), data.input_placements[name])}
            if not twice:
                return data
            free -= twice

    def _sizes(self, module: fx.GraphModule) -> tuple[int, ...]:
        if not self.leaves:
            return ()
        rows = next(node.meta["val"].shape[0] for node in module.graph.nodes if node.name in self.leaves)
        sizes = proportional(rows, self.shares)
        if min(sizes) < 1:
            raise PlanError(
                f"every data coordinate must have a row of each microbatch, but {rows} rows are to be cut into "
                f"{len(self.shares)}; use fewer microbatches or a smaller data axis"
            )
        return sizes


def _dims_differ(time: Placement | None, data: Placement) -> bool:
    return isinstance(time, Shard) and isinstance(data, Shard) and time.dim != data.dim


def _pieces(
    names: list[str],
    time: Mapping[str, Placement],
    data: Mapping[str, Placement],
    k: int,
    coordinate: int,
) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    for name in names:
        first, second = time.get(name), data.get(name)
        piece = Piece()
        if isinstance(first, Shard):
            piece = Piece(first.dim, first.offset(k), first.sizes[k])
        if isinstance(second, Shard):
            start = piece.start + second.offset(coordinate)
            piece = Piece(second.dim, start, second.sizes[coordinate])
        pieces[name] = piece
    return pieces


def _split_prologue(
    prologue: fx.GraphModule, leaves: list[str], shares: tuple[int, ...], batch_size: int
) -> tuple[Local, ...]:
    names = [node.name for node in prologue.graph.nodes if node.op == "placeholder"]
    num_outputs = len(prologue.graph.output_node().args[0])  # type: ignore[arg-type]
    if len(shares) <= 1:
        return (Local(0, 0, prologue, {name: Piece() for name in names}),)
    sizes = proportional(batch_size, shares)
    data = shard(
        prologue,
        {name: Shard(0, sizes) for name in leaves if name in names},
        axis=DATA,
        size=len(shares),
        must_replicate=frozenset(range(num_outputs)),
    )
    return tuple(
        Local(0, c, data.local(c), _pieces(names, {}, data.input_placements, 0, c)) for c in range(len(shares))
    )
