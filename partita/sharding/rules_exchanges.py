"""Rules of exchanges: how a graph that is split along one mesh axis already is split along the next.

An exchange along axis a adds or moves entries between the workers of a, element by element; along another axis b it may
therefore run in parts:

* cut along b in any dim whose extent the exchange leaves alone: every worker of b moves its own part;
* on summands of b: sums, concatenations and slices are linear, so the sum over b may also be formed afterwards.
"""

from __future__ import annotations

from partita.sharding.calls import OpCall
from partita.sharding.communication import COMMUNICATION_OPS
from partita.sharding.rules import Rule, parse_rules, register


@register(*map(str, COMMUNICATION_OPS))
def exchange_rules(call: OpCall) -> list[Rule]:
    """The rules of an exchange, besides doing it on the whole value.

    Example: ``all_gather(value, axis="tensor", dim=1, ...)`` of a value of rank 3 has ``S0 -> S0``, ``S2 -> S2`` and
    ``P -> P``.
    """
    moved = {call.kwargs.get("dim"), call.kwargs.get("new_dim")}
    texts = [f"S{dim} -> S{dim}" for dim in range(len(call.inputs[0].shape)) if dim not in moved]
    return parse_rules([*texts, "P -> P"], call)
