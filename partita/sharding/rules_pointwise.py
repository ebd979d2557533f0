"""Rules of element-wise ops, with broadcasting; Partial passes through an op only where the op is linear in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from partita.sharding.calls import OpCall, Slot
from partita.sharding.rules import PARTIAL, REPLICATE, Cut, InputSpec, Rule, register

# Element-wise ops that torch does not tag as such.
UNTAGGED = frozenset({
    "_to_copy", "alias", "detach", "lift_fresh", "lift_fresh_copy", "hardtanh_backward", "leaky_relu_backward",
    "softplus_backward", "elu_backward", "log_sigmoid_backward", "copy", "positive", "convert_element_type",
    "nan_to_num", "hardswish_backward", "hardsigmoid_backward", "logit_backward",
})  # fmt: skip


def is_pointwise(call: OpCall) -> bool:
    """Whether every entry of every output depends only on the entries at the same place of the broadcast inputs."""
    if call.is_random or not call.inputs or any(spec is None for spec in call.outputs):
        return False
    if call.base_name not in UNTAGGED and torch.Tag.pointwise not in getattr(call.target, "tags", ()):
        return False
    shapes = {spec.shape for spec in call.outputs if spec is not None}
    if len(shapes) != 1:
        return False
    shape = next(iter(shapes))
    return all(_broadcasts(spec.shape, shape) for spec in call.inputs)


def _broadcasts(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    if len(shape) > len(into):
        return False
    aligned = into[len(into) - len(shape) :]
    return all(extent in (1, target) for extent, target in zip(shape, aligned, strict=True))


def pointwise_rules(call: OpCall) -> list[Rule]:
    """One rule per dim of the output, and the linear ones for Partial."""
    output = call.outputs[0]
    assert output is not None
    rules = []
    for dim, extent in enumerate(output.shape):
        if extent < 2:
            continue
        inputs: list[InputSpec] = []
        for spec in call.inputs:
            own = dim - (len(output.shape) - len(spec.shape))
            inputs.append(Cut(own) if own >= 0 and spec.shape[own] == extent else REPLICATE)
        rules.append(Rule(tuple(inputs), tuple(Cut(dim) for _ in call.outputs), extent))
    linear = _LINEAR.get(call.base_name)
    if linear is not None:
        rules += [Rule(inputs, (PARTIAL,) * len(call.outputs)) for inputs in linear(call)]
    return rules


Inputs = tuple[InputSpec, ...]


def _number_of_tensors(call: OpCall) -> int:
    return len(call.inputs)


def _sum(call: OpCall) -> list[Inputs]:
    return [(PARTIAL, PARTIAL)] if _number_of_tensors(call) == 2 and _additive(call) else []


def _additive(call: OpCall) -> bool:
    return call.outputs[0] is not None and call.outputs[0].dtype is not torch.bool


def _unary(call: OpCall) -> list[Inputs]:
    return [(PARTIAL,)] if _number_of_tensors(call) == 1 else []


def _product(call: OpCall) -> list[Inputs]:
    if not _additive(call):
        return []
    if _number_of_tensors(call) == 1:
        return [(PARTIAL,)]
    return [(PARTIAL, REPLICATE), (REPLICATE, PARTIAL)]


def _quotient(call: OpCall) -> list[Inputs]:
    if call.overload.endswith("mode") or not isinstance(call.args[0], Slot):
        return []
    return [(PARTIAL,) + (REPLICATE,) * (_number_of_tensors(call) - 1)]


def _cast(call: OpCall) -> list[Inputs]:
    """Only casts that do not round are linear: rounded summands are off by their own size, not by that of the sum."""
    output = call.outputs[0]
    assert output is not None
    return [(PARTIAL,)] if len(call.inputs) == 1 and _is_exact_cast(call.inputs[0].dtype, output.dtype) else []


def _is_exact_cast(source: torch.dtype, target: torch.dtype) -> bool:
    if source is target:
        return True
    if source is torch.bool or not (target.is_floating_point or target.is_complex):
        return False
    if source.is_complex and not target.is_complex:
        return False
    if source.is_floating_point or source.is_complex:
        fine, wide = torch.finfo(source), torch.finfo(target)
        return wide.eps <= fine.eps and wide.max >= fine.max
    return torch.finfo(target).eps <= 1 / torch.iinfo(source).max


def _where(call: OpCall) -> list[Inputs]:
    return [(REPLICATE, PARTIAL, PARTIAL)] if _number_of_tensors(call) == 3 else []


def _masked_fill(call: OpCall) -> list[Inputs]:
    """Filling every summand with 0 fills the sum with 0; no other number does."""
    return [(PARTIAL, REPLICATE)] if _number_of_tensors(call) == 2 and call.args[-1] == 0 else []


def _first(call: OpCall) -> list[Inputs]:
    """Linear in the first tensor (the gradient) alone."""
    return [(PARTIAL,) + (REPLICATE,) * (_number_of_tensors(call) - 1)]


_GRADIENT_FIRST = (
    "threshold_backward", "gelu_backward", "tanh_backward", "sigmoid_backward", "silu_backward", "hardtanh_backward",
    "leaky_relu_backward", "hardswish_backward", "hardsigmoid_backward", "softplus_backward",
)  # fmt: skip

_LINEAR: dict[str, Callable[[OpCall], list[Inputs]]] = {
    "add": _sum,
    "sub": _sum,
    "neg": _unary,
    "positive": _unary,
    "clone": _unary,
    "alias": _unary,
    "detach": _unary,
    "lift_fresh": _unary,
    "lift_fresh_copy": _unary,
    "_to_copy": _cast,
    "convert_element_type": _cast,
    "mul": _product,
    "div": _quotient,
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(
        _GRADIENT_FIRST,
        _first,
    ),
}


@register("copy")
def _copy(call: OpCall) -> list[Rule]:
    """``copy(self, src)`` gives the values of ``src`` in the shape of ``self``."""
    return pointwise_rules(call)
