"""Block-sparse layers in compiled code against dense products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from partita.cost.torch_adapter import small_product
from partita.graph.block_ops import OPS, block_linear, block_linear_input, block_linear_weight
from partita.runtime import torch_adapter

CPU = torch.device("cpu")
CASES = [  # rows, output blocks, input blocks, blocks of each output block, outputs and inputs of a block, threads
    (5, 2, 3, 2, 3, 4, 1),
    (300, 3, 4, 2, 16, 8, 2),
    (513, 7, 5, 3, 9, 17, 2),
    (1, 1, 1, 1, 1, 1, 1),
]


def all_three(x: Tensor, weight: Tensor, index: Tensor, grad: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
    return (
        block_linear(x, weight, index, *(bias or (None,))),
        block_linear_input(grad, weight, index, x.shape[1]),
        block_linear_weight(grad, x, index, weight.shape[3]),
    )


def compiled(args: tuple[Tensor, ...], num_threads: int) -> Callable[..., Any]:
    module = make_fx(all_three, tracing_mode="fake")(*args)
    layouts = [(tuple(value.shape), value.stride(), value.dtype) for value in args]
    return torch_adapter.compile_graph(module, layouts, device=CPU, num_threads=num_threads)


def arguments(case: tuple[int, ...], *, has_bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    num_rows, num_outputs, num_all, num_inputs, height, width, _ = case
    torch.manual_seed(0)
    features = num_outputs * height
    shapes = [(num_rows, num_all * width), (num_outputs, num_inputs, height, width), (num_rows, features), (features,)]
    x, weight, grad, bias = [torch.randn(shape, dtype=dtype) for shape in shapes]
    index = torch.randint(0, num_all, (num_outputs, num_inputs))
    return (x, weight, index, grad, bias) if has_bias else (x, weight, index, grad)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_the_ops_and_follows_the_index(case: tuple[int, ...], has_bias: bool) -> None:
    args = arguments(case, has_bias=has_bias)
    call = compiled(args, case[-1])
    with torch.no_grad():
        for _ in range(3):
            for mine, theirs in zip(call(*args), all_three(*args), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            args[2].copy_(torch.randint(0, case[2], args[2].shape))


def test_other_types_run_the_ops() -> None:
    args = arguments(CASES[0], has_bias=True, dtype=torch.float64)
    with torch.no_grad():
        for mine, theirs in zip(compiled(args, 1)(*args), all_three(*args), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(small_product() is None, reason="torch has no kernel to call: the op checks the index")
def test_an_index_that_is_not_there_is_refused_by_compiled_code() -> None:
    args = arguments(CASES[0], has_bias=True)
    call = compiled(args, 1)
    args[2][0, 0] = CASES[0][2]
    with torch.no_grad(), pytest.raises(RuntimeError, match="an input block that is not there"):
        call(*args)


@pytest.mark.skipif(small_product() is None, reason="torch has no kernel to call")
def test_the_lowerings_are_there() -> None:
    from torch._inductor import lowering

    from partita.runtime.block_products import register_lowerings

    register_lowerings()
    assert set(OPS) <= set(lowering.lowerings)
