"""Rules: the ways of running one op in parts along one mesh axis.

A `Rule` says of every tensor input and output of an op whether it is whole (`Replicate`), a summand (`Partial`) or cut
(`Cut`). All cut dims of a rule are cut at the same places: the rule has ``extent`` indivisible blocks, a worker gets
some of them, and ``Cut(dim, factor)`` holds ``factor`` entries of ``dim`` per block. So a view of ``[B*T, C]`` as
``[B, T, C]`` is the rule ``S0*T -> S0`` with extent ``B``, exact for uneven shards.

Rules are written as text, inputs left and outputs right of the arrow: ``"S0 R -> S0"``, ``"S1 S0 -> P"``; ``_`` is an
input whose values do not matter or an output that is absent, ``MAX`` an output that is the largest of the workers'.

Stencils (convolution, pooling) do not treat blocks alike: blocks differ in the rows that they have and yield, and need
rows of their neighbours. Their specs are maps from the *boundaries* of blocks, ``0 .. extent``, to entries:

* `Bounds(dim, bounds)`: the worker with blocks ``i .. j`` has the entries ``bounds[i] .. bounds[j]``;
* `Reach(dim, bounds, starts, ends)`: it has ``starts[i] .. ends[j]``, of which ``bounds[i] .. bounds[j]`` are its own.
  An input with a reach is served by a halo exchange from any cut of the dim; an output with one is a summand in its
  halo.

They are written ``S2~`` and ``W2~``, and cannot be read back.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from partita.sharding.calls import OpCall
from partita.sharding.placement import Extremum, Partial, Placement, Replicate, Shard, Windows, WindowSums, local_shape

Shape = tuple[int, ...]
Rewrite = Callable[[OpCall, tuple[Shape | None, ...]], tuple[Any, tuple[Any, ...], Mapping[str, Any]]]
"""Gives target, args and kwargs of the local call for the local shapes of the outputs."""


@dataclass(frozen=True)
class Cut:
    """Dim ``dim`` is cut; each of the rule's blocks has ``factor`` of its entries in each of ``outer`` runs."""

    dim: int
    factor: int = 1
    outer: int = 1


@dataclass(frozen=True)
class Blocks:
    """How a rule's blocks lie over the workers: ``counts[i]`` of them on worker ``i``, taken from ``outer`` runs.

    Runs need no rules of their own: a rule that holds for every way of cutting treats each block alike, wherever it
    lies, so blocks may also be dealt out in another order, as long as all cut tensors of the call follow that order.
    """

    counts: tuple[int, ...] = ()
    outer: int = 1


@dataclass(frozen=True)
class Bounds:
    """Dim ``dim`` is cut where ``bounds`` says; see the module's text. ``bounds`` has ``extent + 1`` entries."""

    dim: int
    bounds: tuple[int, ...]


@dataclass(frozen=True)
class Reach:
    """Dim ``dim`` is cut at ``bounds``, with a halo; see the module's text. Outside of the tensor lies ``fill``."""

    dim: int
    bounds: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    fill: float = 0.0


@dataclass(frozen=True)
class Ignored:
    """An input that is not read (of ``zeros_like`` only the shape counts): any placement will do.

    ``like`` is where it would be cut if it were read: cut alike, results fit to what was made of it before.
    """

    like: Reach | None = None


InputSpec = Replicate | Partial | Cut | Ignored | Bounds | Reach
OutputSpec = Replicate | Partial | Extremum | Cut | Bounds | Reach | None

REPLICATE = Replicate()
PARTIAL = Partial()
LARGEST = Extremum("max")
SMALLEST = Extremum("min")


