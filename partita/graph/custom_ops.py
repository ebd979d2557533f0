"""Ops of partita's own: in a captured graph for ATen ops whose shape kernels are wrong, in compiled code for products.

`aten._grouped_mm` (products of row groups with a matrix each, in mixture-of-experts layers) runs in float32 on the CPU,
but its shape kernel in torch 2.13 refuses every dtype but bfloat16. `partita::grouped_mm` is the same op with a shape
kernel for all dtypes; it goes when the upstream kernel accepts float32.

`aten.mkldnn_rnn_layer`, oneDNN's LSTM layer, is several times faster than the ops it consists of. Its shape kernel
takes the sequence's length for the batch where ``batch_first`` is set (the kernel always gets time first), and knows
nothing of the workspace that the forward pass hands to the backward pass. See `lstm_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Tensors4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Tensors7 = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]  # fmt: skip


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


@torch.library.custom_op("partita::inline_product", mutates_args=())
def inline_product(left: torch.Tensor, right: torch.Tensor, by_rows: bool = False, code: str = "") -> torch.Tensor:
    """``left @ right`` of float32 matrices (..., M, K) and (..., K, N), same dims before them; compiled code forms it
    in place. The result is contiguous, or with `by_rows` lies in memory as (B, M, H, N) if its shape is (B, H, M, N).
    `code` tells apart what the compiler has made of it by different versions of partita."""
    result = left @ right
    return result.transpose(1, 2).contiguous().transpose(1, 2) if by_rows else result.contiguous()


@inline_product.register_fake
def _(left: torch.Tensor, right: torch.Tensor, by_rows: bool = False, code: str = "") -> torch.Tensor:
    shape = [*left.shape[:-1], right.shape[-1]]
    if not by_rows:
        return left.new_empty(shape)
    return left.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


@torch.library.custom_op("partita::lstm_layer", mutates_args=())
def lstm_layer(
    input: torch.Tensor, weight0: torch.Tensor, weight1: torch.Tensor, weight2: torch.Tensor, weight3: torch.Tensor,
    hx: torch.Tensor, cx: torch.Tensor, reverse: bool, batch_sizes: list[int], mode: int, hidden_size: int,
    num_layers: int, has_biases: bool, bidirectional: bool, batch_first: bool, train: bool,
) -> Tensors4:  # fmt: skip
    """One direction of one LSTM layer over ``input`` (T, B, C): output (T, B, H), last states (B, H) and workspace.

    The workspace is a view (B, bytes) of the head of oneDNN's buffer, so that the batch is a dim of it as of all other
    results: whoever counts memory or cuts the batch sees the right sizes. The backward pass finds the buffer through
    the view's storage; a copy of the view is not a workspace and is refused.
    """
    with torch.enable_grad():  # without, the kernel leaves the workspace out
        output, hy, cy, buffer = torch.ops.aten.mkldnn_rnn_layer.default(
            input, weight0, weight1, weight2, weight3, hx, cx, reverse, batch_sizes, mode, hidden_size, num_layers,
            has_biases, bidirectional, batch_first, train,
        )  # fmt: skip
    num_rows, num_bytes = input.shape[1], _workspace_bytes(input, hidden_size) if train else 0
    if num_bytes == 0:
        return output, hy, cy, input.new_empty((num_rows, 0), dtype=torch.uint8)
    return output, hy, cy, buffer[: num_rows * num_bytes].view(num_rows, num_bytes)


@lstm_layer.register_fake
def _(input: torch.Tensor, *arguments: Any) -> Tensors4:
    hx, cx, hidden_size, train = arguments[4], arguments[5], arguments[9], arguments[14]
    length, num_rows, _ = input.shape
    num_bytes = _workspace_bytes(input, hidden_size) if train else 0
    output = input.new_empty(length, num_rows, hidden_size)
    return output, torch.empty_like(hx), torch.empty_like(cx), input.new_empty(num_rows, num_bytes, dtype=torch.uint8)


def _workspace_bytes(input: torch.Tensor, hidden_size: int) -> int:
    """Bytes of the workspace for one row of the batch: four gates, states and their gradients for each time step.

    Fitted to oneDNN's buffers from below: they are up to 7 % larger, by one more time step and by padding.
    """
    return 4 * input.shape[0] * (9 * hidden_size + 6 * max(input.shape[2], hidden_size))


@torch.library.custom_op("partita::lstm_layer_backward", mutates_args=())
def lstm_layer_backward(
    input: torch.Tensor, weight1: torch.Tensor, weight2: torch.Tensor, weight3: torch.Tensor, weight4: torch.Tensor,
    hx: torch.Tensor, cx: torch.Tensor, output: torch.Tensor, hy: torch.Tensor, cy: torch.Tensor,
    grad_output: torch.Tensor | None, grad_hy: torch.Tensor | None, grad_cy: torch.Tensor | None, reverse: bool,
    mode: int, hidden_size: int, num_layers: int, has_biases: bool, train: bool, bidirectional: bool,
    batch_sizes: list[int], batch_first: bool, workspace: torch.Tensor,
) -> Tensors7:  # fmt: skip
    """Gradients of `lstm_layer`: of the input, of both weights and both biases, and of the first states."""
    storage = workspace.untyped_storage()
    if storage.nbytes() <= workspace.numel():
        raise RuntimeError("the workspace of an LSTM layer must be that of its forward pass, but is a copy of it")
    buffer = workspace.new_empty(0).set_(storage)
    results = torch.ops.aten.mkldnn_rnn_layer_backward.default(
        input, weight1, weight2, weight3, weight4, hx, cx, output, hy, cy, grad_output, grad_hy, grad_cy, reverse, mode,
        hidden_size, num_layers, has_biases, train, bidirectional, batch_sizes, batch_first, buffer,
    )  # fmt: skip
    # Both biases have the same gradient, which the kernel returns twice as one tensor; an op may not.
    return (*results[:3], results[3].clone(), *results[4:])


@lstm_layer_backward.register_fake
def _(input: torch.Tensor, *arguments: Any) -> Tensors7:
    weight_in, weight_hidden, hx, cx, hidden_size = *arguments[:2], arguments[4], arguments[5], arguments[14]
    like = (input, weight_in, weight_hidden, None, None, hx, cx)
    bias = input.new_empty(4 * hidden_size, dtype=torch.float), input.new_empty(4 * hidden_size, dtype=torch.float)
    made = [None if item is None else item.new_empty(item.shape, dtype=torch.float) for item in like]
    made[3], made[4] = bias
    return tuple(made)  # type: ignore[return-value]


@register_flop_formula(torch.ops.partita.lstm_layer)
def _(input_shape: Any, weight_in: Any, weight_hidden: Any, *args: Any, **kwargs: Any) -> int:
    """Two products with four gates for every row and time step."""
    return int(2 * input_shape[0] * input_shape[1] * weight_in[0] * (weight_in[1] + weight_hidden[1]))


@register_flop_formula(torch.ops.partita.lstm_layer_backward)
def _(input_shape: Any, weight_in: Any, weight_hidden: Any, *args: Any, **kwargs: Any) -> int:
    """The gradients of both factors of every product."""
    return int(4 * input_shape[0] * input_shape[1] * weight_in[0] * (weight_in[1] + weight_hidden[1]))


_REPLACED = {
    torch.ops.aten._grouped_mm.default: torch.ops.partita.grouped_mm.default,
    torch.ops.aten.mkldnn_rnn_layer.default: torch.ops.partita.lstm_layer.default,
    torch.ops.aten.mkldnn_rnn_layer_backward.default: torch.ops.partita.lstm_layer_backward.default,
}


def replacement(func: Any) -> Any:
    """The op to record instead of `func`: itself, or its stand-in."""
    return _REPLACED.get(func, func)


def is_opaque(target: Any, index: int) -> bool:
    """Whether result ``index`` of an op is a buffer that only its backward op can read: it cannot be cut, joined,
    copied or sent."""
    return target is torch.ops.partita.lstm_layer.default and index == 3


def with_real_buffers(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Made-up arguments of an op, in which buffers that only another op can make are made by it."""
    if target is torch.ops.partita.lstm_layer_backward.default:
        reverse, mode, hidden_size, num_layers, has_biases, train, bidirectional, batch_sizes, batch_first = args[13:22]
        forward = torch.ops.partita.lstm_layer.default(
            *args[:7], reverse, batch_sizes, mode, hidden_size, num_layers, has_biases, bidirectional, batch_first,
            train,
        )  # fmt: skip
        return (*args[:22], forward[3])
    return args
