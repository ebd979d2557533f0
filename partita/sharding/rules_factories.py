"""Rules of ops that make tensors from nothing: the local call gets the local shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from partita.sharding.calls import OpCall
from partita.sharding.rules import REPLICATE, Cut, Ignored, Rule, Shape, register

aten = torch.ops.aten

_FILLS: dict[str, float | int | None] = {"zeros": 0, "ones": 1, "empty": 0, "full": None}


@register(
    "zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "empty_strided", "new_empty_strided", "scalar_tensor",
)  # fmt: skip
def constant_rules(call: OpCall) -> list[Rule]:
    """Any dim may be cut; what the inputs hold does not matter, only their type."""
    output = call.outputs[0]
    assert output is not None
    inputs = tuple(Ignored() for _ in call.inputs)
    if call.base_name in ("full", "new_full", "full_like") and len(call.inputs) > int(call.base_name != "full"):
        return []  # the value is a tensor
    rules = [Rule(inputs, (REPLICATE,), rewrite=_as_full)]
    rules += [Rule(inputs, (Cut(dim),), extent, _as_full) for dim, extent in enumerate(output.shape) if extent > 1]
    return rules


def _as_full(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """The same constant as `aten.full`; memory that the op leaves unset becomes 0, so that all runs are alike."""
    output = call.outputs[0]
    assert output is not None
    stem = call.base_name.removeprefix("new_").removesuffix("_like").removesuffix("_strided")
    position = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}.get(call.base_name)
    names = {"full": "fill_value", "scalar_tensor": "s"}
    value = call.argument(position, names[stem]) if position is not None else _FILLS[stem]
    return (
        aten.full.default,
        (list(shapes[0] or ()), value),
        {"dtype": output.dtype, "device": output.device, "pin_memory": False},
    )


@register("arange", "linspace", "eye", "tril_indices", "triu_indices", "logspace")
def counting_rules(call: OpCall) -> list[Rule]:
    """Every entry depends on its place: made whole, then sliced (which is free)."""
    del call
    return []
