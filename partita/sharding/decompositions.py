"""The one door to torch's decompositions: an op as a graph of simpler ops, traced on fake tensors of the global shapes.

Counts of entries (the ``N`` of a mean, of a variance, of batch norm's statistics) are those of the whole tensors and
become numbers in the trace, so that unequal shards are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from partita.sharding.calls import OpCall, fill_slots

aten = torch.ops.aten


def decompose(call: OpCall, mode: FakeTensorMode) -> fx.GraphModule | None:
    """``call`` as a graph whose placeholders are its tensor inputs and whose output is a tuple; None if torch and this
    file know no decomposition, or if it does not get simpler."""
    target: Any = call.target
    function = _OWN.get(target) or decomposition_table.get(target)
    if function is None or call.is_random:
        return None
    with mode:
        tensors = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in call.inputs]

        def run(*inputs: torch.Tensor) -> tuple[Any, ...]:
            args, kwargs = fill_slots((call.args, call.kwargs), inputs)
            result = function(*args, **kwargs)
            if result is NotImplemented:
                raise NotImplementedError(call.name)
            return tuple(result) if isinstance(result, (tuple, list)) else (result,)

        try:
            module: fx.GraphModule = make_fx(run)(*tensors)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AssertionError):
            return None  # this overload or these arguments are not covered: the op then runs without being taken apart
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    if any(node.op == "get_attr" or node.target is call.target for node in nodes):
        return None
    module.graph.eliminate_dead_code()
    return module if _gives_the_same(module, call) else None


def _gives_the_same(module: fx.GraphModule, call: OpCall) -> bool:
    """Whether the outputs have the shapes and types of the op's own (None where the op gives none)."""
    results = next(iter(reversed(module.graph.nodes))).args[0]
    assert isinstance(results, (tuple, list))
    if len(results) != len(call.outputs):
        return False
    for result, spec in zip(results, call.outputs, strict=True):
        if spec is None:
            continue
        value = result.meta.get("val") if isinstance(result, fx.Node) else None
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != spec.shape or value.dtype is not spec.dtype:
            return False
    return True


def _count(x: torch.Tensor, dim: Any) -> int:
    dims = range(x.dim()) if not dim else ([dim] if isinstance(dim, int) else dim)
    return math.prod(int(x.shape[d]) for d in dims)


def _mean_dim(
    x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """mean = sum / N."""
    result: torch.Tensor = aten.div.Scalar(aten.sum.dim_IntList(x, dim, keepdim, dtype=dtype), _count(x, dim))
    return result


def _mean(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    result: torch.Tensor = aten.div.Scalar(aten.sum.default(x, dtype=dtype), x.numel())
    return result


def _var_mean(
    x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """var = sum((x - mean)^2) / (N - correction), in two passes as torch itself does it."""
    dims = list(range(x.dim())) if not dim else ([dim] if isinstance(dim, int) else list(dim))
    count = _count(x, dims)
    mean = aten.div.Scalar(aten.sum.dim_IntList(x, dims, True), count)
    centred = aten.sub.Tensor(x, mean)
    squares = aten.sum.dim_IntList(aten.mul.Tensor(centred, centred), dims, keepdim)
    free = max(count - (1 if correction is None else correction), 0)
    variance = aten.div.Scalar(squares, free)
    if not keepdim:
        kept = [int(e) for d, e in enumerate(x.shape) if d not in {i % x.dim() for i in dims}] if x.dim() else []
        mean = aten.view.default(mean, kept)
    return variance, mean


def _var(x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> torch.Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _std(x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> torch.Tensor:
    return _var(x, dim, correction=correction, keepdim=keepdim).sqrt()


def _std_mean(
    x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = _var_mean(x, dim, correction=correction, keepdim=keepdim)
    return variance.sqrt(), mean


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """beta * bias + alpha * (a @ b), for a product that is a Partial sum while its bias is whole."""
    product = aten.mm.default(a, b)
    scaled = product if alpha == 1 else aten.mul.Scalar(product, alpha)
    result: torch.Tensor = aten.add.Tensor(scaled, bias if beta == 1 else aten.mul.Scalar(bias, beta))
    return result


# torch expands these through primitives that have no rules, or not at all.
_OWN: dict[Any, Callable[..., Any]] = {
    aten.mean.dim: _mean_dim,
    aten.mean.default: _mean,
    aten.var_mean.correction: _var_mean,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.std_mean.correction: _std_mean,
    aten.addmm.default: _addmm,
}
