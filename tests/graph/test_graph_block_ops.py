"""Block-sparse products and their gradients against dense ones; rules of running them in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.graph import block_ops
from partita.graph.block_ops import OPS, block_linear, block_linear_input, block_linear_weight
from partita.sharding.calls import OpCall, Slot, TensorSpec
from partita.sharding.experiment import rule_holds
from partita.sharding.rules import Blocks
from partita.sharding.ruleset import rules_of

EXTENTS = st.tuples(*[st.integers(1, 9)] + [st.integers(1, 4)] * 3 + [st.integers(1, 5)] * 2)


def tensors_of(extents: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """x, weight, index (with repetitions), bias and the gradient of the result, in double precision."""
    num_rows, num_outputs, num_all, num_inputs, height, width = extents
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    index = torch.randint(0, num_all, (num_outputs, num_inputs), generator=generator)
    features = num_outputs * height
    weight = draw(num_outputs, num_inputs, height, width)
    return draw(num_rows, num_all * width), weight, index, draw(features), draw(num_rows, features)


def dense_weight(weight: Tensor, index: Tensor, in_features: int) -> Tensor:
    """[O, I]: every block where it is, one after the other."""
    num_outputs, num_inputs, height, width = weight.shape
    whole = weight.new_zeros(num_outputs * height, in_features)
    for output in range(num_outputs):
        for place in range(num_inputs):
            source = int(index[output, place])
            part = torch.zeros_like(whole)
            rows, columns = slice(output * height, (output + 1) * height), slice(source * width, (source + 1) * width)
            part[rows, columns] = 1
            whole = whole + part.masked_scatter(part > 0, weight[output, place])
    return whole


@settings(max_examples=60, deadline=None)
@given(EXTENTS, st.integers(0, 10**6), st.booleans())
def test_values_and_gradients_are_those_of_the_dense_layer(extents: tuple[int, ...], seed: int, has_bias: bool) -> None:
    x, weight, index, bias, grad = tensors_of(extents, seed)
    leaves = [x.requires_grad_(), weight.requires_grad_(), *([bias.requires_grad_()] if has_bias else [])]
    given_bias = bias if has_bias else None
    expected = torch.nn.functional.linear(x, dense_weight(weight, index, x.shape[1]), given_bias)
    got = block_linear(x, weight, index, given_bias)
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_operands_may_lie_anyhow() -> None:
    x, weight, index, bias, grad = tensors_of((5, 2, 3, 2, 4, 3))
    plain = block_linear(x, weight, index, bias), block_linear_weight(grad, x, index, 3)
    turned_x, turned_grad = x.t().contiguous().t(), grad[:, :1].expand(-1, grad.shape[1])
    torch.testing.assert_close(block_linear(turned_x, weight.mT.contiguous().mT, index, bias), plain[0])
    torch.testing.assert_close(block_linear_weight(grad.t().contiguous().t(), turned_x, index, 3), plain[1])
    torch.testing.assert_close(
        block_linear_input(turned_grad, weight, index, x.shape[1]),
        block_linear_input(turned_grad.contiguous(), weight, index, x.shape[1]),
    )


@pytest.mark.parametrize("place", range(3))
def test_shape_kernels_tell_what_the_kernels_return(place: int) -> None:
    _, args = calls_of(tensors_of((5, 2, 3, 2, 4, 3)))[place]
    real = OPS[place](*args)
    with FakeTensorMode() as mode:
        fake = OPS[place](*[mode.from_tensor(item) if isinstance(item, Tensor) else item for item in args])
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert block_ops.num_input_blocks(OPS[place], args) == 3


def calls_of(tensors: tuple[Tensor, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    x, weight, index, bias, grad = tensors
    arguments = [(x, weight, index, bias), (grad, weight, index, x.shape[1]), (grad, x, index, weight.shape[3])]
    return list(zip(OPS, arguments, strict=True))


@pytest.mark.parametrize("entry", [3, -1])
def test_an_index_that_is_not_there_is_refused(entry: int) -> None:
    tensors = tensors_of((5, 2, 3, 2, 4, 3))
    tensors[2][1, 0] = entry
    for op, args in calls_of(tensors):
        with pytest.raises(IndexError, match="must name one of its 3 input blocks"):
            op(*args)


def test_pytorch_checks_the_registration() -> None:
    x, weight, index, bias, _ = tensors_of((5, 2, 3, 2, 4, 3))
    torch.library.opcheck(
        block_linear, (x.requires_grad_(), weight.requires_grad_(), index, bias.requires_grad_()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("has_bias", [False, True])
def test_rules_hold(has_bias: bool) -> None:
    """By rows, by output blocks and by the blocks of one output block, evenly and unevenly."""
    kinds = set()
    for op, args in calls_of(tensors_of((6, 4, 5, 3, 2, 3))):
        items = list(args) if has_bias or op is not OPS[0] else [*args[:3], None]
        given_tensors = [item for item in items if isinstance(item, Tensor)]
        numbers = iter(range(9))
        slots = tuple(Slot(next(numbers)) if isinstance(item, Tensor) else item for item in items)
        specs = tuple(TensorSpec.of(item) for item in given_tensors)
        call = OpCall(op, slots, {}, specs, (TensorSpec.of(op(*items)),), False)
        rules = rules_of(call)
        assert len(rules) == 5, [rule.text() for rule in rules]
        for rule in rules:
            kinds.add(rule.extent)
            for blocks in (
                [Blocks((rule.extent - 1, 1)), Blocks((1, 1, rule.extent - 2))] if rule.extent else [Blocks((1, 1))]
            ):
                assert rule_holds(call, rule, blocks), rule.text()
    assert kinds == {0, 3, 4, 6}
