"""Builds the parts of an `IntraProblem` from a captured graph; see `partita.planner.intra.from_graph`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from partita.graph.custom_ops import is_opaque
from partita.graph.graph import Graph, InputKind, OutputKind
from partita.planner.intra.exchanges import Exchanges, is_considered
from partita.planner.intra.problem import Choice, Conversion, Input, InputChoice, Op, Value, Window
from partita.planner.intra.reading import Item, Key, Listing, list_ops
from partita.planner.intra.repeats import Position, block_of, corresponding
from partita.planner.intra.storage import Storage, storages
from partita.planner.intra.useful import follows, useful_patterns
from partita.planner.intra.ways import (
    Allowed,
    MeshPlacement,
    Pattern,
    Way,
    Ways,
    plain_placements,
    seen_cuts,
    share_of,
)
from partita.sharding import calls
from partita.sharding.placement import Placement, Replicate, Shard
from partita.sharding.rules import PARTIAL, REPLICATE
from partita.sharding.ruleset import NO_SUMS


class StageCosts(Protocol):
    """What things take on this mesh, in seconds."""

    def op_time_s(self, op: calls.Op, local: calls.OpCall, share: float) -> float:
        """Time of the worker that runs ``local``, with ``share`` of the work of ``op``."""
        ...

    def conversion_time_s(self, source: Placement, target: Placement, num_bytes: int, axis: str) -> float:
        """Time of converting a value of ``num_bytes`` (whole along this axis) along ``axis``."""
        ...

    def update_time_s(self, num_elements: int) -> float:
        """Time of the optimizer on so many elements."""
        ...

    def load_time_s(self, num_bytes: int) -> float:
        """Time of bringing so much of a batch to a worker."""
        ...


@dataclass
class _Facts:
    """What is known of one value before its `Value` is made."""

    spec: calls.TensorSpec
    given: dict[MeshPlacement, None] = field(default_factory=dict)
    wanted: dict[MeshPlacement, None] = field(default_factory=dict)
    returned: bool = False
    alias_of: Key | None = None
    tie: Hashable = None
    opaque: bool = False


class Builder:
    """Builds the parts of the problem, in the order of its methods."""

    def __init__(
        self, graph: Graph, mesh: Mapping[str, int], costs: StageCosts, recompute: bool, num_microbatches: int,
        state_bytes_per_element: float, rows: bool,
    ) -> None:  # fmt: skip
        self.graph, self.costs, self.rows = graph, costs, rows
        axes = tuple(mesh)
        self.ways = Ways(tuple(mesh.values()), graph.batch_size)
        self.exchanges = Exchanges(
            lambda source, target, num_bytes, axis: costs.conversion_time_s(source, target, num_bytes, axes[axis])
        )
        self.listing: Listing = list_ops(graph, self.ways)
        self.facts: dict[Key, _Facts] = {}
        self.names: list[str] = []
        self.stored: list[tuple[Storage, ...]] = []
        self.blocks: list[str] = []
        self._store(num_microbatches, state_bytes_per_element)
        self._find_ways()
        self.positions = corresponding([item.op for item in self.listing.items if not item.again], graph.blocks)
        self.block_of_item: dict[Item, int] = {}
        self.reruns: set[Item] = set()
        if recompute:
            self._find_blocks()
        self.items: list[Item | None] = list(self.listing.items)
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.inputs: list[Input] = []
        self._index: dict[Key, int] = {}
        self._tables: dict[Hashable, dict[tuple[int, int], Conversion]] = {}
        self._tie_values()
        self._make_values()
        self._make_ops()
        self._make_inputs()

    # -- what there is ----------------------------------------------------------------------------------------------

    def _returned_values(self) -> dict[str, calls.Value]:
        """Parameter or buffer name -> the value that comes back to it."""
        pairs = zip(self.graph.outputs, self.listing.results, strict=True)
        return {output.target: value for output, value in pairs if output.target and value is not None}

    def _store(self, num_microbatches: int, state_bytes_per_element: float) -> None:
        returned = self._returned_values()
        gradients = {output.target for output in self.graph.outputs_of(OutputKind.GRADIENT)}
        for item in self.graph.inputs:
            value = self.listing.placeholders[item.node]
            back = returned.get(item.name) if item.kind in (InputKind.PARAMETER, InputKind.BUFFER) else None
            trained = item.kind is InputKind.PARAMETER and item.name in gradients and back is not None
            options = storages(
                value.spec, self.ways, self.exchanges, trained=trained,
                state_bytes_per_element=state_bytes_per_element, update_time_s=self.costs.update_time_s,
                num_microbatches=num_microbatches,
            )  # fmt: skip
            if item.kind is InputKind.BATCH:
                options = [option for option in options if self.rows or not _cuts_rows(option.stored)]
                load_s = [num_microbatches * self.costs.load_time_s(option.fixed_bytes) for option in options]
                options = [replace(option, update_s=time_s) for option, time_s in zip(options, load_s, strict=True)]
            if item.kind not in (InputKind.PARAMETER, InputKind.BATCH) or (back is not None and not trained):
                options = [_whole(options, back is not None)]
            self.names.append(item.node)
            self.stored.append(tuple(options))
            facts = self.facts[(value, False)] = _Facts(value.spec)
            facts.given = dict.fromkeys(option.stored for option in options)
        self._back = returned

    def _find_ways(self) -> None:
        num_axes = len(self.ways.sizes)
        useful = self._useful()
        self._ways: dict[Item, tuple[Way, ...]] = {}
        first: dict[calls.Op, tuple[Way, ...]] = {}
        nothing: Allowed = (frozenset(),) * num_axes
        for item in self.listing.items:
            seen = [seen_cuts(tuple(self.facts[key].given), num_axes) for key in item.inputs]
            limits = None
            if follows(item.op.call):
                limits = [useful[key] for key in item.inputs], [useful.get(key, nothing) for key in item.outputs]
            found = first[item.op] if item.again else _complete(self.ways.of(item.op.call, seen, limits), item)
            first[item.op] = self._ways[item] = found
            for slot, key in enumerate(item.outputs):
                if key is not None:
                    facts = self.facts[key] = _Facts(key[0].spec)
                    given = (way.outputs[slot] for way in found)
                    facts.given = dict.fromkeys(place for place in given if place is not None)
                    facts.alias_of = item.inputs[0] if item.is_view else None
                    facts.opaque = is_opaque(item.op.call.target, slot)
            for slot, read in enumerate(item.inputs):
                wanted = (way.inputs[slot] for way in found)
                self.facts[read].wanted.update(dict.fromkeys(place for place in wanted if place is not None))

    def _useful(self) -> dict[Key | None, Allowed]:
        """By value and axis: the patterns of cuts that some op with substance, or the batch, proposes."""
        batch = [self.listing.placeholders[item.node] for item in self.graph.inputs_of(InputKind.BATCH)]
        by_size: dict[int, dict[Key, frozenset[Pattern]]] = {}
        for size in set(self.ways.sizes):
            proposed = {
                (value, False): [
                    part for place in plain_placements(value.spec, (size,), self.ways) for part in place
                    if self.rows and _cuts_rows((part,))
                ]
                for value in batch
            }  # fmt: skip
            by_size[size] = useful_patterns(self.listing.items, self.ways, size, proposed)
        keys = {*self.facts, *(key for item in self.listing.items for key in item.outputs if key is not None)}
        return {key: tuple(by_size[size].get(key, frozenset()) for size in self.ways.sizes) for key in keys}

    # -- repeated blocks --------------------------------------------------------------------------------------------

    def _find_blocks(self) -> None:
        """Blocks that can be recomputed, and which of their ops that takes."""
        paths: dict[str, int] = {}
        readers: dict[Key, list[Item]] = {}
        for item in self.listing.items:
            for key in item.inputs:
                readers.setdefault(key, []).append(item)
            path = block_of(item.op.info.module, self.graph.blocks) if item.op.info is not None else None
            if item.window is Window.FORWARD and path is not None:
                self.block_of_item[item] = paths.setdefault(path, len(paths))
        self.blocks = list(paths)
        returned = {value for value in self.listing.results if value is not None}
        wanted: set[Key] = set()
        for item in reversed(self.listing.items):
            block = self.block_of_item.get(item)
            if block is None or item.op.call.is_random:
                continue
            for given in item.outputs:
                if given is None or given[0] in returned:
                    continue
                users = readers.get(given, [])
                forward = [user for user in users if user.window is Window.FORWARD]
                inner = all(self.block_of_item.get(user) == block for user in forward)
                again = given in wanted or len(forward) < len(users)
                if inner and again:
                    self.reruns.add(item)
                    wanted.update(item.inputs)

    def _tie(self, item: Item) -> Hashable:
        """Ops with equal ties correspond and have equal choices; a view made again follows the first."""
        position: Position | None = self.positions.get(item.op)
        base: Hashable = ("view", item.op.name) if position is None else position
        if position is None and not item.is_view:
            return None
        return base, tuple((way.rules, way.inputs, way.outputs) for way in self._ways[item])

    # -- values -----------------------------------------------------------------------------------------------------

    def _tie_values(self) -> None:
        for item in self.listing.items:
            tie = self._tie(item)
            for slot, key in enumerate(item.outputs):
                if key is not None and tie is not None and item.window is Window.FORWARD:
                    self.facts[key].tie = (tie, slot)
        for name, value in self._back.items():
            if any(item.name == name for item in self.graph.inputs):
                self.facts[(value, False)].returned = True

    def _make_values(self) -> None:
        for index, options in enumerate(self.stored):
            value = self._back.get(self.graph.inputs[index].name)
            for option in options:
                if option.returned is not None and value is not None:
                    self.facts[(value, False)].wanted[option.returned] = None
        loss = next(value for value in self.listing.results if value is not None)
        self._loss = (loss, False)
        for target in self._loss_targets():
            self.facts[self._loss].wanted[target] = None
        placeholders = set(self.listing.placeholders.values())
        self._index = {key: index for index, key in enumerate(self.facts)}
        for key, facts in self.facts.items():
            placements = tuple(sorted({**facts.given, **facts.wanted}, key=_order))
            size = facts.spec.num_bytes
            weight = key[0] in placeholders
            self.values.append(
                Value(
                    name=key[0].name + ("@backward" if key[1] else ""),
                    placements=placements,
                    num_bytes=tuple(round(size * share_of(place)) for place in placements),
                    conversions={} if facts.opaque else self._conversions(facts.spec, placements),
                    overlappable=weight or facts.returned,
                    alias_of=None if facts.alias_of is None else self._index[facts.alias_of],
                    tie=None if facts.tie is None else (facts.tie, placements),
                )
            )

    def _conversions(
        self, spec: calls.TensorSpec, placements: tuple[MeshPlacement, ...]
    ) -> dict[tuple[int, int], Conversion]:
        sums = spec.dtype not in NO_SUMS
        key = (spec.num_bytes, sums, placements)
        if key not in self._tables:
            self._tables[key] = {
                (i, j): self.exchanges.price(spec.num_bytes, source, target)
                for i, source in enumerate(placements)
                for j, target in enumerate(placements)
                if i != j and (sums or PARTIAL not in target) and is_considered(source, target)
            }
        return self._tables[key]

    def _place(self, key: Key, placement: MeshPlacement) -> int:
        return self.values[self._index[key]].placements.index(placement)

    def _place_back(self, key: Key | None, option: Storage) -> int | None:
        return None if key is None or option.returned is None else self._place(key, option.returned)

    # -- ops and inputs ---------------------------------------------------------------------------------------------

    def _make_ops(self) -> None:
        self.ways_of_ops: list[tuple[Way, ...]] = []
        forward = [item for item in self.listing.items if item.window is Window.FORWARD]
        backward = [item for item in self.listing.items if item.window is Window.BACKWARD]
        for item in forward:
            self._make_op(item)
        self.ops.append(self._sink())
        self.ways_of_ops.append(())
        for item in backward:
            self._make_op(item)
        self.items = [*forward, None, *backward]

    def _make_op(self, item: Item) -> None:
        slots = [slot for slot, key in enumerate(item.outputs) if key is not None]
        keys = [item.outputs[slot] for slot in slots]
        choices = []
        for way in self._ways[item]:
            wanted = tuple(
                None if place is None else self._place(key, place)
                for key, place in zip(item.inputs, way.inputs, strict=True)
            )
            pairs = ((item.outputs[slot], way.outputs[slot]) for slot in slots)
            given = tuple(self._place(key, place) for key, place in pairs if key is not None and place is not None)
            time_s = 0.0 if item.is_view else self.costs.op_time_s(item.op, way.local, way.share)
            choices.append(Choice(way.rules, time_s, wanted, given))
        self.ways_of_ops.append(self._ways[item])
        self.ops.append(
            Op(
                name=item.op.name + ("@backward" if item.again else ""),
                window=item.window,
                inputs=tuple(self._index[key] for key in item.inputs),
                outputs=tuple(self._index[key] for key in keys if key is not None),
                choices=tuple(choices),
                block=self.block_of_item.get(item),
                reruns=item in self.reruns,
                tie=self._tie(item),
            )
        )

    def _loss_targets(self) -> list[MeshPlacement]:
        """The loss is given whole or as summands, along each axis."""
        found: list[MeshPlacement] = [()]
        for _ in self.ways.sizes:
            found = [(*place, part) for place in found for part in (REPLICATE, PARTIAL)]
        return found

    def _sink(self) -> Op:
        targets = self._loss_targets()
        choices = tuple(Choice(str(place), 0.0, (self._place(self._loss, place),), ()) for place in targets)
        return Op("loss", Window.FORWARD, (self._index[self._loss],), (), choices)

    def _make_inputs(self) -> None:
        for item, name, options in zip(self.graph.inputs, self.names, self.stored, strict=True):
            key = (self.listing.placeholders[name], False)
            back = self._back.get(item.name) if options[0].returned is not None else None
            back_key = None if back is None else (back, False)
            choices = tuple(
                InputChoice(
                    label=(option.stored, option.updated, option.returned),
                    placement=self._place(key, option.stored),
                    returned=self._place_back(back_key, option),
                    fixed_bytes=option.fixed_bytes,
                    returned_bytes=option.returned_bytes,
                    update_s=option.update_s,
                    gather_s=option.gather_s,
                    reduce_s=option.reduce_s,
                )
                for option in options
            )
            returned = None if back_key is None else self._index[back_key]
            path = block_of(item.name, self.graph.blocks) if item.kind is InputKind.PARAMETER else None
            tie: Hashable = None
            if path is not None:
                group = next(i for i, paths in enumerate(self.graph.blocks) if path in paths)
                tie = (group, item.name[len(path) :], tuple(choice.label for choice in choices))
            self.inputs.append(Input(item.name, self._index[key], choices, returned, tie))


def _complete(ways: tuple[Way, ...], item: Item) -> tuple[Way, ...]:
    """The ways that give every value that the op gives."""
    return tuple(
        way for way in ways if all(k is None or p is not None for k, p in zip(item.outputs, way.outputs, strict=True))
    )


def _cuts_rows(placement: MeshPlacement) -> bool:
    return any(isinstance(part, Shard) and part.dim == 0 for part in placement)


def _whole(options: Sequence[Storage], returns: bool) -> Storage:
    """Of the ways of storing an input, the one that leaves it whole."""
    option = next(o for o in options if all(isinstance(part, Replicate) for part in o.stored))
    if not returns:
        return option
    return Storage(option.stored, option.stored, option.stored, option.fixed_bytes, 0, 0.0, 0.0, 0.0)


def _order(placement: MeshPlacement) -> str:
    return str(placement)
