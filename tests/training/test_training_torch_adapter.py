from __future__ import annotations

import importlib

import torch

from partita.training import torch_adapter


def test_torch_still_has_the_private_names() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.step()
    scheduler.step()
    for name in torch_adapter.PRIVATE_NAMES:
        path, _, last = name.rpartition(".")
        owner: object = optimizer if path == "torch.optim.Optimizer" else importlib.import_module(path)
        assert hasattr(owner, last), name


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
