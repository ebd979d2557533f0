"""Ops of which no rule can cut anything, taken apart into ops that can be cut (a mean into a sum and a division)."""

from __future__ import annotations

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.graph.graph import OpInfo
from partita.planner.scale.ways import has_cuts, is_view
from partita.sharding.calls import Op, Program, Value, read_graph
from partita.sharding.decompositions import decompose
from partita.sharding.ruleset import find_rules_of

_MAX_ROUNDS = 3  # of taking apart what came out of taking apart
_SMALL = 1 << 12  # elements; what is smaller may as well run whole


def taken_apart(program: Program, module: fx.GraphModule) -> Program:
    """``program`` with every large op without cuts replaced by its parts, as far as torch knows them."""
    values = [node.meta["val"] for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    mode = detect_fake_mode(values) or FakeTensorMode()
    for _ in range(_MAX_ROUNDS):
        find_rules_of(op.call for op in program.ops)
        ops: list[Op] = []
        alias: dict[Value, Value] = {}
        for op in program.ops:
            op.inputs = tuple(alias.get(value, value) for value in op.inputs)
            ops += _parts(op, mode, alias) or [op]
        changed = len(ops) != len(program.ops)
        outputs = tuple(alias.get(v, v) if isinstance(v, Value) else v for v in program.outputs)
        program = Program(program.placeholders, ops, outputs)
        if not changed:
            break
    return program


def _parts(op: Op, mode: FakeTensorMode, alias: dict[Value, Value]) -> list[Op] | None:
    largest = max((spec.num_elements for spec in op.call.inputs), default=0)
    if largest < _SMALL or is_view(op) or has_cuts(op.call):
        return None
    module = decompose(op.call, mode)
    if module is None:
        return None
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    info = op.info and OpInfo(flops=0, num_bytes=0, phase=op.info.phase, module=op.info.module, source=op.info.source)
    inner = read_graph(
        module, inputs=dict(zip(names, op.inputs, strict=True)), prefix=f"{op.name}_", origin=op.origin, info=info
    )
    for output, result in zip(op.outputs, inner.outputs, strict=True):
        if output is not None and isinstance(result, Value):
            alias[output] = result
    return inner.ops
