"""Propagation: walks a graph in order and chooses a rule for every op, inserting conversions between placements.

Cost of running an op by a rule, in seconds on the scale of `partita.sharding.conversions`:

    sum over inputs of conversion(cheapest available placement -> wanted)       one conversion per (value, placement)
    + (flops / speed + bytes / memory speed) * (size - 1) / size                if nothing is cut: replicated work
    + one latency                                                      if the rule starts cutting from whole values

The rule of least cost is taken (ties: first in the op's list), unless decisions name another. If it needs an
exchange, the op is also tried in its decomposed form, op by op, and the cheaper way stays. Values that depend on no
sharded input are not decided here at all: they are computed on demand, in the placement that a consumer wants (so
masks, position indices, constants and casts of weights never force an exchange).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from partita.graph.custom_ops import is_opaque
from partita.graph.graph import OpInfo
from partita.sharding.calls import Op, OpCall, Program, Value, read_graph
from partita.sharding.conversions import (
    FLOPS_PER_S,
    LATENCY_S,
    MEMORY_BYTES_PER_S,
    STEPPING_STONES,
    conversion_cost_s,
    conversion_kind,
    is_exchange,
)
from partita.sharding.decompositions import decompose
from partita.sharding.placement import Placement, Replicate, Shard, Windows, WindowSums
from partita.sharding.rules import PARTIAL, REPLICATE, Blocks, Bounds, Cut, Ignored, Reach, Rule, replicate_rule
from partita.sharding.rules_contractions import local_batch_norm_rules

MAX_PULL_DEPTH = 50
DECOMPOSED = "decomposed"


@dataclass(frozen=True, eq=False)
class Call:
    """Run ``op`` by ``rule``, whose blocks lie over the workers as ``blocks`` says."""

    op: Op
    inputs: tuple[Value, ...]
    rule: Rule
    blocks: Blocks
    input_placements: tuple[Placement | None, ...]
    output_placements: tuple[Placement | None, ...]


@dataclass(frozen=True, eq=False)
class Conversion:
    """Turn ``value`` from one placement into another."""

    value: Value
    source: Placement
    target: Placement

    @property
    def kind(self) -> str:
        return conversion_kind(self.source, self.target)

    def name(self, axis: str) -> str:
        """Tells axis and result, so that neither an op nor a conversion of another axis has it: workers know each
        other's exchanges by their names."""
        target = self.target
        where = f"{target.dim}" if isinstance(target, (Shard, Windows, WindowSums)) else ""
        runs = f"in{target.outer}" if isinstance(target, Shard) and target.outer > 1 else ""
        return f"{self.value.name}_{self.kind}{where}{runs}_{axis}"


Step = Call | Conversion


@dataclass(frozen=True)
class Choice:
    rule: Rule
    blocks: Blocks
    cost_s: float
    spreads: bool  # needs an exchange, or blows a shard up to a summand


@dataclass(frozen=True)
class Facts:
    """What a value depends on: ``varied`` on an input that is not whole; ``hoistable`` on nothing but batch inputs."""

    varied: bool
    hoistable: bool


