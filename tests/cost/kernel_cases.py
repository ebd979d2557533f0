"""What the tests of kernels in the place of ops have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import partita
from partita.runtime.torch_adapter import compile_graph

Batch = tuple[Tensor, Tensor]


def traced(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """The graph of a function, with FakeTensors in meta["val"] as captured graphs have them."""
    with FakeTensorMode() as mode:
        return make_fx(function)(*[mode.from_tensor(item) for item in examples])


def compiled(module: fx.GraphModule, examples: Sequence[Tensor]) -> list[Tensor]:
    """What the compiled graph gives in its second call."""
    layouts = [(tuple(item.shape), item.stride(), item.dtype) for item in examples]
    call = compile_graph(module, layouts, device=torch.device("cpu"), num_threads=1)
    with torch.no_grad():
        call(*examples)
        return list(call(*examples))


def encoder() -> tuple[nn.Module, list[Batch]]:
    """Two attention layers that are alike, and batches."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True) for _ in range(2)]
    batches = [(torch.randn(6, 10, 32), torch.randn(6, 10, 3)) for _ in range(5)]
    return nn.Sequential(*layers, nn.Linear(32, 3)), batches


def assert_trains_alike(
    model: nn.Module, batches: Sequence[Batch], plan: partita.Constraints, *, rtol: float, atol: float
) -> None:
    """Losses are those of plain PyTorch, and weights within these tolerances."""

    def loss_fn(module: Any, pair: Any) -> Tensor:
        return nn.functional.mse_loss(module(pair[0]), pair[1])

    plain = copy.deepcopy(model)
    expected, optimizer = [], torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(plain, batch)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with partita.parallelize(model, optimizer, loss_fn, batches[0], plan=plan) as step:
        losses = [step(batch).loss for batch in batches]
        step.sync_to(model)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol)
