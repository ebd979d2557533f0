"""Which cuts are worth looking at: those that some op with substance gives or wants.

Views, factories and pointwise ops run under any cut, so by themselves they would fill the problem with cuts in which
nothing else can work (half of every attention head, say). Only ops with substance (contractions, normalisations,
attention, reductions, look-ups) and the batch propose cuts; the others pass on, forwards and backwards, what is
proposed to them. Sums (`Partial`) are passed on forwards only. Along one axis, to a fixed point; a cut is known by
its dim and by whether it is in runs, so that what holds for a whole call holds for what other axes leave of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from partita.planner.intra.reading import Item, Key
from partita.planner.intra.ways import Pattern, Ways, blocks_of, pattern
from partita.sharding.calls import OpCall
from partita.sharding.placement import Placement, Shard
from partita.sharding.rules import PARTIAL, Blocks, Cut, InputSpec, OutputSpec, Rule, rule_source

MAX_ROUNDS = 10
_FOLLOWERS = frozenset({"rules_views", "rules_pointwise", "rules_factories"})


def follows(call: OpCall) -> bool:
    """Whether the op only passes cuts on."""
    return bool(getattr(call.target, "is_view", False)) or rule_source(call) in _FOLLOWERS


def useful_patterns(
    items: Sequence[Item], ways: Ways, size: int, proposed: Mapping[Key, Iterable[Placement]]
) -> dict[Key, frozenset[Pattern]]:
    """By value: the patterns of the cuts that are proposed along an axis of ``size`` workers.

    Args:
        proposed: placements of inputs of the graph that are worth looking at by themselves.
    """
    walk = _Walk(ways, size)
    for key, placements in proposed.items():
        walk.note(key, placements)
    for item in items:
        walk.propose(item)
    for _ in range(MAX_ROUNDS):
        before = walk.num_known
        for item in items:
            walk.forwards(item)
        for item in reversed(items):
            walk.backwards(item)
        if walk.num_known == before:
            break
    return {key: frozenset(map(pattern, known)) for key, known in walk.known.items()}


class _Walk:
    def __init__(self, ways: Ways, size: int) -> None:
        self.ways, self.size = ways, size
        self.known: dict[Key, dict[Placement, None]] = {}
        self.num_known = 0

    def note(self, key: Key | None, placements: Iterable[Placement | None]) -> None:
        if key is None:
            return
        known = self.known.setdefault(key, {})
        for placement in placements:
            divides = isinstance(placement, Shard) or placement == PARTIAL
            if placement is not None and divides and placement not in known:
                known[placement] = None
                self.num_known += 1

    def propose(self, item: Item) -> None:
        """What an op with substance gives and wants by its own rules."""
        if follows(item.op.call):
            return
        for rule in self.ways.rules(item.op.call):
            for blocks in self.ways.usual_blocks(rule, self.size):
                self._note_rule(item, rule, blocks, wanted=True)

    def _note_rule(self, item: Item, rule: Rule, blocks: Blocks, *, wanted: bool) -> None:
        for key, placement in zip(item.outputs, rule.output_placements(blocks), strict=True):
            self.note(key, [placement])
        if wanted:
            for key, placement in zip(item.inputs, rule.input_placements(blocks), strict=True):
                if placement != PARTIAL:
                    self.note(key, [placement])

    def forwards(self, item: Item) -> None:
        """What follows from the cuts of the inputs."""
        for rule in self.ways.rules(item.op.call):
            if rule.extent == 0 and PARTIAL in rule.inputs and self._summed(item, rule):
                self._note_rule(item, rule, Blocks(), wanted=False)
            for blocks in self._derived(rule, rule.inputs, item.inputs):
                self._note_rule(item, rule, blocks, wanted=True)

    def _summed(self, item: Item, rule: Rule) -> bool:
        pairs = zip(item.inputs, rule.inputs, strict=True)
        return any(spec == PARTIAL and PARTIAL in self.known.get(key, ()) for key, spec in pairs)

    def backwards(self, item: Item) -> None:
        """What a follower's inputs should be cut like, given its outputs."""
        if not follows(item.op.call):
            return
        for rule in self.ways.rules(item.op.call):
            for blocks in self._derived(rule, rule.outputs, item.outputs):
                self._note_rule(item, rule, blocks, wanted=True)

    def _derived(
        self, rule: Rule, specs: Sequence[InputSpec | OutputSpec], keys: Sequence[Key | None]
    ) -> Iterable[Blocks]:
        found: dict[Blocks, None] = {}
        if rule.extent:
            for spec, key in zip(specs, keys, strict=True):
                if isinstance(spec, Cut) and key is not None:
                    for placement in self.known.get(key, ()):
                        blocks = blocks_of(placement, spec, rule) if isinstance(placement, Shard) else None
                        if blocks is not None and sum(blocks.counts) == rule.extent:
                            found[blocks] = None
        return list(found)
