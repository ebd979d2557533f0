"""Rules of convolutions and poolings that are cut in space: neighbours need rows of each other.

The geometry is that of `partita.sharding.stencils`. Forward, the image comes in windows with its padding written out,
so that every worker runs the plain op without padding along the cut dim. Backward is the transpose: a worker adds to
the rows of its window, and the halos are added to their owners' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from partita.sharding.calls import OpCall
from partita.sharding.rules import PARTIAL, REPLICATE, Ignored, InputSpec, OutputSpec, Part, Rule, Shape
from partita.sharding.stencils import Stencil

aten = torch.ops.aten


def spread_list(given: Any, num_dims: int, default: int = 0) -> list[int]:
    """An argument that has one number per spatial dim, or one for all, or none.

    Example:
        >>> spread_list([2], 3)
        [2, 2, 2]
    """
    items = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not items:
        return [default] * num_dims
    return [int(item) for item in (items * num_dims if len(items) == 1 else items)]


def _without_padding(*positions: int, spatial: int, num_dims: int) -> Callable[..., Any]:
    """A rewrite that sets the entry of dim ``spatial`` to 0 in the lists at ``positions``."""

    def rewrite(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        return call.target, _with_zeros(call.args, positions, spatial, num_dims), call.kwargs

    return rewrite


def _with_zeros(args: tuple[Any, ...], positions: Sequence[int], spatial: int, num_dims: int) -> tuple[Any, ...]:
    new = list(args)
    for position in positions:
        if position < len(new):
            numbers = spread_list(new[position], num_dims)
            numbers[spatial] = 0
            new[position] = numbers
    return tuple(new)


# Convolutions


def convolution_stencils(
    image: Shape, result: Shape, weight: Shape, args: Sequence[Any]
) -> Iterator[tuple[int, Stencil]]:
    """``(number of the spatial dim, stencil)``; ``args`` are ``stride, padding, dilation`` of `aten.convolution`."""
    num_dims = len(image) - 2
    stride, padding, dilation = (spread_list(item, num_dims, d) for item, d in zip(args, (1, 0, 1), strict=True))
    for index in range(num_dims):
        dim = index + 2
        geometry = (image[dim], result[dim], weight[dim], stride[index], dilation[index], padding[index])
        if image[dim] > 1 and result[dim] > 1:
            yield index, Stencil(dim, *geometry)


def spatial_convolution_rules(call: OpCall) -> list[Rule]:
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``, batched."""
    source, weight, output = call.inputs[0].shape, call.inputs[1].shape, call.outputs[0]
    assert output is not None
    num_dims = len(source) - 2
    if len(weight) != len(source) or len(output.shape) != len(source):
        return []
    bias = (REPLICATE,) * (len(call.inputs) - 2)
    inputs: tuple[InputSpec, ...]
    image, result = (output.shape, source) if call.args[6] else (source, output.shape)
    rules = []
    for index, stencil in convolution_stencils(image, result, weight, call.args[3:6]):
        if call.args[6]:
            inputs = (stencil.owned_result(), REPLICATE, *bias)
            local = _TransposedConvolution(stencil, index).forward
            rules.append(Rule(inputs, (stencil.touched_image(),), stencil.num_blocks, local=local))
        else:
            rewrite = _without_padding(4, spatial=index, num_dims=num_dims)
            inputs = (stencil.read_image(), REPLICATE, *bias)
            rules.append(Rule(inputs, (stencil.owned_result(),), stencil.num_blocks, rewrite))
    return rules


def spatial_convolution_backward_rules(call: OpCall) -> list[Rule]:
    """``(grad, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask)``."""
    grad, source, weight = (spec.shape for spec in call.inputs[:3])
    num_dims = len(source) - 2
    if num_dims < 1 or len(weight) != len(source) or len(grad) != len(source):
        return []
    image, result = (grad, source) if call.args[7] else (source, grad)
    rules = []
    for index, stencil in convolution_stencils(image, result, weight, call.args[4:7]):
        outputs: list[OutputSpec] = [None if spec is None else PARTIAL for spec in call.outputs]
        if call.args[7]:
            if outputs[0] is not None:
                outputs[0] = stencil.owned_result()
            inputs = (stencil.touched_image(), stencil.owned_result(), REPLICATE)
            local = _TransposedConvolution(stencil, index).backward
            rules.append(Rule(inputs, tuple(outputs), stencil.num_blocks, local=local))
        else:
            if outputs[0] is not None:
                outputs[0] = stencil.read_image()
            rewrite = _without_padding(5, spatial=index, num_dims=num_dims)
            given = (stencil.owned_result(), stencil.read_image(), REPLICATE)
            rules.append(Rule(given, tuple(outputs), stencil.num_blocks, rewrite))
    return rules


