"""All rules of a call besides running it whole."""

from __future__ import annotations

import torch

from partita.sharding.calls import OpCall, TensorSpec
from partita.sharding.rules import PARTIAL, Rule, written_rules


def rules_of(call: OpCall) -> list[Rule]:
    """The rules of ``call``; none if nothing is known of the op (it then runs decomposed, or whole on gathered inputs).

    Truth values are never summands: rules that would sum them are left out.
    """
    specs = (*call.inputs, *call.outputs)
    return [rule for rule in written_rules(call) or [] if not _sums_truth_values(rule, specs)]


def _sums_truth_values(rule: Rule, specs: tuple[TensorSpec | None, ...]) -> bool:
    pairs = zip((*rule.inputs, *rule.outputs), specs, strict=True)
    return any(item == PARTIAL and spec is not None and spec.dtype is torch.bool for item, spec in pairs)
