"""Rules of ops on images: convolutions, poolings, padding, resampling. Those that are cut in space are in
`partita.sharding.rules_stencils`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from partita.sharding.calls import OpCall
from partita.sharding.rules import PARTIAL, REPLICATE, Cut, InputSpec, OutputSpec, Rule, Shape, register
from partita.sharding.rules_stencils import (
    spatial_average_rules,
    spatial_convolution_backward_rules,
    spatial_convolution_rules,
    spatial_maximum_rules,
)


@register("convolution")
def convolution_rules(call: OpCall) -> list[Rule]:
    """``(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``: samples, channels of
    the output, channels of the input (a sum), groups, space. Linear in input and bias, and in weight and bias."""
    source, weight, output = call.inputs[0].shape, call.inputs[1].shape, call.outputs[0]
    assert output is not None
    transposed, groups = call.args[6], call.args[8]
    num_bias = len(call.inputs) - 2
    if len(source) != len(output.shape) or len(source) < 3:
        return []  # a single sample
    whole, summand = (REPLICATE,) * num_bias, (PARTIAL,) * num_bias
    rules = [Rule((Cut(0), REPLICATE, *whole), (Cut(0),), source[0])]
    if groups == 1:
        into, out = (0, 1) if transposed else (1, 0)
        rules.append(Rule((REPLICATE, Cut(out), *(Cut(0),) * num_bias), (Cut(1),), output.shape[1]))
        rules.append(Rule((Cut(1), Cut(into), *summand), (PARTIAL,), source[1]))
    else:
        read, given, made = source[1] // groups, weight[0] // groups, output.shape[1] // groups
        inputs = (Cut(1, read), Cut(0, given), *(Cut(0, made),) * num_bias)
        rules.append(Rule(inputs, (Cut(1, made),), groups, _groups_at(8)))
    rules += spatial_convolution_rules(call)
    rules += [Rule((PARTIAL, REPLICATE, *summand), (PARTIAL,)), Rule((REPLICATE, PARTIAL, *summand), (PARTIAL,))]
    return [rule for rule in rules if rule.extent != 1]


def _groups_at(position: int) -> Any:
    """The argument at ``position`` counts the groups: their channels are cut with them."""

    def rewrite(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        whole, local = call.outputs[0], shapes[0]
        assert whole is not None and local is not None
        groups = call.args[position] * local[1] // whole.shape[1]
        return call.target, (*call.args[:position], groups, *call.args[position + 1 :]), call.kwargs

    return rewrite


@register("convolution_backward")
def convolution_backward_rules(call: OpCall) -> list[Rule]:
    """``(grad, input, weight, bias_sizes, ...) -> (grad_input, grad_weight, grad_bias)``: bilinear in the gradient and
    in what a gradient reads besides; samples, channels, space."""
    grad, source, _ = (spec.shape for spec in call.inputs)
    if len(grad) < 3 or len(grad) != len(source):
        return []
    transposed, groups = call.args[7], call.args[9]
    rules = [_gradients(call, (PARTIAL, REPLICATE, REPLICATE), (PARTIAL, PARTIAL, PARTIAL), 0)]
    rules.append(_gradients(call, (Cut(0), Cut(0), REPLICATE), (Cut(0), PARTIAL, PARTIAL), source[0]))
    if groups == 1:
        into, out = (0, 1) if transposed else (1, 0)
        made = (Cut(1), REPLICATE, Cut(out))
        rules.append(_gradients(call, made, (PARTIAL, Cut(out), Cut(0)), grad[1], _bias_sizes))
        rules.append(_gradients(call, (REPLICATE, Cut(1), Cut(into)), (Cut(1), Cut(into), REPLICATE), source[1]))
    rules += spatial_convolution_backward_rules(call)
    return [rule for rule in rules if rule.extent != 1]


def _gradients(
    call: OpCall,
    inputs: tuple[InputSpec, ...],
    outputs: tuple[OutputSpec, ...],
    extent: int,
    rewrite: Any = None,
) -> Rule:
    """A rule in which gradients that are not asked for have no placement."""
    given = tuple(None if spec is None else item for spec, item in zip(call.outputs, outputs, strict=True))
    return Rule(inputs, given, extent, rewrite)


def _bias_sizes(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """The bias has as many entries as there are channels: as many as the gradient of it has."""
    sizes = call.args[3] if shapes[2] is None else list(shapes[2])
    return call.target, (*call.args[:3], sizes, *call.args[4:]), call.kwargs


_PLANES = (
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "avg_pool2d_backward",
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "replication_pad2d_backward",
)  # fmt: skip


@register(*_PLANES)
def plane_rules(call: OpCall) -> list[Rule]:
    """Samples (if there are any) and channels are independent: each plane is treated for itself."""
    plane_rank = next(int(d) for d in "123" if f"{d}d" in call.base_name)
    specs = [*call.inputs, *[spec for spec in call.outputs if spec is not None]]
    rank = len(call.inputs[0].shape)
    leading = call.inputs[0].shape[: rank - plane_rank]
    if any(len(spec.shape) != rank or spec.shape[: rank - plane_rank] != leading for spec in specs):
        return []
    rules = [
        Rule((Cut(dim),) * len(call.inputs), (Cut(dim),) * len(call.outputs), extent)
        for dim, extent in enumerate(leading)
        if extent > 1
    ]
    if call.base_name.startswith("max_pool"):
        rules += spatial_maximum_rules(call)
    elif call.base_name.startswith("avg_pool"):
        rules += spatial_average_rules(call)
    return rules


@register("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "grid_sampler_2d")
def sample_rules(call: OpCall) -> list[Rule]:
    """Samples are independent if every tensor has them as dim 0 (that is: batched)."""
    specs = [*call.inputs, *[spec for spec in call.outputs if spec is not None]]
    samples = call.inputs[0].shape[0] if call.inputs[0].shape else 0
    if samples < 2 or any(len(spec.shape) != 4 or spec.shape[0] != samples for spec in specs):
        return []
    return [Rule((Cut(0),) * len(call.inputs), (Cut(0),) * len(call.outputs), samples)]


@register("adaptive_max_pool3d_backward", "fractional_max_pool3d_backward")
def dense_plane_rules(call: OpCall) -> list[Rule]:
    """Samples only: torch's kernels misread gradients that do not lie densely, as slices of other dims do not."""
    samples = call.inputs[0].shape[0]
    if any(len(spec.shape) != 5 or spec.shape[0] != samples for spec in call.inputs):
        return []
    return [Rule((Cut(0),) * len(call.inputs), (Cut(0),), samples)]


_UPSAMPLING = (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d",
    "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
)  # fmt: skip


@register(*_UPSAMPLING)
def upsampling_rules(call: OpCall) -> list[Rule]:
    """Samples and channels are independent."""
    shape = call.inputs[0].shape
    return [Rule((Cut(dim),), (Cut(dim),), shape[dim]) for dim in (0, 1) if shape[dim] > 1] + [
        Rule((PARTIAL,), (PARTIAL,))
    ]


@register(*[f"{name}_backward" for name in _UPSAMPLING])
def upsampling_backward_rules(call: OpCall) -> list[Rule]:
    """``(grad, output_size, input_size, ...)``: the third argument is the whole shape."""

    def rewrite(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        return call.target, (*call.args[:2], list(shapes[0] or ()), *call.args[3:]), call.kwargs

    shape = call.inputs[0].shape
    return [Rule((Cut(dim),), (Cut(dim),), shape[dim], rewrite) for dim in (0, 1) if shape[dim] > 1] + [
        Rule((PARTIAL,), (PARTIAL,))
    ]