class _TransposedConvolution:
    """Local forms of a transposed convolution: rows ``a .. b`` of its input touch a window of its output."""

    def __init__(self, stencil: Stencil, spatial: int) -> None:
        self.stencil, self.spatial = stencil, spatial

    def forward(self, call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        source, weight, *bias = tensors
        args = _with_zeros(call.args, (4, 7), self.spatial, source.dim() - 2)
        bare = aten.convolution.default(source, weight, None, *args[3:])
        start, first, last, end = self._window(part)
        result = self._padded(bare, first - start, end - last)
        if not bias:
            return (result,)
        # Windows overlap and are summed: the bias is added on the own rows only.
        own, own_end = self._owned(part)
        shape = list(result.shape)
        shape[self.stencil.dim] = own_end - own
        rows = bias[0].view([1, -1] + [1] * (source.dim() - 2)).expand(shape)
        return (result + self._padded(rows, own - start, end - own_end),)

    def backward(self, call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        grad, source, weight = tensors
        start, first, last, _ = self._window(part)
        args = _with_zeros(call.args, (5, 8), self.spatial, source.dim() - 2)
        mask = [bool(item) for item in call.args[10]]
        read = grad.narrow(self.stencil.dim, first - start, last - first)
        grads = aten.convolution_backward.default(read, source, weight, None, *args[4:10], [*mask[:2], False])
        first_own, end_own = self._owned(part)
        own = grad.narrow(self.stencil.dim, first_own - start, end_own - first_own)
        grad_bias = own.sum([dim for dim in range(grad.dim()) if dim != 1]) if mask[2] else None
        return grads[0], grads[1], grad_bias

    def _owned(self, part: Part) -> tuple[int, int]:
        bounds = self.stencil.image_bounds
        return bounds[part.start], bounds[part.end]

    def _window(self, part: Part) -> tuple[int, int, int, int]:
        """Start of the window, start and end of what the own input rows touch, end of the window."""
        reach, bounds = self.stencil.touched_image(), self.stencil.result_bounds
        rows, rows_end = bounds[part.start], bounds[part.end]
        first, last = self.stencil.first_read(rows), self.stencil.end_read(rows_end)
        return reach.starts[part.start], first, last, reach.ends[part.end]

    def _padded(self, value: torch.Tensor, before: int, after: int) -> torch.Tensor:
        pads = [0, 0] * (value.dim() - 1 - self.stencil.dim) + [before, after]
        result: torch.Tensor = aten.constant_pad_nd.default(value, pads, 0.0)
        return result


# Poolings


def pooling_stencils(
    image: Shape, result: Shape, num_dims: int, kernel: Any, stride: Any, padding: Any, dilation: Any = 1
) -> Iterator[tuple[int, Stencil]]:
    """``(number of the spatial dim, stencil)`` of a pooling over the last ``num_dims`` dims."""
    sizes = spread_list(kernel, num_dims)
    steps = spread_list(stride, num_dims) if stride not in (None, [], ()) else sizes
    pads, dilations = spread_list(padding, num_dims), spread_list(dilation, num_dims, 1)
    for index in range(num_dims):
        dim = len(image) - num_dims + index
        if image[dim] > 1 and result[dim] > 1:
            numbers = (sizes[index], steps[index], dilations[index], pads[index])
            yield index, Stencil(dim, image[dim], result[dim], *numbers)


def _num_dims(call: OpCall) -> int:
    return next(int(digit) for digit in "123" if f"{digit}d" in call.base_name)


def spatial_average_rules(call: OpCall) -> list[Rule]:
    """``avg_pool(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)`` and its backward,
    ``(grad, input, ...)``.

    Padding written out as zeros is counted by the local op: only right where it is to be counted.
    """
    backward = call.base_name.endswith("_backward")
    num_dims, output = _num_dims(call), call.outputs[0]
    assert output is not None
    image, result = (output.shape, call.inputs[0].shape) if backward else (call.inputs[0].shape, output.shape)
    first = 2 if backward else 1  # the place of the kernel
    kernel, stride, padding = (call.argument(first + place, "") for place in range(3))
    counts_padding = call.argument(first + 4, "count_include_pad", True)
    divisor = call.argument(first + 5, "divisor_override")
    rules = []
    for index, stencil in pooling_stencils(image, result, num_dims, kernel, stride, padding):
        beyond = stencil.end_read(stencil.result) > stencil.image + stencil.padding  # of `ceil_mode`: never counted
        if divisor is None and (beyond or (stencil.padding and not counts_padding)):
            continue
        rewrite = _without_padding(first + 2, spatial=index, num_dims=num_dims)
        if backward:
            form = _average_backward(stencil, index, num_dims)
            inputs = (stencil.owned_result(), Ignored(stencil.read_image()))
            rules.append(Rule(inputs, (stencil.read_image(),), stencil.num_blocks, local=form))
        else:
            rules.append(Rule((stencil.read_image(),), (stencil.owned_result(),), stencil.num_blocks, rewrite))
    return rules


def _average_backward(stencil: Stencil, spatial: int, num_dims: int) -> Any:
    """The backward reads of its image nothing but the shape."""

    def local(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        grad = tensors[0]
        args = _with_zeros(call.args, (4,), spatial, num_dims)
        window = grad.new_zeros(part.output_shapes[0])
        return (call.target(grad, window, *args[2:], **call.kwargs),)

    return local


def spatial_maximum_rules(call: OpCall) -> list[Rule]:
    """``max_pool_with_indices(input, kernel, stride, padding, dilation, ceil_mode) -> (output, indices)`` and its
    backward, ``(grad, input, ..., indices)``; indices count the places of the whole image.

    Padding is -infinity. It is never the maximum, unless all entries are: then the first real entry is named, as the op
    does, which is told here for windows without dilation only.
    """
    backward = call.base_name.endswith("_backward")
    num_dims, output = _num_dims(call), call.outputs[0]
    assert output is not None
    image, result = (output.shape, call.inputs[0].shape) if backward else (call.inputs[0].shape, output.shape)
    first = 2 if backward else 1
    options = [call.argument(first + place, "", 1 if place == 3 else None) for place in range(4)]
    rules = []
    for index, stencil in pooling_stencils(image, result, num_dims, *options):
        if (stencil.padding and stencil.dilation > 1) or not call.inputs[0].dtype.is_floating_point:
            continue
        form = _Maximum(stencil, index, num_dims, image)
        own = stencil.owned_result()
        if backward:
            inputs = (own, Ignored(stencil.read_image()), own)
            rules.append(Rule(inputs, (stencil.read_image(),), stencil.num_blocks, local=form.backward))
        else:
            read = stencil.read_image(float("-inf"))
            rules.append(Rule((read,), (own, own), stencil.num_blocks, local=form.forward))
    return rules


class _Maximum:
    """Local forms of a max pooling. An index counts the entries of a plane: ``(outer * extent + row) * inner + rest``
    with ``row`` along the cut dim; the window's rows are those of the image from its start on."""

    def __init__(self, stencil: Stencil, spatial: int, num_dims: int, image: Shape) -> None:
        self.stencil, self.spatial, self.num_dims = stencil, spatial, num_dims
        self.inner = 1
        for extent in image[stencil.dim + 1 :]:
            self.inner *= extent
        self.reach = stencil.read_image()

    def forward(self, call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        args = _with_zeros(call.args, (3,), self.spatial, self.num_dims)
        values, indices = call.target(tensors[0], *args[1:], **call.kwargs)
        return values, self._moved(indices, tensors[0].shape[self.stencil.dim], self._start(part), self.stencil.image)

    def backward(self, call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        grad, _, indices = tensors
        args = _with_zeros(call.args, (4,), self.spatial, self.num_dims)
        shape = part.output_shapes[0]
        assert shape is not None
        moved = self._moved(indices, self.stencil.image, -self._start(part), shape[self.stencil.dim])
        return (call.target(grad, grad.new_zeros(shape), *args[2:-1], moved, **call.kwargs),)

    def _start(self, part: Part) -> int:
        return self.reach.starts[part.start]

    def _moved(self, indices: torch.Tensor, extent: int, shift: int, new_extent: int) -> torch.Tensor:
        """Indices into planes with ``extent`` rows as indices into planes with ``new_extent``, rows moved."""
        lines = indices // self.inner
        rows = (lines % extent + shift).clamp(0, new_extent - 1)
        return ((lines // extent) * new_extent + rows) * self.inner + indices % self.inner


__all__ = ["spatial_average_rules", "spatial_convolution_backward_rules", "spatial_convolution_rules",
           "spatial_maximum_rules"]  # fmt: skip
