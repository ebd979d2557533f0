"""Rules of block-sparse linear layers (`partita.graph.block_ops`): rows, output blocks, blocks of one output block."""

from __future__ import annotations

import partita.graph.block_ops  # noqa: F401  (registers the ops)
from partita.sharding.calls import OpCall
from partita.sharding.rules import Rule, parse_rules, register


@register("block_linear")
def block_linear_rules(call: OpCall) -> list[Rule]:
    """``(x, weight, index, bias)``. A bias that is added to summands must be one."""
    height = call.inputs[1].shape[2]
    if len(call.inputs) == 3:
        texts = ["S0 R R -> S0", f"R S0 S0 -> S1*{height}", "R S1 S1 -> P", "P R R -> P", "R P R -> P"]
    else:
        texts = [
            "S0 R R R -> S0",
            f"R S0 S0 S0*{height} -> S1*{height}",
            "R S1 S1 P -> P",
            "P R R P -> P",
            "R P R P -> P",
        ]
    return parse_rules(texts, call)


@register("block_linear_input")
def block_linear_input_rules(call: OpCall) -> list[Rule]:
    """``(grad, weight, index)``."""
    height = call.inputs[1].shape[2]
    return parse_rules(["S0 R R -> S0", f"S1*{height} S0 S0 -> P", "R S1 S1 -> P", "P R R -> P", "R P R -> P"], call)


@register("block_linear_weight")
def block_linear_weight_rules(call: OpCall) -> list[Rule]:
    """``(grad, x, index)``."""
    height = call.inputs[0].shape[1] // call.inputs[2].shape[0]
    return parse_rules(["S0 S0 R -> P", f"S1*{height} R S0 -> S0", "R R S1 -> S1", "P R R -> P", "R P R -> P"], call)
