"""All rules of a call: written by hand, or found by experiment."""

from __future__ import annotations

from partita.sharding.calls import OpCall
from partita.sharding.rules import Rule, written_rules


def rules_of(call: OpCall) -> list[Rule]:
    """The rules of ``call`` besides running it whole (which is always right); none if nothing is known of the op."""
    return written_rules(call) or []
