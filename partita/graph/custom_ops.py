"""Ops that stand in a captured graph for ATen ops whose shape kernels are wrong.

`aten._grouped_mm` (products of row groups with a matrix each, in mixture-of-experts layers) runs in float32 on the CPU,
but its shape kernel in torch 2.13 refuses every dtype but bfloat16. `partita::grouped_mm` is the same op with a shape
kernel for all dtypes; it goes when the upstream kernel accepts float32.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("partita::grouped_mm", mutates_args=())
def grouped_mm(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """``left`` (S, K) or (G, S, K) times ``right`` (G, K, N) or (K, N), row groups ending at ``offsets`` (G,)."""
    return torch._grouped_mm(left, right, offs=offsets)


@grouped_mm.register_fake
def _(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    if left.dim() == 2 and right.dim() == 2:
        assert offsets is not None
        return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1])
    if left.dim() == 2:
        return left.new_empty(left.shape[0], right.shape[2])
    if right.dim() == 2:
        return left.new_empty(left.shape[1], right.shape[1])
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2])


def replacement(func: Any) -> Any:
    """The op to record instead of `func`: itself, or its stand-in."""
    if func is torch.ops.aten._grouped_mm.default:
        return torch.ops.partita.grouped_mm.default
    return func
