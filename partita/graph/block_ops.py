"""Block-sparse linear layers as ops: the product with a weight of which only some blocks are there, and its gradients.

The weight W of a layer with I inputs and O outputs is cut into blocks of (bo, bi) entries; every output block o has the
same number K of them, and ``index[o, j]`` says which input block the j-th of these reads. With x_i and y_o the columns
of the inputs and outputs that block i and o cover, and W_oj (bo, bi):

    y_o    = bias_o + sum over j of x_index[o, j] W_oj'
    grad x_i  = sum over all (o, j) with index[o, j] = i of grad y_o W_oj
    grad W_oj = grad y_o' x_index[o, j]

(The layout is that of sparse attention and layers in Gray, Radford and Kingma, "GPU kernels for block-sparse weights",
2017, with the fan-in of blocks fixed.) Shapes: B rows; x [B, I]; weight [O / bo, K, bo, bi]; index [O / bo, K], of type
int64; bias [O]. An input block that an output block reads twice counts twice. Values of `index` are read when the op
runs, so they may change between two runs of one captured graph.

On the CPU, every block is one product of views of x and y, with nothing gathered and nothing scattered: the library is
told the strides (measured on a Zen 3 core: 1.3 to 2.2 times as fast as gathering from blocks of 32 and 128 rows on).
Elsewhere each call costs more than copies do: there inputs are gathered, and one batched product is formed.
In segments that are compiled for the CPU all is C++ (`partita.runtime.block_products`); `code` tells apart what the
compiler has made of an op by different versions of partita.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("partita::block_linear", mutates_args=())
def block_linear(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, code: str = "") -> Tensor:
    """y [B, O] of x [B, I].

    Raises:
        RuntimeError: shapes do not fit.
        IndexError: the index names an input block that is not there.

    Example:
        >>> x, weight = torch.randn(5, 6), torch.randn(2, 1, 4, 3)  # of 2 x 2 blocks, 2 are there
        >>> block_linear(x, weight, torch.tensor([[1], [0]]), None).shape
        torch.Size([5, 8])
    """
    num_blocks, _, height, width = weight.shape
    _check_index(index, x.shape[1] // width)
    if x.device.type != "cpu":
        products = torch.einsum("bokw,okhw->boh", _gathered(x, index, width), weight).flatten(1)
        return products if bias is None else products + bias
    y = x.new_empty(x.shape[0], num_blocks * height)
    inputs, outputs, matrices = x.split(width, 1), y.split(height, 1), weight.mT.flatten(0, 1).unbind()
    biases = None if bias is None else bias.split(height)
    written: set[int] = set()
    for slot, output, source in _slots(index):
        if output in written:
            outputs[output].addmm_(inputs[source], matrices[slot])
        elif biases is None:
            torch.mm(inputs[source], matrices[slot], out=outputs[output])
        else:
            torch.addmm(biases[output], inputs[source], matrices[slot], out=outputs[output])
        written.add(output)
    return y


@torch.library.custom_op("partita::block_linear_input", mutates_args=())
def block_linear_input(grad: Tensor, weight: Tensor, index: Tensor, in_features: int, code: str = "") -> Tensor:
    """The gradient of the inputs, [B, in_features], from that of the outputs, [B, O]."""
    num_blocks, _, height, width = weight.shape
    _check_index(index, in_features // width)
    if grad.device.type != "cpu":
        parts = torch.einsum("boh,okhw->okbw", grad.unflatten(1, (num_blocks, height)), weight).flatten(0, 1)
        sums = grad.new_zeros(in_features // width, grad.shape[0], width).index_add_(0, index.flatten(), parts)
        return sums.transpose(0, 1).flatten(1).contiguous()
    result = grad.new_empty(grad.shape[0], in_features)
    outputs, inputs, matrices = grad.split(height, 1), result.split(width, 1), weight.flatten(0, 1).unbind()
    written: set[int] = set()
    for slot, output, source in _slots(index):
        if source in written:
            inputs[source].addmm_(outputs[output], matrices[slot])
        else:
            torch.mm(outputs[output], matrices[slot], out=inputs[source])
        written.add(source)
    for source in set(range(len(inputs))) - written:
        inputs[source].zero_()
    return result


@torch.library.custom_op("partita::block_linear_weight", mutates_args=())
def block_linear_weight(grad: Tensor, x: Tensor, index: Tensor, width: int, code: str = "") -> Tensor:
    """The gradient of the weight, [O / bo, K, bo, width], from that of the outputs, [B, O], and the inputs, [B, I]."""
    num_blocks, num_inputs = index.shape
    height = grad.shape[1] // num_blocks
    _check_index(index, x.shape[1] // width)
    if grad.device.type != "cpu":
        gathered = _gathered(x, index, width)
        return torch.einsum("boh,bokw->okhw", grad.unflatten(1, (num_blocks, height)), gathered).contiguous()
    result = grad.new_empty(num_blocks, num_inputs, height, width)
    outputs, inputs, matrices = grad.mT.split(height, 0), x.split(width, 1), result.flatten(0, 1).unbind()
    for slot, output, source in _slots(index):
        torch.mm(outputs[output], inputs[source], out=matrices[slot])
    return result


def _slots(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """(number of the block among those that are there, its output block, its input block)"""
    slot = 0
    for output, sources in enumerate(index.tolist()):
        for source in sources:
            yield slot, output, source
            slot += 1


def _gathered(x: Tensor, index: Tensor, width: int) -> Tensor:
    """[B, O / bo, K, width]: of every block the inputs that it reads."""
    gathered: Tensor = x.unflatten(1, (x.shape[1] // width, width))[:, index]
    return gathered


def _check_index(index: Tensor, num_inputs: int) -> None:
    if index.device.type == "cpu" and index.numel() and not (int(index.min()) >= 0 and int(index.max()) < num_inputs):
        raise IndexError(
            f"every entry of a block-sparse layer's index must name one of its {num_inputs} input blocks, 0 to "
            f"{num_inputs - 1}, but they lie between {int(index.min())} and {int(index.max())}"
        )


# Shapes, gradients, FLOPs --------------------------------------------------------------------------------------------


def _check_shapes(num_columns: int, block: int, name: str) -> None:
    if num_columns % block:
        raise RuntimeError(f"the {num_columns} {name} of a block-sparse layer must be whole blocks of {block}")


@block_linear.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, code: str = "") -> Tensor:
    num_blocks, num_inputs, height, width = weight.shape
    _check_shapes(x.shape[1], width, "inputs")
    if tuple(index.shape) != (num_blocks, num_inputs) or (bias is not None and bias.shape[0] != num_blocks * height):
        raise RuntimeError(f"index {tuple(index.shape)} and bias must fit the weight {tuple(weight.shape)}")
    return x.new_empty(x.shape[0], num_blocks * height)


@block_linear_input.register_fake
def _(grad: Tensor, weight: Tensor, index: Tensor, in_features: int, code: str = "") -> Tensor:
    num_blocks, num_inputs, height, width = weight.shape
    _check_shapes(in_features, width, "inputs")
    if tuple(index.shape) != (num_blocks, num_inputs) or grad.shape[1] != num_blocks * height:
        raise RuntimeError(f"index {tuple(index.shape)} and gradient must fit the weight {tuple(weight.shape)}")
    return grad.new_empty(grad.shape[0], in_features)


@block_linear_weight.register_fake
def _(grad: Tensor, x: Tensor, index: Tensor, width: int, code: str = "") -> Tensor:
    num_blocks, num_inputs = index.shape
    _check_shapes(x.shape[1], width, "inputs")
    _check_shapes(grad.shape[1], num_blocks, "outputs")
    if grad.shape[0] != x.shape[0]:
        raise RuntimeError(f"the gradient {tuple(grad.shape)} must have the rows of the inputs {tuple(x.shape)}")
    return grad.new_empty(num_blocks, num_inputs, grad.shape[1] // num_blocks, width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, index = inputs[:3]
    ctx.save_for_backward(x, weight, index)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index = ctx.saved_tensors
    needs_x, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    grad_x = block_linear_input(grad, weight, index, x.shape[1]) if needs_x else None
    grad_weight = block_linear_weight(grad, x, index, weight.shape[3]) if needs_weight else None
    return grad_x, grad_weight, None, grad.sum(0) if needs_bias else None, None


block_linear.register_autograd(_gradients, setup_context=_keep)
OPS = tuple(op._opoverload for op in (block_linear, block_linear_input, block_linear_weight))


def block_layer(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., O] of x [..., I]; under autocast in its type, as `torch.nn.functional.linear` does."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = block_linear(x.reshape(-1, x.shape[-1]), weight, index, bias)
    return y.view(*x.shape[:-1], y.shape[1])


def num_input_blocks(target: Any, args: Sequence[Any]) -> int:
    """How many input blocks a layer has, from the arguments of one of `OPS` (tensors, fake ones too): the bound of
    `index`."""
    if target is OPS[0]:
        return int(args[0].shape[1]) // int(args[1].shape[3])
    return int(args[3]) // int(args[1].shape[3]) if target is OPS[1] else int(args[1].shape[1]) // int(args[3])


@register_flop_formula([torch.ops.partita.block_linear, torch.ops.partita.block_linear_input])
def _(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    num_blocks, num_inputs, height, width = weight_shape
    return int(2 * x_shape[0] * num_blocks * num_inputs * height * width)


@register_flop_formula(torch.ops.partita.block_linear_weight)
def _(grad_shape: Any, x_shape: Any, index_shape: Any, width: int, *args: Any, **kwargs: Any) -> int:
    return int(2 * grad_shape[0] * grad_shape[1] * index_shape[1] * width)
