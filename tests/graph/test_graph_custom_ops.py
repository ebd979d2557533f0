"""Stand-ins for ATen ops: shapes, workspaces, and the models that need them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.graph import capture, custom_ops, run_graph

T, B, C, H = 5, 3, 4, 6
OPS = torch.ops.partita


def forward_arguments(length: int, num_inputs: int, hidden: int, *, train: bool = True) -> tuple[Any, ...]:
    weights = [torch.randn(4 * hidden, num_inputs), torch.randn(4 * hidden, hidden), *torch.randn(2, 4 * hidden)]
    states = torch.randn(2, B, hidden)
    inputs = torch.randn(length, B, num_inputs)
    return (inputs, *weights, *states, False, [], 2, hidden, 1, True, False, True, train)


def backward_arguments(forward: tuple[Any, ...], results: Any) -> tuple[Any, ...]:
    output, hy, cy, workspace = results
    hidden = forward[10]
    gradients = (torch.randn_like(output), None, torch.randn_like(cy))
    return (*forward[:7], output, hy, cy, *gradients, False, 2, hidden, 1, True, True, False, [], True, workspace)


def shapes(op: Any, arguments: tuple[Any, ...], *, fake: bool) -> list[tuple[Any, ...]]:
    if not fake:
        return [(tuple(item.shape), item.stride(), item.dtype) for item in op(*arguments)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(item) if isinstance(item, torch.Tensor) else item for item in arguments]
        return [(tuple(item.shape), item.stride(), item.dtype) for item in op(*fakes)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("extents", [(T, C, H), (1, 1, 1), (2, 9, 3)])
def test_shape_kernels_tell_what_the_kernels_return(extents: tuple[int, int, int], train: bool) -> None:
    arguments = forward_arguments(*extents, train=train)
    with torch.no_grad():
        assert shapes(OPS.lstm_layer, arguments, fake=True) == shapes(OPS.lstm_layer, arguments, fake=False)
        if train:
            back = backward_arguments(arguments, OPS.lstm_layer(*arguments))
            told, real = (shapes(OPS.lstm_layer_backward, back, fake=fake) for fake in (True, False))
            assert told == real


def test_gradients_are_those_of_autograd() -> None:
    arguments = forward_arguments(T, C, H)
    leaves = [item.requires_grad_() for item in arguments[:7]]
    output, _, cy, _ = torch.ops.aten.mkldnn_rnn_layer.default(*arguments)
    with torch.no_grad():
        plain = [item.detach() if isinstance(item, torch.Tensor) else item for item in arguments]
        back = backward_arguments(tuple(plain), OPS.lstm_layer(*plain))
        got = OPS.lstm_layer_backward(*back)
    expected = torch.autograd.grad([output, cy], leaves, [back[10], back[12]])
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("extents", [(32, 64, 128), (64, 256, 128), (50, 128, 256)])
def test_the_workspace_is_counted_as_nearly_what_it_takes(extents: tuple[int, int, int]) -> None:
    with torch.no_grad():
        *_, workspace = OPS.lstm_layer(*forward_arguments(*extents))
    assert workspace.nbytes < workspace.untyped_storage().nbytes() < 1.15 * workspace.nbytes


def test_a_copied_workspace_is_refused() -> None:
    with torch.no_grad():
        arguments = forward_arguments(T, C, H)
        output, hy, cy, workspace = OPS.lstm_layer(*arguments)
        with pytest.raises(RuntimeError, match="must be that of its forward pass"):
            OPS.lstm_layer_backward(*backward_arguments(arguments, (output, hy, cy, workspace.clone())))
        made = custom_ops.with_real_buffers(
            OPS.lstm_layer_backward.default, backward_arguments(arguments, (output, hy, cy, workspace.clone()))
        )
        assert len(OPS.lstm_layer_backward(*made)) == 7


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body = nn.LSTM(C, H, **options)
        width = options.get("proj_size", H) or H
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, (last, _) = self.body(x)
        result: torch.Tensor = self.head(output.mean(1 if self.body.batch_first else 0)) + last.mean()
        return result


VARIANTS: dict[str, dict[str, Any]] = {
    "time first": {},
    "batch first": {"batch_first": True},
    "deep, both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "projected": {"proj_size": 2, "batch_first": True},
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", VARIANTS)
def test_lstms_are_captured_with_their_gradients(name: str) -> None:
    torch.manual_seed(0)
    model, batch = Net(**VARIANTS[name]), torch.randn(B, T, C)

    def loss_fn(net: Any, x: Any) -> torch.Tensor:
        loss: torch.Tensor = net(x).square().mean()
        return loss

    graph = capture(model, loss_fn, batch)
    has_layer = any(node.target is OPS.lstm_layer.default for node in graph.module.graph.nodes)
    assert has_layer == (name != "projected")  # oneDNN has no layer with a projection
    result, gradients, _ = run_graph(graph, dict(model.named_parameters()), {}, batch)
    loss = loss_fn(model, batch)
    loss.backward()
    torch.testing.assert_close(result, loss.detach())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad)
