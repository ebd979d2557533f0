"""Convolutions of images that lie in memory as "channels last", in compiled segments, where that is faster here.

oneDNN works on blocks of channels: of images that lie channel by channel it reorders each, and the weights, in every
call; where all channels of a point lie together it need not. So the compiler turns the images of convolutions. But a
captured step says how PyTorch would have the inputs of the backward passes lie, and much of what it computes from them;
so they are turned back and forth. The graph is rewritten before it is compiled:

    images and weights go into convolutions, and gradients into their backward passes, as channels last; what is
    computed from them lies so as well; what leaves the segment lies as it did

What lies so already is not converted, and conversions of others are loops that the compiler fuses with their
neighbours. Whether all of that pays is measured: the backward passes of both kinds, in turns; images that are turned
are taken to move at the pace of memory. Results differ by rounding, as sums are formed in another order.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.cost.choices import Choices
from partita.cost.measure_ops import make_arguments, op_key, time_in_turns
from partita.cost.roofline import DEFAULT_CORE_BYTES_PER_S
from partita.cost.variants import is_clear, is_plain
from partita.units import fingerprint

_aten = torch.ops.aten
FORWARD, BACKWARD = _aten.convolution.default, _aten.convolution_backward.default
MEASURING_S = 0.5  # for the backward passes of a module; those that there is no time for go unheard
_NUM_IMAGES: Mapping[Any, int] = {FORWARD: 2, BACKWARD: 3}  # first arguments that lie in some layout
_COPYING: Mapping[Any, Any] = dict.fromkeys((_aten.view.default, _aten._unsafe_view.default), _aten.reshape.default)


def with_channels_last(module: fx.GraphModule, num_threads: int) -> fx.GraphModule:
    """The module, to be compiled for `num_threads` threads, with its convolutions in channels last; the module itself
    if it has none, or they are not faster so. What is not known yet is measured, for `MEASURING_S` or so."""
    turned = _turned(module) if torch.backends.mkldnn.is_available() else []
    rewritten = in_channels_last(module) if turned else None
    if rewritten is None or not CHOICES.of([_Rewritten(rewritten, turned)], num_threads):
        return module
    return rewritten


def convolutions(module: fx.GraphModule) -> list[fx.Node]:
    """The convolutions of images in float32 on the CPU, and their backward passes."""
    return [node for node in module.graph.nodes if _is_convolution(node)]


def in_channels_last(module: fx.GraphModule) -> fx.GraphModule | None:
    """The module with its convolutions of images in channels last; None if it cannot be rewritten."""
    try:
        return _Rewriting(module).run()
    except _NoWayError:
        return None


def _is_convolution(node: fx.Node) -> bool:
    values = _images(node) if node.target in _NUM_IMAGES else []
    return bool(values) and all(is_plain(value) and value.dim() == 4 for value in values)


def _images(node: fx.Node) -> list[Tensor]:
    """The images, weights and gradients of images that go into a convolution."""
    args = node.args[: _NUM_IMAGES[node.target]]
    return [arg.meta["val"] for arg in args if isinstance(arg, fx.Node) and "val" in arg.meta]


# Rewriting -----------------------------------------------------------------------------------------------------------


class _NoWayError(Exception):
    """Something in the graph keeps it from being rewritten."""


class _Rewriting:
    """Copies a graph op by op, and follows with tensors without values how everything lies."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module, self._graph = module, fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._converted: dict[tuple[fx.Node, torch.memory_format], fx.Node] = {}
        self._mode = FakeTensorMode()

    def run(self) -> fx.GraphModule:
        with self._mode, torch.no_grad():
            for node in self._module.graph.nodes:
                self._copies[node] = self._copied(node)
        self._graph.eliminate_dead_code()
        return fx.GraphModule(self._module, self._graph)

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op == "output":
            results: Any = node.args[0]
            leaving: fx.Node = self._graph.output(fx.map_arg(results, self._as_before))
            return leaving
        if node.op == "placeholder":
            copy = self._graph.node_copy(node)
            copy.meta = {**node.meta, "val": _without_values(node.meta.get("val"))}
            return copy
        if node.op != "call_function":
            raise _NoWayError
        taken = self._as_before if _reads_memory(node.target) else self._copies.__getitem__
        args, kwargs = fx.map_arg((node.args, node.kwargs), taken)
        if _is_convolution(node):
            num = _NUM_IMAGES[node.target]
            images: Any = args[:num]
            args = (*(self._as(image, torch.channels_last) for image in images), *args[num:])
        copy = self._call(node.target, args, kwargs)
        copy.meta = {**node.meta, "val": copy.meta["val"]}
        return copy

    def _call(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        values = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
        try:
            value = target(*values[0], **values[1])
        except Exception as error:  # no view of what lies otherwise now; or an op that wants more than shapes
            if target not in _COPYING:
                raise _NoWayError from error
            target = _COPYING[target]
            value = target(*values[0], **values[1])
        node = self._graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node

    def _as(self, node: fx.Node, layout: torch.memory_format) -> fx.Node:
        if node.meta["val"].is_contiguous(memory_format=layout):
            return node
        found = self._converted.get((node, layout))
        if found is None:
            found = self._call(_aten.clone.default, (node,), {"memory_format": layout})
            self._converted[node, layout] = found
        return found

    def _as_before(self, node: fx.Node) -> fx.Node:
        """What leaves the segment, as it was captured."""
        copy, old = self._copies[node], node.meta.get("val")
        if not isinstance(old, Tensor) or copy.meta["val"].stride() == old.stride():
            return copy
        strides = old.stride()
        order = sorted(range(old.dim()), key=lambda dim: -strides[dim])
        if tuple(strides[dim] for dim in order) != torch.empty([old.shape[dim] for dim in order]).stride():
            raise _NoWayError
        if order == sorted(order):
            return self._as(copy, torch.contiguous_format)
        dense = self._as(self._call(_aten.permute.default, (copy, order), {}), torch.contiguous_format)
        return self._call(_aten.permute.default, (dense, [order.index(dim) for dim in range(old.dim())]), {})


def _reads_memory(target: Any) -> bool:
    """Whether what an op computes may depend on how its inputs lie: `as_strided`, and whatever is not PyTorch's."""
    if target is operator.getitem:
        return False
    name = str(target)
    return not name.startswith("aten.") or "as_strided" in name


def _without_values(value: object) -> object:
    """The like of a tensor in the FakeTensorMode that is on."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


# Measuring -----------------------------------------------------------------------------------------------------------


class _Rewritten(NamedTuple):
    """A rewritten module, and the backward passes of the captured one whose images lay otherwise."""

    module: fx.GraphModule
    turned: list[fx.Node]


def _pays(rewritten: _Rewritten) -> bool:
    """Whether a rewritten module is faster, in this thread."""
    counts: dict[str, int] = {}
    nodes: dict[str, fx.Node] = {}
    for node in rewritten.turned:
        key = op_key(node, 1)
        nodes[key], counts[key] = node, counts.get(key, 0) + 1
    own_s, other_s = 0.0, _conversions_s(rewritten.module)
    end_s = time.perf_counter() + MEASURING_S
    for key in sorted(nodes, key=lambda key: -counts[key] * _work(nodes[key])):
        times_s = times_of(nodes[key])
        gradient, image, _ = _images(nodes[key])
        # Both would be turned back for it, and the image's gradient that comes out would be turned.
        own_s += counts[key] * (times_s[0] + _turning_s(gradient) + 2 * _turning_s(image))
        other_s += counts[key] * times_s[1]
        if time.perf_counter() > end_s:
            break
    return is_clear(own_s, other_s)


def _turned(module: fx.GraphModule) -> list[fx.Node]:
    """The backward passes whose gradients or images do not lie as channels last."""
    passes = [node for node in convolutions(module) if node.target is BACKWARD]
    return [node for node in passes if not all(map(_is_channels_last, _images(node)[:2]))]


def _is_channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last)


def _turning_s(image: Tensor) -> float:
    return 2 * image.nbytes / DEFAULT_CORE_BYTES_PER_S


def times_of(node: fx.Node) -> list[float]:
    """Seconds of a convolution whose images lie channel by channel, and of one in channels last, in this thread."""
    assert callable(node.target)
    target: Callable[..., object] = node.target
    args, _ = make_arguments(node)
    num = _NUM_IMAGES[target]
    with torch.no_grad():
        layouts = (torch.contiguous_format, torch.channels_last)
        ways = [(*(image.contiguous(memory_format=one) for image in args[:num]), *args[num:]) for one in layouts]
        return time_in_turns([functools.partial(target, *way) for way in ways])


def _conversions_s(rewritten: fx.GraphModule) -> float:
    clones = [node for node in rewritten.graph.nodes if node.target is _aten.clone.default]
    pairs = [(node.meta["val"], node.all_input_nodes[0].meta["val"]) for node in clones]
    converted = [value for value, source in pairs if value.stride() != source.stride()]
    return sum(map(_turning_s, converted))


def _work(node: fx.Node) -> int:
    """In proportion to a backward pass' multiplications: points of the image that came out, times weights."""
    gradient, _, weight = _images(node)
    return int(gradient.numel() // max(gradient.shape[1], 1) * weight.numel())


def _key(rewritten: _Rewritten, num_threads: int) -> str:
    keys = sorted(op_key(node, num_threads) for node in rewritten.turned)
    return fingerprint([*keys, round(1e6 * _conversions_s(rewritten.module))])


CHOICES: Choices[_Rewritten] = Choices("channels last", _pays, key=_key)
