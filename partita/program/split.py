"""From the captured graph to local graphs: draws hoisted, the batch split in time (microbatches), then the graph over
the tensor axis, then what each of its workers has over the data axis.

Each step splits the local graphs of the step before, exchanges included, by the same rules. The tensor axis comes
before the data axis so that a parameter may be cut along both, in the same dim too: every worker of the tensor axis
shares its part with those of its data axis (fully-sharded data parallelism of tensor-parallel weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import fx

from partita.errors import PlanError
from partita.graph.graph import Graph, InputKind, OutputKind
from partita.graph.randomness import is_random
from partita.program.draws import hoist_draws
from partita.program.instructions import Box, Draw
from partita.sharding.localize import FakeRunner
from partita.sharding.placement import Placement, Replicate, Shard
from partita.sharding.shard import ShardedGraph, shard
from partita.units import proportional, split_evenly

TIME, TENSOR, DATA = "time", "tensor", "data"
Seeds = Mapping[str, Mapping[str, int]]
"""Mesh axis -> placeholder -> the dim along which that axis cuts it."""


@dataclass(frozen=True)
class Local:
    """What the worker at `data` and `tensor` runs for microbatch `microbatch`, and which boxes of the whole tensors its
    placeholders are (those that are not named are whole)."""

    microbatch: int
    data: int
    tensor: int
    module: fx.GraphModule
    boxes: Mapping[str, Box]  # by placeholder name


@dataclass(frozen=True)
class Split:
    """The local graphs of every (microbatch, data coordinate, tensor coordinate).

    `output_placements` is along the data axis, `tensor_placements` along the tensor axis, both summed over
    microbatches.
    `prologues` (by data coordinate) compute the values named by `hoisted` once a step; empty if none.
    """

    draws: tuple[Draw, ...]
    locals: Mapping[tuple[int, int, int], Local]
    output_placements: tuple[Placement, ...]
    tensor_placements: tuple[Placement, ...]
    placements: Mapping[str, Mapping[str, Placement]]  # node of the captured graph -> axis -> placement
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
        runner=_runner_of(graph),
    )


def _draw_placeholders(module: fx.GraphModule) -> dict[str, str]:
    """Placeholder name -> draw name."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder" and "draw" in node.meta]
    return {node.name: node.meta["draw"] for node in nodes}


_RUNNERS: WeakKeyDictionary[fx.GraphModule, FakeRunner] = WeakKeyDictionary()


def _runner_of(graph: Graph) -> FakeRunner:
    """What is known of local calls, by all cuts of a graph."""
    if graph.module not in _RUNNERS:
        _RUNNERS[graph.module] = FakeRunner.of(graph.module)
    return _RUNNERS[graph.module]


_SPLITS: WeakKeyDictionary[fx.GraphModule, dict[object, Split]] = WeakKeyDictionary()


def forget_splits(graph: Graph) -> None:
    """Lets go of the cuts of a graph that plans were lowered by."""
    _SPLITS.pop(graph.module, None)
    _RUNNERS.pop(graph.module, None)


def split(
    graph: Graph,
    *,
    num_microbatches: int,
    shares: tuple[int, ...],
    num_tensor: int = 1,
    seeds: Seeds | None = None,
    rules: Mapping[str, Mapping[str, str]] | None = None,
    local_statistics: bool = False,
) -> Split:
    """Cuts the batch into microbatches, the graph over `num_tensor` workers, and each of those over the data axis with
    extents in proportion to `shares`.

    Args:
        seeds: which inputs are cut, besides the batch's rows over the data axis: parameters and leaves of the batch by
            the names of their placeholders.
        rules: op -> axis -> text of the rule by which it shall run; others run as is cheapest.

    Raises:
        PlanError: microbatches would change the result (says which op couples the samples), or a seed cannot be cut.
    """
    kept = _SPLITS.setdefault(graph.module, {})  # candidate plans of one graph share most splits
    seeds, rules = seeds or {}, rules or {}
    told = tuple(tuple(sorted((name, *sorted(by.items())) for name, by in group.items())) for group in (seeds, rules))
    key = (num_microbatches, shares, num_tensor, told, local_statistics)
    if key not in kept:
        kept[key] = _Splitting(graph, num_microbatches, shares, num_tensor, seeds, rules, local_statistics).run()
    return kept[key]


@dataclass(frozen=True)
class _Part:
    """The graph of one microbatch, before or after it was split over the tensor axis."""

    microbatch: int
    module: fx.GraphModule
    time: Mapping[str, Placement]
    tensor: int = 0
    cut: Mapping[str, Placement] = field(default_factory=dict)  # over the tensor axis