@dataclass(frozen=True)
class Rule:
    """One way of running an op in parts; see the module's text. ``extent`` is 0 if nothing is cut.

    ``averaged`` lists outputs that each worker computes from its own shard alone and that are averaged, weighted by the
    blocks, into a Partial value (running statistics of BatchNorm with local statistics).
    ``local`` is what a worker runs where that is more than one call, or depends on its place (instead of ``rewrite``);
    ``in_runs`` says that it does not depend on its place, so that blocks may be dealt in runs.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    extent: int = 0
    rewrite: Rewrite | None = None
    averaged: tuple[int, ...] = ()
    local: LocalForm | None = None
    in_runs: bool = False

    def input_placements(self, blocks: Blocks) -> tuple[Placement | None, ...]:
        return tuple(_placement(spec, blocks, is_output=False) for spec in self.inputs)

    def output_placements(self, blocks: Blocks) -> tuple[Placement | None, ...]:
        return tuple(_placement(spec, blocks, is_output=True) for spec in self.outputs)

    def fits(self, blocks: Blocks) -> bool:
        """Whether the rule can run like that: where places matter, blocks are not dealt in runs."""
        placed = any(isinstance(spec, (Bounds, Reach)) for spec in (*self.inputs, *self.outputs))
        return blocks.outer == 1 or not (placed or (self.local is not None and not self.in_runs))

    def text(self) -> str:
        """The rule as text; `parse_rule` reads it back."""
        return f"{' '.join(map(_spec_text, self.inputs))} -> {' '.join(map(_spec_text, self.outputs))}".strip()


@dataclass(frozen=True)
class Part:
    """The place of one worker in a rule: its blocks are ``start .. end``, its outputs have ``output_shapes``.

    ``placements`` are those of the inputs, ``coordinate`` is the worker's number.
    """

    coordinate: int
    start: int
    end: int
    placements: tuple[Placement | None, ...]
    output_shapes: tuple[Shape | None, ...]


LocalForm = Callable[[OpCall, Part, tuple[Any, ...]], tuple[Any, ...]]
"""Computes the local outputs of a call by plain ops of torch from its local tensors (None for an input that is
`Ignored`). Which ops it calls must not depend on the place, only their numbers may: all workers' graphs look alike."""


def part_of(call: OpCall, rule: Rule, blocks: Blocks, coordinate: int) -> Part:
    """What `Rule.local` is told of the worker ``coordinate``."""
    start = sum(blocks.counts[:coordinate])
    shapes = tuple(
        None if spec is None or placement is None else local_shape(spec.shape, placement, coordinate)
        for spec, placement in zip(call.outputs, rule.output_placements(blocks), strict=True)
    )
    end = start + (blocks.counts[coordinate] if blocks.counts else 0)
    return Part(coordinate, start, end, rule.input_placements(blocks), shapes)


def _placement(spec: InputSpec | OutputSpec, blocks: Blocks, *, is_output: bool) -> Placement | None:
    if isinstance(spec, (Bounds, Reach)):
        places = [0, *itertools.accumulate(blocks.counts)]
        sizes = tuple(spec.bounds[j] - spec.bounds[i] for i, j in itertools.pairwise(places))
        if isinstance(spec, Bounds):
            return Shard(spec.dim, sizes)
        starts, ends = tuple(spec.starts[i] for i in places[:-1]), tuple(spec.ends[j] for j in places[1:])
        own = Shard(spec.dim, sizes)
        if Windows(spec.dim, starts, ends).is_cut_like(own):
            return own  # nobody needs what is not his
        if is_output:
            return WindowSums(spec.dim, starts, ends, sizes)
        return Windows(spec.dim, starts, ends, spec.fill)
    if isinstance(spec, Cut):
        sizes = tuple(count * spec.factor * spec.outer for count in blocks.counts)
        return Shard(spec.dim, sizes, spec.outer * blocks.outer)
    if isinstance(spec, (Replicate, Partial, Extremum)):
        return spec
    return None


def _spec_text(spec: InputSpec | OutputSpec) -> str:
    if isinstance(spec, Cut):
        runs = "" if spec.outer == 1 else f"/{spec.outer}"
        return f"S{spec.dim}{runs}" if spec.factor == 1 else f"S{spec.dim}{runs}*{spec.factor}"
    if isinstance(spec, (Bounds, Reach)):
        return f"{'S' if isinstance(spec, Bounds) else 'W'}{spec.dim}~"
    if isinstance(spec, Extremum):
        return spec.kind.upper()
    return {Replicate: "R", Partial: "P"}.get(type(spec), "_")


