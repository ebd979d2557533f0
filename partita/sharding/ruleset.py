"""All rules of a call besides running it whole: the written ones, or else those found by experiment."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from partita.sharding.calls import OpCall, TensorSpec
from partita.sharding.found import is_searched, rule_book
from partita.sharding.placement import Partial, Replicate
from partita.sharding.rules import PARTIAL, Bounds, Cut, Ignored, Reach, Rule, parse_rules, written_rules


def rules_of(call: OpCall) -> list[Rule]:
    """The rules of ``call``; none if nothing is known of the op (it then runs decomposed, or whole on gathered inputs).

    Truth values, and numbers of types without an addition, are never summands: rules that would sum them are left out,
    and so are those that would cut what is empty or a single block.
    """
    specs = (*call.inputs, *call.outputs)
    rules = written_rules(call)
    if rules is None:
        rules = parse_rules(rule_book().find([call])[0], call) if is_searched(call) else []
    return [rule for rule in rules if _cuts_something(rule) and not _sums_what_has_no_sum(rule, specs)]


def _cuts_something(rule: Rule) -> bool:
    cuts = any(isinstance(spec, (Cut, Bounds, Reach)) for spec in (*rule.inputs, *rule.outputs))
    return rule.extent > 1 if cuts else rule.extent == 0


def plain_rules_of(call: OpCall) -> list[Rule]:
    """The rules whose values are whole, summands or cut: neither windows over neighbours' rows nor extremes, whose
    conversions take several exchanges."""
    plain = (Replicate, Partial, Cut, Ignored, type(None))
    return [rule for rule in rules_of(call) if all(isinstance(spec, plain) for spec in (*rule.inputs, *rule.outputs))]


def find_rules_of(calls: Iterable[OpCall]) -> None:
    """Find the rules of all ``calls`` that have no written ones, at once: so the helper process is asked only once."""
    rule_book().find({c.key: c for c in calls if written_rules(c) is None and is_searched(c)}.values())


def stop_searching() -> None:
    """End the helper process that searches rules, if one runs."""
    rule_book().close()


NO_SUMS = frozenset({torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex32})


def _sums_what_has_no_sum(rule: Rule, specs: tuple[TensorSpec | None, ...]) -> bool:
    pairs = zip((*rule.inputs, *rule.outputs), specs, strict=True)
    return any(item == PARTIAL and spec is not None and spec.dtype in NO_SUMS for item, spec in pairs)