class _Splitting:
    def __init__(
        self,
        graph: Graph,
        num_microbatches: int,
        shares: tuple[int, ...],
        num_tensor: int,
        seeds: Seeds,
        rules: Mapping[str, Mapping[str, str]],
        local_statistics: bool,
    ) -> None:
        self.graph, self.num_microbatches, self.num_tensor = graph, num_microbatches, num_tensor
        self.shares = shares or (graph.batch_size,)
        self.seeds, self.local_statistics = seeds, local_statistics
        self.rules = {axis: {op: by[axis] for op, by in rules.items() if axis in by} for axis in (TENSOR, DATA)}
        self.leaves = _batch_leaves(graph)
        self.input_of = {item.node: item for item in graph.inputs}
        self.draws, self.rest = hoist_draws(graph)
        self.draw_of = _draw_placeholders(self.rest)
        self.outputs: dict[str, tuple[Placement, ...]] = dict.fromkeys(
            (TENSOR, DATA), (Replicate(),) * len(graph.outputs)
        )
        self.placements: dict[str, dict[str, Placement]] = {}

    def run(self) -> Split:
        time, hoisted, prologues = self._time()
        found: dict[tuple[int, int, int], Local] = {}
        kept: dict[int, ShardedGraph] = {}
        for part in self._tensor(time):
            for data, module, cut in self._data(part, kept):
                boxes = self._boxes(part, cut, data)
                found[part.microbatch, data, part.tensor] = Local(part.microbatch, data, part.tensor, module, boxes)
        return Split(
            self.draws, found, self.outputs[DATA], self.outputs[TENSOR], self.placements, hoisted, prologues,
            self.draw_of,
        )  # fmt: skip

    def _time(self) -> tuple[list[_Part], tuple[str, ...], tuple[Local, ...]]:
        count = self.num_microbatches
        if count == 1:
            return [_Part(0, self.rest, {name: Replicate() for name in self.draw_of})], (), ()
        time = _split_time(self.graph, self.rest, count, self.local_statistics)
        reason = _time_verdict(self.rest, time)
        if reason is not None:
            raise PlanError(
                f"num_microbatches={count} must give the same result as the whole batch, but {reason}; "
                "use num_microbatches=1, or local_statistics=True if that is what couples them"
            )
        prologues: tuple[Local, ...] = ()
        if time.prologue is not None:
            prologues = self._prologues(time.prologue)
        parts = [_Part(k, time.local(k, plain=True), dict(time.input_placements)) for k in range(count)]
        return parts, time.hoisted, prologues

    # The tensor axis -------------------------------------------------------------------------------------------------

    def _tensor(self, parts: list[_Part]) -> list[_Part]:
        if self.num_tensor == 1:
            return parts
        kept: dict[int, ShardedGraph] = {}
        found = []
        for part in parts:
            if id(part.module) not in kept:
                kept[id(part.module)] = self._shard_tensor(part.module)
            sharded = kept[id(part.module)]
            for coordinate in range(self.num_tensor):
                module = sharded.local(coordinate, plain=True)
                found.append(_Part(part.microbatch, module, part.time, coordinate, sharded.input_placements))
        return found

    def _shard_tensor(self, module: fx.GraphModule) -> ShardedGraph:
        seeds = self._cuts(module, TENSOR, self.num_tensor)
        sharded = shard(
            module,
            seeds,
            axis=TENSOR,
            size=self.num_tensor,
            must_replicate=self._not_gradients(),
            free_inputs=frozenset(self.draw_of),
            wanted=self._wanted(seeds),
            decisions=self.rules[TENSOR],
            local_statistics=False,
            runner=_runner_of(self.graph),
        )
        self._note(TENSOR, sharded)
        return sharded

    def _not_gradients(self) -> frozenset[int]:
        kinds = enumerate(output.kind for output in self.graph.outputs)
        return frozenset(index for index, kind in kinds if kind is not OutputKind.GRADIENT)

    def _cuts(self, module: fx.GraphModule, axis: str, size: int) -> dict[str, Placement]:
        """The placements of the inputs that the plan has cut along an axis."""
        values = {node.name: node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"}
        cuts: dict[str, Placement] = {}
        for name, dim in self.seeds.get(axis, {}).items():
            if name not in values:
                continue
            shape = tuple(values[name].shape)
            if not 0 <= dim < len(shape) or shape[dim] < size:
                raise PlanError(
                    f"an input that is cut over the {size} workers of axis {axis!r} must have that dim with at least "
                    f"as many entries, but {self.input_of[name].name!r} has shape {shape} and is to be cut along dim "
                    f'{dim}; place it as "R", or cut another dim'
                )
            cuts[name] = Shard(dim, split_evenly(shape[dim], size))
        return cuts

    def _wanted(self, seeds: Mapping[str, Placement]) -> dict[int, Shard]:
        """Gradients of parameters that come in cut go out cut alike."""
        node_of = {item.name: item.node for item in self.graph.inputs}
        wanted = {}
        for index, output in enumerate(self.graph.outputs):
            placement = seeds.get(node_of.get(output.target, ""))
            if output.kind is OutputKind.GRADIENT and isinstance(placement, Shard):
                wanted[index] = placement
        return wanted

    def _note(self, axis: str, sharded: ShardedGraph) -> None:
        self.outputs[axis] = sharded.output_placements
        for name, placement in sharded.placements.items():
            self.placements.setdefault(name, {}).setdefault(axis, placement)

    # The data axis ---------------------------------------------------------------------------------------------------

    def _data(
        self, part: _Part, kept: dict[int, ShardedGraph]
    ) -> list[tuple[int, fx.GraphModule, Mapping[str, Placement]]]:
        if len(self.shares) == 1:
            return [(0, part.module, {})]
        key = id(part.module)
        if key not in kept:
            # All workers of the tensor axis must cut their values alike, as they exchange parts of them.
            first = next(iter(kept.values())).decisions if kept and part.tensor else self.rules[DATA]
            kept[key] = self._shard_data(part, first)
        data = kept[key]
        return [(c, data.local(c, plain=True), data.input_placements) for c in range(len(self.shares))]

    def _shard_data(self, part: _Part, decisions: Mapping[str, str]) -> ShardedGraph:
        values = {node.name: node.meta["val"] for node in part.module.graph.nodes if node.op == "placeholder"}
        seeds: dict[str, Placement] = {
            name: Shard(0, self._sizes(values[name].shape[0])) for name in self.leaves if name in values
        }
        seeds |= self._cuts(part.module, DATA, len(self.shares))
        data = shard(
            part.module,
            seeds,
            axis=DATA,
            size=len(self.shares),
            free_inputs=frozenset(self.draw_of),
            local_statistics=self.local_statistics,
            wanted=self._wanted(seeds),
            decisions=decisions,
            gathered_inputs=frozenset(self.seeds.get(DATA, {})) & seeds.keys(),
            runner=_runner_of(self.graph),
        )
        self._note(DATA, data)
        return data

    def _sizes(self, rows: int) -> tuple[int, ...]:
        sizes = proportional(rows, self.shares)
        if min(sizes) < 1:
            raise PlanError(
                f"every data coordinate must have a row of each microbatch, but {rows} rows are to be cut into "
                f"{len(self.shares)}; use fewer microbatches or a smaller data axis"
            )
        return sizes

    def _prologues(self, prologue: fx.GraphModule) -> tuple[Local, ...]:
        part = _Part(0, prologue, {})
        if len(self.shares) <= 1:
            return (Local(0, 0, 0, prologue, {}),)
        names = {node.name for node in prologue.graph.nodes if node.op == "placeholder"}
        num_outputs = len(prologue.graph.output_node().args[0])  # type: ignore[arg-type]
        sizes = proportional(self.graph.batch_size, self.shares)
        data = shard(
            prologue,
            {name: Shard(0, sizes) for name in self.leaves if name in names},
            axis=DATA,
            size=len(self.shares),
            must_replicate=frozenset(range(num_outputs)),
            runner=_runner_of(self.graph),
        )
        return tuple(
            Local(0, c, 0, data.local(c, plain=True), self._boxes(part, data.input_placements, c))
            for c in range(len(self.shares))
        )

    # Boxes -----------------------------------------------------------------------------------------------------------

    def _boxes(self, part: _Part, data: Mapping[str, Placement], coordinate: int) -> dict[str, Box]:
        """Which part of each input a worker has: cut in time, then over the tensor axis, then over the data axis."""
        boxes: dict[str, Box] = {}
        for node in self.rest.graph.nodes:
            if node.op != "placeholder":
                continue
            shape = tuple(node.meta["val"].shape)
            box = Box.whole(shape)
            cuts = ((part.time, part.microbatch), (part.cut, part.tensor), (data, coordinate))
            for placements, place in cuts:
                placement = placements.get(node.name)
                if isinstance(placement, Shard):
                    box = box.cut(placement.dim, placement.offset(place), placement.sizes[place])
            if not box.is_whole(shape):
                boxes[node.name] = box
        return boxes