class Propagation:
    """State of one walk. Every change is noted, so that a trial can be taken back."""

    def __init__(
        self,
        *,
        size: int,
        shares: tuple[int, ...] | None,
        mode: FakeTensorMode,
        rules: Callable[[OpCall], list[Rule]],
        hoist: bool,
        local_statistics: bool,
        decisions: Mapping[str, str] | None = None,
    ) -> None:
        self.size = size
        self.shares = shares
        self.hoist = hoist
        self.local_statistics = local_statistics
        self.decisions: dict[str, str] = {}  # op -> text of the rule that was taken, or DECOMPOSED
        self._wanted = decisions or {}
        self.steps: list[Step] = []
        self.available: dict[Value, tuple[Placement, ...]] = {}
        self.facts: dict[Value, Facts] = {}
        self.alias: dict[Value, Value] = {}
        self.order: dict[Op, int] = {}
        self.hoisted: dict[Value, None] = {}
        self.gathered: dict[str, None] = {}
        self._mode = mode
        self._rules_of = rules
        self._rules: dict[Any, list[Rule]] = {}
        self._decomposed: dict[Any, Any] = {}
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []

    # -- state -----------------------------------------------------------------------------------------------------

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self._undo.append((table, key, table.get(key, _MISSING)))
        table[key] = value

    def _roll_back(self, num_steps: int, num_changes: int) -> None:
        del self.steps[num_steps:]
        while len(self._undo) > num_changes:
            table, key, old = self._undo.pop()
            if old is _MISSING:
                del table[key]
            else:
                table[key] = old

    def resolve(self, value: Value) -> Value:
        """The value that stands for ``value`` (an output of a decomposed op is one of the last inner ops)."""
        while value in self.alias:
            value = self.alias[value]
        return value

    def _note(self, value: Value, placement: Placement) -> None:
        known = self.available.get(value, ())
        if placement not in known:
            self._set(self.available, value, (*known, placement))

    def add_placeholder(self, value: Value, placement: Placement, *, hoistable: bool) -> None:
        self._set(self.facts, value, Facts(not isinstance(placement, Replicate), hoistable))
        self._note(value, placement)

    def gather(self, value: Value) -> None:
        """Have a placeholder that comes in cut available whole; what depends on it alone is the same everywhere."""
        self.convert(value, REPLICATE)
        self._set(self.facts, value, Facts(False, self.facts[value].hoistable))

    def rules(self, call: OpCall) -> list[Rule]:
        """All rules of ``call``; running it whole comes last."""
        key = call.key
        if key not in self._rules:
            found = [] if call.is_random else list(self._rules_of(call))
            if self.local_statistics:
                found = local_batch_norm_rules(call) + found
            self._rules[key] = [*found, replicate_rule(call)]
        return self._rules[key]

    # -- the walk ---------------------------------------------------------------------------------------------------

    def run(self, ops: Iterable[Op]) -> float:
        """Choose rules for ``ops``, in order; returns their cost in seconds."""
        return sum(self._process(op) for op in ops)

    def _process(self, op: Op) -> float:
        inputs = tuple(self.resolve(value) for value in op.inputs)
        facts = [self.facts[value] for value in inputs]
        varied = any(fact.varied for fact in facts)
        hoistable = all(fact.hoistable for fact in facts) and not op.call.is_random
        self._set(self.order, op, len(self.order))
        for output in op.outputs:
            if output is not None:
                self._set(self.facts, output, Facts(varied, hoistable))
        if op.call.is_random:
            # Draws happen in the order of the program, whole, on every worker alike.
            return self._apply(op, inputs, Choice(replicate_rule(op.call), Blocks(), 0.0, False))
        if not varied:
            if op.call.is_exchange and op.outputs[0] is not None:
                self._pull_whole(op.outputs[0])  # wanted or not: the other workers of its axis take part in it as well
            return 0.0
        wanted = self._wanted.get(op.name)
        choice = self._choose(op, inputs, wanted)
        if wanted == DECOMPOSED or (wanted is None and choice.spreads):
            cost = self._try_decomposed(op, inputs, math.inf if wanted else choice.cost_s)
            if cost is not None:
                self._set(self.decisions, op.name, DECOMPOSED)
                return cost
        self._set(self.decisions, op.name, choice.rule.text())
        return self._apply(op, inputs, choice)

    def _choose(self, op: Op, inputs: tuple[Value, ...], wanted: str | None = None) -> Choice:
        """The cheapest rule; of those that read as ``wanted``, if there are any with a block for every worker (there
        are none where a microbatch has fewer rows than the axis has workers)."""
        rules = self.rules(op.call)
        best = self._cheapest(op, inputs, [rule for rule in rules if rule.text() == wanted])
        best = best or self._cheapest(op, inputs, rules)
        assert best is not None  # running it whole needs nothing
        return best

    def _cheapest(self, op: Op, inputs: tuple[Value, ...], rules: list[Rule]) -> Choice | None:
        best: Choice | None = None
        for rule in rules:
            for blocks in self._block_candidates(rule, inputs):
                cost, spreads = self._cost(op, inputs, rule, blocks)
                if best is None or cost < best.cost_s:
                    best = Choice(rule, blocks, cost, spreads)
        return best

    def _block_candidates(self, rule: Rule, inputs: tuple[Value, ...]) -> list[Blocks]:
        """Where to cut: as an input already is, else in proportion to the shares of the batch, else evenly."""
        if rule.extent == 0:
            return [Blocks()]
        found: dict[Blocks, None] = {}
        pairs = list(zip(rule.inputs, inputs, strict=True))
        # First come tensors of which every entry is a block: where their cut says more than that of the others, what is
        # made of them shall lie as they do.
        for given, value in sorted(pairs, key=lambda pair: not isinstance(pair[0], (Ignored, Reach))):
            spec = given.like if isinstance(given, Ignored) else given
            if isinstance(spec, (Cut, Bounds, Reach)):
                for placement in self.available.get(value, ()):
                    blocks = _blocks_of(placement, spec, rule)
                    if blocks is not None:
                        found[blocks] = None
        if not found and rule.extent >= self.size:
            found[Blocks(self.split(rule.extent))] = None
        return [blocks for blocks in found if rule.fits(blocks)]

    def split(self, extent: int) -> tuple[int, ...]:
        """``extent`` entries over the workers, in proportion to the batch's shares where that is whole."""
        total = sum(self.shares or ())
        if self.shares and total and extent % total == 0:
            return tuple(share * (extent // total) for share in self.shares)
        base, rest = divmod(extent, self.size)
        return tuple(base + (worker < rest) for worker in range(self.size))

    def _cost(self, op: Op, inputs: tuple[Value, ...], rule: Rule, blocks: Blocks) -> tuple[float, bool]:
        cost, spreads, continues = 0.0, False, False
        for value, target in set(zip(inputs, rule.input_placements(blocks), strict=True)):
            if target is None:
                continue
            step_cost, step_spreads = self._conversion_cost(value, target)
            cost += step_cost
            spreads = spreads or step_spreads
            continues = continues or (isinstance(target, Shard) and target in self.available.get(value, ()))
        if rule.extent == 0:
            cost += self._work_s(op) * (self.size - 1) / self.size
        elif not continues:
            cost += LATENCY_S
        return cost, spreads

    def _work_s(self, op: Op) -> float:
        """Time of the whole op; views cost nothing."""
        if getattr(op.call.target, "is_view", False):
            return 0.0
        num_bytes = sum(spec.num_bytes for spec in (*op.call.inputs, *op.call.outputs) if spec is not None)
        return (op.info.flops if op.info else 0) / FLOPS_PER_S + num_bytes / MEMORY_BYTES_PER_S

    def _conversion_cost(self, value: Value, target: Placement) -> tuple[float, bool]:
        """Cost of having ``value`` in ``target``, and whether it takes an exchange (or a pad)."""
        known = self.available.get(value, ())
        if target in known:
            return 0.0, False
        if known and _is_opaque(value):
            return math.inf, True
        if not self.facts[value].varied:
            return value.spec.num_bytes / MEMORY_BYTES_PER_S if target == PARTIAL else 0.0, False
        source = self._cheapest_source(value, target)
        if self._hoists(value, source, target):
            return value.spec.num_bytes / MEMORY_BYTES_PER_S, False
        spreads = is_exchange(source, target) or conversion_kind(source, target) == "pad"
        return conversion_cost_s(source, target, value.spec.num_bytes, self.size), spreads

    def _cheapest_source(self, value: Value, target: Placement) -> Placement:
        return min(
            self.available[value],
            key=lambda source: conversion_cost_s(source, target, value.spec.num_bytes, self.size),
        )

    def _hoists(self, value: Value, source: Placement, target: Placement) -> bool:
        return self.hoist and self.facts[value].hoistable and is_exchange(source, target)

    # -- emission ---------------------------------------------------------------------------------------------------

    def _apply(self, op: Op, inputs: tuple[Value, ...], choice: Choice) -> float:
        rule, blocks = choice.rule, choice.blocks
        placements = rule.input_placements(blocks)
        if rule.extent == 0 and not op.call.is_random:
            whole = [v for v, p in zip(inputs, placements, strict=True) if isinstance(p, Replicate)]
            if any(self.facts[v].varied and self._is_sharded(v) for v in whole):
                self._set(self.gathered, op.name, None)
        for value, placement in zip(inputs, placements, strict=True):
            if placement is not None:
                self.convert(value, placement)
        outputs = rule.output_placements(blocks)
        self.steps.append(Call(op, inputs, rule, blocks, placements, outputs))
        for output, placement in zip(op.outputs, outputs, strict=True):
            if output is not None and placement is not None:
                self._note(output, placement)
        return choice.cost_s

    def _is_sharded(self, value: Value) -> bool:
        known = self.available.get(value, ())
        return bool(known) and all(isinstance(placement, Shard) for placement in known)

    def convert(self, value: Value, target: Placement) -> None:
        """Have ``value`` available in ``target``."""
        if target in self.available.get(value, ()):
            return
        if not self.facts[value].varied and REPLICATE not in self.available.get(value, ()):
            self._pull(value, target, 0)
            return
        if _is_opaque(value):
            raise AssertionError(f"{value} is a buffer of its op and cannot be turned into {target}")
        source = self._cheapest_source(value, target)
        if self._hoists(value, source, target):
            self._set(self.hoisted, value, None)
            self._note(value, REPLICATE)
            if target == REPLICATE:
                return
            source = REPLICATE
        kind = conversion_kind(source, target)
        if kind in STEPPING_STONES:
            stone = source.owned if isinstance(source, WindowSums) else REPLICATE
            self.convert(value, stone)
            self.convert(value, target)
            return
        self.steps.append(Conversion(value, source, target))
        self._note(value, target)

    def _pull(self, value: Value, target: Placement, depth: int) -> None:
        """Compute a value that depends on no sharded input, in the placement in which it is wanted."""
        if target in self.available.get(value, ()):
            return
        from_pieces = REPLICATE not in self.available.get(value, ()) and depth < MAX_PULL_DEPTH
        if from_pieces and isinstance(target, Shard) and self._pull_shard(value, target, depth):
            return
        self._pull_whole(value)
        if target != REPLICATE:
            self.convert(value, target)

    def _pull_shard(self, value: Value, target: Shard, depth: int) -> bool:
        """Compute only the wanted piece, from pieces; False if no rule of the op gives it."""
        op = value.producer
        assert op is not None
        for rule in self.rules(op.call):
            spec = rule.outputs[value.index]
            if not isinstance(spec, Cut) or PARTIAL in rule.inputs:
                continue
            blocks = _blocks_of(target, spec, rule)
            if blocks is None:
                continue
            inputs = tuple(self.resolve(v) for v in op.inputs)
            for source, placement in zip(inputs, rule.input_placements(blocks), strict=True):
                if placement is not None:
                    self._pull(source, placement, depth + 1)
            self._apply(op, inputs, Choice(rule, blocks, 0.0, False))
            return True
        return False

    def _pull_whole(self, value: Value) -> None:
        """Compute ``value`` whole, and whatever it depends on (without recursion: chains may be long)."""
        wanted: dict[Op, None] = {}
        stack = [value]
        while stack:
            current = stack.pop()
            if REPLICATE in self.available.get(current, ()):
                continue
            op = current.producer
            assert op is not None
            if op not in wanted:
                wanted[op] = None
                rule = self._whole_rule(op)
                pairs = zip(op.inputs, rule.inputs, strict=True)
                stack += [self.resolve(v) for v, spec in pairs if isinstance(spec, Replicate)]
        for op in sorted(wanted, key=self.order.__getitem__):
            self._apply(
                op, tuple(self.resolve(v) for v in op.inputs), Choice(self._whole_rule(op), Blocks(), 0.0, False)
            )

    def _whole_rule(self, op: Op) -> Rule:
        for rule in self.rules(op.call):
            if rule.extent == 0 and PARTIAL not in rule.inputs and PARTIAL not in rule.outputs:
                return rule
        raise AssertionError(f"{op.name}: running whole is always a rule")

    # -- decomposition ----------------------------------------------------------------------------------------------

    def _try_decomposed(self, op: Op, inputs: tuple[Value, ...], limit_s: float) -> float | None:
        """Run ``op`` taken apart if that costs less than ``limit_s``; its cost, or None (and nothing has changed)."""
        inner = self._inner_program(op, inputs)
        if inner is None:
            return None
        num_steps, num_changes = len(self.steps), len(self._undo)
        cost = 0.0
        for inner_op in inner.ops:
            cost += self._process(inner_op)
            if cost >= limit_s:
                self._roll_back(num_steps, num_changes)
                return None
        for output, result in zip(op.outputs, inner.outputs, strict=True):
            if output is not None:
                self._set(self.alias, output, self.resolve(result))
        return cost

    def _inner_program(self, op: Op, inputs: tuple[Value, ...]) -> Program | None:
        key = op.call.key
        if key not in self._decomposed:
            self._decomposed[key] = decompose(op.call, self._mode)
        module = self._decomposed[key]
        if module is None:
            return None
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        info = None
        if op.info is not None:
            info = OpInfo(flops=0, num_bytes=0, phase=op.info.phase, module=op.info.module, source=op.info.source)
        return read_graph(
            module,
            inputs=dict(zip(names, inputs, strict=True)),
            prefix=f"{op.name}_",
            origin=op.origin,
            info=info,
            stack_trace=op.stack_trace,
        )


def _is_opaque(value: Value) -> bool:
    return value.producer is not None and is_opaque(value.producer.call.target, value.index)


def _blocks_of(placement: Placement, cut: Cut | Bounds | Reach, rule: Rule) -> Blocks | None:
    """The blocks of ``rule`` with which ``cut`` gives ``placement`` (or what owns its windows); None if there are
    none."""
    if not isinstance(cut, Cut):
        return _blocks_between(placement, cut)
    if not isinstance(placement, Shard) or placement.dim != cut.dim or placement.outer % cut.outer:
        return None
    outer = placement.outer // cut.outer
    per_block = cut.factor * cut.outer
    if outer > 1 and any(isinstance(spec, Cut) and spec.outer > 1 for spec in (*rule.inputs, *rule.outputs)):
        return None  # runs of runs
    if any(extent % (per_block * outer) for extent in placement.sizes):
        return None
    return Blocks(tuple(extent // per_block for extent in placement.sizes), outer)


def _blocks_between(placement: Placement, spec: Bounds | Reach) -> Blocks | None:
    """Exactly there for what has bounds, at the bounds next to it for what comes in windows (from any cut)."""
    owned = placement.owned if isinstance(placement, WindowSums) else placement
    if not isinstance(owned, Shard) or owned.dim != spec.dim or owned.outer > 1:
        return None
    ends = list(itertools.accumulate(owned.sizes))
    places = [0, *(bisect.bisect_left(spec.bounds, end) for end in ends)]
    exact = all(spec.bounds[place] == end for place, end in zip(places[1:], ends, strict=True))
    if len(set(places)) < len(places) or (isinstance(spec, Bounds) and not exact):
        return None
    return Blocks(tuple(j - i for i, j in itertools.pairwise(places)))


_MISSING = object()
