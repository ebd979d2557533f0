"""Every random op draws the same numbers from a worker's generator as from torch's default one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from partita.graph.randomness import is_random, with_generator

aten = torch.ops.aten
X = torch.rand(3, 4)
COUNTS = torch.randint(1, 9, (5,)).float()

CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.rand.default, ([3, 4],), {}),
    (aten.randn.default, ([3, 4],), {"dtype": torch.float64}),
    (aten.randint.default, (7, [5]), {}),
    (aten.randint.low, (2, 7, [5]), {}),
    (aten.randperm.default, (9,), {}),
    (aten.rand_like.default, (X,), {}),
    (aten.rand_like.default, (X.t(),), {"dtype": torch.float64}),
    (aten.randn_like.default, (X,), {}),
    (aten.randint_like.default, (X, 9), {}),
    (aten.randint_like.low_dtype, (X, 3, 9), {}),
    (aten.bernoulli.default, (X,), {}),
    (aten.bernoulli.p, (X, 0.3), {}),
    (aten.multinomial.default, (X, 2), {}),
    (aten.normal.Tensor_float, (X, 2.0), {}),
    (aten.poisson.default, (COUNTS,), {}),
    (aten.exponential.default, (X,), {}),
    (aten.uniform.default, (X, 1.0, 2.0), {}),
    (aten.native_dropout.default, (X, 0.4, True), {}),
    (aten.native_dropout.default, (X, 0.4, False), {}),
    (aten.native_dropout.default, (X, 1.0, True), {}),
    (aten._sample_dirichlet.default, (X,), {}),
    (aten._standard_gamma.default, (X,), {}),
    (aten.binomial.default, (COUNTS, torch.full((5,), 0.5)), {}),
]


def node_of(target: Any) -> fx.Node:
    return fx.Graph().call_function(target)


@pytest.mark.parametrize(("op", "args", "options"), CALLS, ids=[str(op) for op, *_ in CALLS])
def test_same_numbers_and_same_state_afterwards(op: Any, args: Any, options: Any) -> None:
    assert is_random(node_of(op))
    torch.manual_seed(11)
    expected = op(*args, **options)
    after = torch.get_rng_state()
    torch.manual_seed(99)
    default = torch.get_rng_state()
    generator = torch.Generator().manual_seed(11)
    result = with_generator(op)(generator, *args, **options)
    pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
    assert torch.equal(generator.get_state(), after)
    assert torch.equal(torch.get_rng_state(), default)  # torch's own generator is left alone


def test_an_op_that_knows_no_generator_borrows_the_default_one() -> None:
    op = aten.rrelu_with_noise_functional.default
    args = (X - 0.5, torch.zeros_like(X), 0.1, 0.3, True)
    torch.manual_seed(11)
    expected = op(*args)[0]
    assert torch.equal(with_generator(op)(torch.Generator().manual_seed(11), *args)[0], expected)
    from partita.graph.randomness import _through_default_generator

    torch.manual_seed(99)
    borrowed = _through_default_generator(aten.rand.default)(torch.Generator().manual_seed(11), [3])
    assert torch.equal(borrowed, torch.rand(3, generator=torch.Generator().manual_seed(11)))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(99)))


def test_plain_ops_are_not_random() -> None:
    assert not is_random(node_of(aten.add.Tensor)) and not is_random(node_of(len))