def parse_rule(text: str, call: OpCall, *, rewrite: Rewrite | None = None) -> Rule | None:
    """The rule written as ``text`` for ``call``; None if it does not apply to these shapes.

    It does not apply if it names a dim that a tensor lacks, an empty one or dims of different extents (broadcasting),
    or if the numbers of inputs or outputs differ. Specs may be left out at the right end of the inputs: they are R.
    """
    left, right = text.split("->")
    left_items, right_items = left.split(), right.split()
    if len(left_items) > len(call.inputs) or len(right_items) > len(call.outputs):
        return None
    left_items += ["R"] * (len(call.inputs) - len(left_items))
    right_items += ["_"] * (len(call.outputs) - len(right_items))
    inputs = tuple(_parse_spec(item, len(spec.shape)) for item, spec in zip(left_items, call.inputs, strict=True))
    outputs = tuple(
        None if spec is None else _parse_spec(item, len(spec.shape))
        for item, spec in zip(right_items, call.outputs, strict=True)
    )
    if "bad" in inputs or "bad" in outputs:
        return None
    extents = {
        spec.shape[cut.dim] / cut.factor
        for cut, spec in [*zip(inputs, call.inputs, strict=True), *zip(outputs, call.outputs, strict=True)]
        if isinstance(cut, Cut) and spec is not None
    }
    if len(extents) > 1 or any(extent < 1 or extent != int(extent) for extent in extents):
        return None  # what is empty cannot be cut
    final_outputs = tuple(None if isinstance(spec, Ignored) else spec for spec in outputs)
    return Rule(inputs, final_outputs, int(extents.pop()) if extents else 0, rewrite)


def _parse_spec(item: str, rank: int) -> Any:
    if item == "R":
        return REPLICATE
    if item == "P":
        return PARTIAL
    if item in ("MAX", "MIN"):
        return Extremum(item.lower())
    if item == "_":
        return Ignored()
    dim_text, _, factor = item[1:].partition("*")
    dim = int(dim_text)
    if dim < 0:
        dim += rank
    return Cut(dim, int(factor or 1)) if 0 <= dim < rank else "bad"


def parse_rules(texts: Iterable[str], call: OpCall, *, rewrite: Rewrite | None = None) -> list[Rule]:
    """All rules of ``texts`` that apply to ``call``, without doubles."""
    found: dict[str, Rule] = {}
    for text in texts:
        rule = parse_rule(text, call, rewrite=rewrite)
        if rule is not None:
            found.setdefault(rule.text(), rule)
    return list(found.values())


def replicate_rule(call: OpCall) -> Rule:
    """Run the op on whole inputs; always right."""
    outputs = tuple(None if spec is None else REPLICATE for spec in call.outputs)
    return Rule(tuple(REPLICATE for _ in call.inputs), outputs)


RuleFunction = Callable[[OpCall], list[Rule]]
_REGISTRY: dict[str, RuleFunction] = {}


def register(*names: str) -> Callable[[RuleFunction], RuleFunction]:
    """Declare that the decorated function gives the rules of the ops with these base names (``"mm"``) or full names."""

    def decorate(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name in _REGISTRY:
                raise AssertionError(f"two sets of rules for {name}")
            _REGISTRY[name] = function
        return function

    return decorate


def written_rules(call: OpCall) -> list[Rule] | None:
    """The hand-written rules of ``call`` besides plain replication; None if there are none for this op."""
    _load()
    function = _REGISTRY.get(call.name) or _REGISTRY.get(call.base_name)
    if function is None and call.is_random:
        return []
    if function is None:
        from partita.sharding.rules_pointwise import is_pointwise, pointwise_rules

        function = pointwise_rules if is_pointwise(call) else None
    return None if function is None else function(call)


def rule_source(call: OpCall) -> str:
    """Name of the file that gives the rules of ``call`` (``"rules_views"``); empty if they are found by experiment."""
    _load()
    function = _REGISTRY.get(call.name) or _REGISTRY.get(call.base_name)
    if function is not None:
        return function.__module__.rpartition(".")[2]
    from partita.sharding.rules_pointwise import is_pointwise

    return "rules_pointwise" if is_pointwise(call) else ""


@functools.cache
def _load() -> None:
    """Import the files that register rules (here, because they import this file)."""
    from partita.sharding import (
        rules_attention,
        rules_blocks,
        rules_contractions,
        rules_exchanges,
        rules_factories,
        rules_images,
        rules_pointwise,
        rules_tables,
        rules_views,
    )

    del rules_attention, rules_blocks, rules_contractions, rules_exchanges, rules_factories, rules_images
    del rules_pointwise, rules_tables, rules_views
