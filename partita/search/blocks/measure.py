"""Runs a layer whose weight has absent blocks in each form that it can have, and takes the time.

One forward and backward pass in float32, all forms in turns, on as many threads as the layer will have:

* ``dense``: a dense layer; whoever holds absent entries at zero writes them after each update;
* ``masked``: a dense layer whose weight is multiplied by a mask in every forward pass, and so is its gradient;
* ``blocks``: `partita.search.blocks.BlockLinear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from partita.cost.inline import with_inline
from partita.cost.measure_ops import on_pinned_threads, time_in_turns
from partita.cost.variants import with_variants
from partita.graph import block_ops
from partita.runtime.compiling import compile_or_load
from partita.search.blocks.layer import Block

CPU = torch.device("cpu")
Call = Callable[[], object]


class Forms(msgspec.Struct, frozen=True):
    """Seconds of one forward and backward pass of a layer in each form."""

    dense_s: float
    masked_s: float
    blocks_s: float

    @property
    def fastest(self) -> str:
        """``"dense"``, ``"masked"`` or ``"blocks"``."""
        times_s = {"blocks": self.blocks_s, "dense": self.dense_s, "masked": self.masked_s}
        return min(times_s, key=times_s.__getitem__)


def measure_forms(
    num_rows: int, in_features: int, out_features: int, block: Block, num_inputs: int, *,
    needs_input_gradient: bool, compiled: bool, num_threads: int,
) -> Forms:  # fmt: skip
    """Seconds of a layer in each form, on `num_threads` threads and compiled for them if wanted; arguments as of
    `partita.search.blocks.fastest_form`, which keeps what it measured."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    height, width = block
    num_outputs, num_all = out_features // height, in_features // width
    index = torch.rand(num_outputs, num_all, generator=generator).argsort(1)[:, :num_inputs].contiguous()
    x, grad, bias = draw(num_rows, in_features), draw(num_rows, out_features), draw(out_features)
    weight = draw(out_features, in_features)
    mask = (draw(out_features, in_features) > 0).float()
    blocks = draw(num_outputs, num_inputs, height, width)

    def dense(x: Tensor, grad: Tensor, bias: Tensor, weight: Tensor) -> list[Tensor]:
        back = [grad @ weight] if needs_input_gradient else []
        return [torch.addmm(bias, x, weight.t()), grad.t() @ x, grad.sum(0), *back]

    def masked(x: Tensor, grad: Tensor, bias: Tensor, weight: Tensor, mask: Tensor) -> list[Tensor]:
        product, of_weight, *others = dense(x, grad, bias, weight * mask)
        return [product, of_weight * mask, *others]

    def sparse(x: Tensor, grad: Tensor, bias: Tensor, blocks: Tensor, index: Tensor) -> list[Tensor]:
        back = [block_ops.block_linear_input(grad, blocks, index, in_features)] if needs_input_gradient else []
        of_weight = block_ops.block_linear_weight(grad, x, index, width)
        return [block_ops.block_linear(x, blocks, index, bias), of_weight, grad.sum(0), *back]

    cases: list[tuple[Callable[..., Any], list[Tensor]]] = [
        (dense, [weight]), (masked, [weight, mask]), (sparse, [blocks, index]),
    ]  # fmt: skip
    calls = [_call(form, [x, grad, bias, *more], num_threads if compiled else None) for form, more in cases]
    times_s: list[float] = []

    def body() -> None:
        torch.set_num_threads(num_threads)
        times_s.extend(time_in_turns(calls))

    on_pinned_threads([()], [body])
    return Forms(*times_s)


def _call(form: Callable[..., Any], args: Sequence[Tensor], num_threads: int | None) -> Call:
    """The form with its arguments, compiled for so many threads, or as it is if None."""
    if num_threads is None:
        return lambda: form(*args)
    module = make_fx(form, tracing_mode="fake")(*args)
    module = with_variants(with_inline(module, num_threads), num_threads)
    layouts = [(tuple(value.shape), value.stride(), value.dtype) for value in args]
    compiled = compile_or_load(module, layouts, device=CPU, num_threads=num_threads)
    return lambda: compiled(*args)
