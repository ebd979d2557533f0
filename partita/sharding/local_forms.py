"""Local forms: what a worker runs in place of an op where that is more than one call or depends on its place.

A `Rule.local` is a function of the local tensors that calls ops of torch; here it is traced on fake tensors and written
into the worker's graph, op by op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from partita.sharding.calls import OpCall
from partita.sharding.rules import Part, Rule


def run_local(call: OpCall, rule: Rule, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The outputs of one worker; ``tensors`` has None where the rule ignores an input."""
    assert rule.local is not None
    return rule.local(call, part, tensors)


def trace_local(
    call: OpCall, rule: Rule, part: Part, tensors: tuple[torch.Tensor | None, ...], mode: FakeTensorMode
) -> fx.GraphModule:
    """The local form as a graph: placeholders are the tensors that are not None, the output is a tuple."""

    def run(*given: torch.Tensor) -> tuple[Any, ...]:
        left = iter(given)
        return run_local(call, rule, part, tuple(None if tensor is None else next(left) for tensor in tensors))

    with mode, torch.no_grad():
        # Own ones: the trace tells its inputs apart by identity, and equal pieces may share one fake tensor.
        own = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors if x is not None
        ]
        module: fx.GraphModule = make_fx(run)(*own)
    if any(node.op == "get_attr" for node in module.graph.nodes):
        raise AssertionError(f"the local form of {call.name} by rule {rule.text()} must make its constants by ops")
    module.graph.eliminate_dead_code()
    return module
