"""Updates that go directly to the fused kernels, against the optimizers' own steps with ``fused=True``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from partita.program.instructions import Slice
from partita.training.fused import FusedUpdate
from partita.training.optimizers import OptimizerShards

SHAPES = ((3, 4), (5,), (), (2, 3, 2))
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.01, fused=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "dampening": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3, maximize=True, fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1, fused=True),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True, fused=True),
    "decoupled": lambda params: torch.optim.Adam(
        params, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, fused=True
    ),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.95), maximize=True, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, lr_decay=0.1, fused=True),
}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def own_step(optimizer: torch.optim.Optimizer, params: Sequence[torch.nn.Parameter], step: int) -> None:
    for parameter, gradient in zip(params, gradients(step), strict=True):
        parameter.grad = gradient
    optimizer.step()


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """In another order than the gradients."""
    return [{"params": [params[3], params[0]]}, {"params": params[1:3], "lr": 0.05}]


@pytest.mark.parametrize("name", MAKERS)
def test_direct_updates_are_those_of_the_optimizer_to_the_last_bit(name: str) -> None:
    mine, plain = parameters(), parameters()
    optimizer, reference = MAKERS[name](groups(mine)), MAKERS[name](groups(plain))
    own_step(optimizer, mine, 0)
    own_step(reference, plain, 0)
    update = FusedUpdate.of(optimizer, mine, gradients(0))
    assert update is not None
    for step in range(1, 6):
        if step == 3:
            for either in (optimizer, reference):
                either.param_groups[0]["lr"] = 0.5
        assert update(gradients(step))
        own_step(reference, plain, step)
    for one, other in zip(mine, plain, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(mine, plain, strict=True):
        for state, value in reference.state[other].items():
            assert torch.equal(optimizer.state[one][state], value), state
    own_step(optimizer, mine, 9)  # the optimizer goes on where the direct updates ended
    own_step(reference, plain, 9)
    assert all(torch.equal(one, other) for one, other in zip(mine, plain, strict=True))


def test_flat_parameters_take_gradients_in_another_shape() -> None:
    whole, flat = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(6))
    gradient = torch.arange(6.0).view(2, 3)
    optimizers = [torch.optim.AdamW([item], fused=True) for item in (whole, flat)]
    for optimizer, parameter in zip(optimizers, (whole, flat), strict=True):
        parameter.grad = gradient.view(parameter.shape)
        optimizer.step()
    update = FusedUpdate.of(optimizers[1], [flat], [gradient])
    assert update is not None and update([gradient])
    assert not update([gradient.view(-1)])  # of another form now
    whole.grad = gradient
    optimizers[0].step()
    assert torch.equal(whole.view(-1), flat)


def test_whatever_is_not_plain_is_left_to_the_optimizer() -> None:
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=torch.tensor(0.1), fused=True)
    own_step(optimizer, params, 0)
    assert FusedUpdate.of(optimizer, params, gradients(0)) is None
    assert FusedUpdate.of(torch.optim.AdamW(params, fused=True), params, gradients(0)) is None  # no state yet
    unfused = torch.optim.AdamW(params)
    own_step(unfused, params, 0)
    assert FusedUpdate.of(unfused, params, gradients(0)) is None

    class Own(torch.optim.AdamW):
        """Might do anything."""

    own = Own(params, fused=True)
    own_step(own, params, 0)
    assert FusedUpdate.of(own, params, gradients(0)) is None


def test_an_option_that_asks_for_other_states_ends_it() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, fused=True)
    own_step(optimizer, params, 0)
    update = FusedUpdate.of(optimizer, params, gradients(0))
    assert update is not None and update(gradients(1))
    before = [parameter.detach().clone() for parameter in params]
    optimizer.param_groups[0]["momentum"] = 0.9
    assert not update(gradients(2))
    assert all(torch.equal(one, other) for one, other in zip(before, params, strict=True))


def test_hooks_of_all_optimizers_are_run() -> None:
    params = parameters()
    optimizer = torch.optim.AdamW(params, fused=True)
    own_step(optimizer, params, 0)
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert FusedUpdate.of(optimizer, params, gradients(0)) is None
    finally:
        handle.remove()


def test_shards_use_it_and_forget_it_when_states_are_exchanged() -> None:
    params = dict(zip("abcd", parameters(), strict=True))
    optimizer = torch.optim.AdamW(params.values(), lr=0.1)
    slices = tuple(Slice(name, 0, value.numel()) for name, value in params.items())
    shards = OptimizerShards(optimizer, params, {0: (slices,)}, whole=False)
    plain = parameters()
    reference = torch.optim.AdamW(plain, lr=0.1, fused=True)
    for step in range(6):
        shards.refresh_options()
        shards.update(0, slices, gradients(step))
        own_step(reference, plain, step)
        assert bool(shards._fused_updates)
        if step == 3:
            shards.collect()
            assert not shards._fused_updates
            assert float(optimizer.state[params["a"]]["step"]) == 4
    for one, other in zip(params.values(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
