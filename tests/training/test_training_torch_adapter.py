from __future__ import annotations

import torch

from partita.training import torch_adapter


def test_torch_still_has_the_private_names() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.step()
    scheduler.step()
    for name in torch_adapter.PRIVATE_NAMES:
        owner: object = optimizer if name.startswith("torch.optim.Optimizer.") else torch
        assert hasattr(owner, name.rsplit(".", 1)[1]), name


def test_all_finite() -> None:
    good = torch.ones(3)
    assert torch_adapter.all_finite([])
    assert torch_adapter.all_finite([good, torch.arange(2), torch.ones(2, dtype=torch.bfloat16)])
    assert torch_adapter.all_finite([torch.full((4,), 3e38)])  # its norm overflows
    assert not torch_adapter.all_finite([good, torch.tensor([1.0, float("inf")])])
    assert not torch_adapter.all_finite([good, torch.tensor([float("nan")])])


def test_squared_norm() -> None:
    assert torch_adapter.squared_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]) == 25.0
    assert torch_adapter.squared_norm([]) == 0.0


def test_clone_has_neither_hooks_nor_the_schedulers_wrapper() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    other = torch.nn.Parameter(torch.ones(2))
    clone = torch_adapter.clone_optimizer(optimizer, [{**optimizer.param_groups[0], "params": [other]}])
    other.grad = torch.ones(2)
    clone.step()
    assert not calls and float(other.detach()[0]) != 1.0
    assert float(optimizer.param_groups[0]["params"][0].detach()[0]) == 1.0
