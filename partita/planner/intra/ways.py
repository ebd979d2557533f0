"""Ways of running an op on a mesh of several axes: a sharding rule per axis, one after the other.

The rule of the first axis makes of the call a local call (that of the worker with the largest piece); the rule of the
second axis is one of *that* call's rules, and so on. So whatever the first axis leaves can be cut further, the same dim
again included, and arguments that depend on local shapes are right. A placement on the mesh is a tuple of placements,
one per axis; each describes the piece that the axes before it leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from partita.sharding.calls import OpCall, TensorSpec
from partita.sharding.placement import Placement, Replicate, Shard
from partita.sharding.rules import (
    PARTIAL,
    REPLICATE,
    Blocks,
    Cut,
    InputSpec,
    OutputSpec,
    Rule,
    replicate_rule,
    rule_source,
)
from partita.sharding.ruleset import plain_rules_of
from partita.units import split_evenly

MeshPlacement = tuple[Placement, ...]
Seen = tuple[frozenset[Shard], ...]
"""Per axis: cuts in which a value can be; where they are not the usual ones, rules take their blocks from them."""
Pattern = tuple[int, bool] | None
"""What a cut is known by: its dim, and whether it is in runs; None: a sum."""
Allowed = tuple[frozenset[Pattern], ...]
"""Per axis: the patterns in which a value is looked at."""


@dataclass(frozen=True)
class Way:
    """One way of running a call on the mesh.

    Attributes:
        rules: text per axis, as `Rule.text` gives it (of the call that the axes before leave).
        inputs: per tensor input its placement; None: its values do not matter.
        outputs: per output its placement; None where the call gives no tensor.
        local: the call of the worker with the largest piece.
        share: that worker's share of the work.
    """

    rules: tuple[str, ...]
    inputs: tuple[MeshPlacement | None, ...]
    outputs: tuple[MeshPlacement | None, ...]
    local: OpCall
    share: float


@dataclass(frozen=True)
class _Raw:
    """A way in the making: placements of the axes so far, None where one does not read."""

    rules: tuple[str, ...]
    inputs: tuple[tuple[Placement | None, ...], ...]
    outputs: tuple[tuple[Placement | None, ...], ...]
    local: OpCall
    share: float


class Ways:
    """Finds the ways of calls on a mesh; equal calls are looked at once.

    Args:
        sizes: workers per axis.
        batch_size: extent of the batch; what has a multiple of it is cut in the batch's proportions.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int = 0) -> None:
        self.sizes = tuple(sizes)
        self.batch_size = batch_size
        self._rules: dict[Any, list[Rule]] = {}
        self._found: dict[Any, tuple[Way, ...]] = {}

    def of(
        self, call: OpCall, seen: Sequence[Seen], allowed: tuple[Sequence[Allowed], Sequence[Allowed]] | None = None
    ) -> tuple[Way, ...]:
        """All ways of `call`, whose inputs can be in the cuts `seen`; of equal placements the least work.

        Args:
            allowed: per input and per output the patterns that are looked at; None: all.
        """
        limits = None if allowed is None else (tuple(allowed[0]), tuple(allowed[1]))
        key = (call.key, tuple(seen), limits)
        if key not in self._found:
            best: dict[Any, Way] = {}
            for raw in self._expand(call, seen, 0, limits):
                way = Way(
                    raw.rules,
                    tuple(_settled(parts) for parts in raw.inputs),
                    tuple(
                        _settled(parts, absent=spec is None or None in parts)
                        for spec, parts in zip(call.outputs, raw.outputs, strict=True)
                    ),
                    raw.local,
                    raw.share,
                )
                place = (way.inputs, way.outputs)
                if place not in best or way.share < best[place].share:
                    best[place] = way
            self._found[key] = tuple(best.values())
        return self._found[key]

    def has_rules(self, call: OpCall) -> bool:
        """Whether the call can be run in parts at all."""
        return any(rule.extent > 0 for rule in self.rules(call))

    def rules(self, call: OpCall) -> list[Rule]:
        """The call's rules; running it whole comes last. Random ops draw whole, on every worker alike."""
        if call.key not in self._rules:
            self._rules[call.key] = [*([] if call.is_random else plain_rules_of(call)), replicate_rule(call)]
        return self._rules[call.key]

    def split(self, extent: int, size: int) -> tuple[int, ...]:
        """``extent`` blocks over an axis of ``size`` workers."""
        if self.is_batch(extent, size):
            return tuple(share * (extent // self.batch_size) for share in split_evenly(self.batch_size, size))
        return split_evenly(extent, size)

    def _expand(
        self, call: OpCall, seen: Sequence[Seen], axis: int, limits: tuple[tuple[Allowed, ...], ...] | None
    ) -> Iterator[_Raw]:
        if axis == len(self.sizes):
            yield _Raw((), ((),) * len(call.inputs), ((),) * len(call.outputs), call, 1.0)
            return
        for rule in self.rules(call):
            if self._is_pointless(call, rule):
                continue
            for blocks in self._blocks(rule, [item[axis] for item in seen], self.sizes[axis]):
                inputs, outputs = rule.input_placements(blocks), rule.output_placements(blocks)
                if limits is not None and not _within(inputs + outputs, limits[0] + limits[1], axis):
                    continue
                local = localise(call, rule, blocks)
                share = max(blocks.counts) / sum(blocks.counts) if rule.extent else 1.0
                for rest in self._expand(local, seen, axis + 1, limits):
                    yield _Raw(
                        (rule.text(), *rest.rules),
                        tuple((one, *more) for one, more in zip(inputs, rest.inputs, strict=True)),
                        tuple((one, *more) for one, more in zip(outputs, rest.outputs, strict=True)),
                        rest.local,
                        share * rest.share,
                    )

    def usual_blocks(self, rule: Rule, size: int) -> list[Blocks]:
        """Equal pieces; of what is a multiple of the batch, the batch's pieces, equal or not. Nothing else is cut."""
        extent = rule.extent
        fits = extent > 0 and (extent % size == 0 or self.is_batch(extent, size))
        return [Blocks(self.split(extent, size))] if fits else []

    def is_batch(self, extent: int, size: int) -> bool:
        return self.batch_size >= size and extent % self.batch_size == 0

    def _is_pointless(self, call: OpCall, rule: Rule) -> bool:
        """Whether the rule runs a contraction whole on summands although its result is no smaller than these are."""
        if rule.extent or PARTIAL not in rule.inputs or rule_source(call) != "rules_tables":
            return False
        summed = max(spec.num_bytes for spec, part in zip(call.inputs, rule.inputs, strict=True) if part == PARTIAL)
        return sum(spec.num_bytes for spec in call.outputs if spec is not None) >= summed

    def _blocks(self, rule: Rule, seen: Sequence[frozenset[Shard]], size: int) -> list[Blocks]:
        """Where to cut: as the inputs can be cut, else in the usual way."""
        if rule.extent == 0:
            return [Blocks()]
        found: dict[Blocks, None] = {}
        cuts = [(spec, cuts) for spec, cuts in zip(rule.inputs, seen, strict=True) if isinstance(spec, Cut)]
        if all(spec.outer == 1 for spec, _ in cuts):
            found.update(dict.fromkeys(self.usual_blocks(rule, size)))
        for spec, placements in cuts:
            for placement in placements:
                blocks = blocks_of(placement, spec, rule)
                if blocks is not None and len(blocks.counts) == size and sum(blocks.counts) == rule.extent:
                    found[blocks] = None
        return list(found)


def _settled(parts: tuple[Placement | None, ...], *, absent: bool = False) -> MeshPlacement | None:
    """A placement of what some axes do not read: None if none does, else whole along those."""
    if absent or all(part is None for part in parts):
        return None
    return tuple(REPLICATE if part is None else part for part in parts)


def pattern(placement: Placement) -> Pattern:
    """What a cut, or a sum, is known by."""
    return (placement.dim, placement.outer > 1) if isinstance(placement, Shard) else None


def _within(placements: Sequence[Placement | None], limits: Sequence[Allowed], axis: int) -> bool:
    return all(
        placement is None or isinstance(placement, Replicate) or pattern(placement) in allowed[axis]
        for placement, allowed in zip(placements, limits, strict=True)
    )


def blocks_of(placement: Shard, cut: Cut, rule: Rule) -> Blocks | None:
    """The blocks of ``rule`` with which ``cut`` gives ``placement``; None if there are none."""
    if placement.dim != cut.dim or placement.outer % cut.outer:
        return None
    outer, per_block = placement.outer // cut.outer, cut.factor * cut.outer
    if outer > 1 and any(isinstance(spec, Cut) and spec.outer > 1 for spec in (*rule.inputs, *rule.outputs)):
        return None  # runs of runs
    if any(extent % (per_block * outer) for extent in placement.sizes):
        return None
    return Blocks(tuple(extent // per_block for extent in placement.sizes), outer)


def localise(call: OpCall, rule: Rule, blocks: Blocks) -> OpCall:
    """What the worker with the most blocks runs of ``call``."""
    most = max(blocks.counts, default=0)
    inputs = tuple(_piece(spec, part, most) for spec, part in zip(call.inputs, rule.inputs, strict=True))
    outputs = tuple(
        None if spec is None else _piece(spec, part, most)
        for spec, part in zip(call.outputs, rule.outputs, strict=True)
    )
    target, args, kwargs = call.target, call.args, call.kwargs
    if rule.rewrite is not None:
        shapes = tuple(None if spec is None else spec.shape for spec in outputs)
        target, args, kwargs = rule.rewrite(call, shapes)
    return OpCall(target, tuple(args), dict(kwargs), inputs, outputs, call.returns_tuple)


def _piece(spec: TensorSpec, part: InputSpec | OutputSpec, count: int) -> TensorSpec:
    if not isinstance(part, Cut):
        return spec
    extent = count * part.factor * part.outer
    shape = (*spec.shape[: part.dim], extent, *spec.shape[part.dim + 1 :])
    return TensorSpec(shape, spec.dtype, spec.device, _strides(shape, spec.stride))


def _strides(shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor of ``shape`` whose dims lie in memory in the order of ``whole``."""
    if len(whole) != len(shape):
        return ()
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (whole[dim], -dim)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def share_of(placement: MeshPlacement) -> float:
    """Share of a tensor on its fullest worker."""
    share = 1.0
    for item in placement:
        if isinstance(item, Shard):
            share *= max(item.sizes) / max(sum(item.sizes), 1)
    return share


def plain_placements(spec: TensorSpec, sizes: Sequence[int], ways: Ways) -> list[MeshPlacement]:
    """All placements in which an input of the graph can be stored: whole, or cut in consecutive pieces, per axis."""
    found: list[tuple[MeshPlacement, tuple[int, ...]]] = [((), spec.shape)]
    for size in sizes:
        longer = []
        for placement, shape in found:
            longer.append(((*placement, REPLICATE), shape))
            for dim, extent in enumerate(shape):
                if extent >= size > 1 and (extent % size == 0 or ways.is_batch(extent, size)):
                    cut = Shard(dim, ways.split(extent, size))
                    longer.append(((*placement, cut), (*shape[:dim], max(cut.sizes), *shape[dim + 1 :])))
        found = longer
    return [placement for placement, _ in found]


def seen_cuts(placements: Sequence[MeshPlacement], num_axes: int) -> Seen:
    """Per axis the cuts among `placements`."""
    parts = [[placement[axis] for placement in placements] for axis in range(num_axes)]
    return tuple(frozenset(part for part in column if isinstance(part, Shard)) for column in parts)
