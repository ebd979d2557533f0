"""Layers of `torch.nn` as the text that makes them."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from partita.search.structure.tracing import Trace, arguments_of, op_name
from partita.search.structure.widths import Extent, Width, size_of

# Modules whose classes are layers: one tensor comes in, one goes out, and the constructor is what they print.
_LAYERS = {
    f"torch.nn.modules.{name}"
    for name in ("activation", "batchnorm", "conv", "dropout", "flatten", "instancenorm", "linear", "normalization",
                 "padding", "pooling", "sparse", "upsampling")
}  # fmt: skip
_OTHERS = (nn.MultiheadAttention, nn.Unflatten, nn.EmbeddingBag, nn.Bilinear)  # whose sizes aren't those of tensors

New = Mapping[Width, int]


def is_leaf(module: nn.Module) -> bool:
    """Whether its constructor's text makes it again."""
    if isinstance(module, _OTHERS) or list(module.children()) or _has_hooks(module):
        return False
    known = _known_class(module)
    if known is None or known.__module__ not in _LAYERS or type(module).forward is not known.forward:
        return False
    text = constructor(module, {})
    if text is None:
        return False
    try:
        with torch.device("meta"):
            again = eval(text, {"nn": nn})
    except Exception:
        return False  # what it prints is no constructor
    return again.extra_repr() == module.extra_repr() and _shapes(again) == _shapes(module)


def constructor(module: nn.Module, attributes: Mapping[str, Any]) -> str | None:
    """As ``module``, but for these attributes; None if it is no class of `torch.nn`."""
    known = _known_class(module)
    twin = copy.copy(module)
    twin.__dict__ = {**module.__dict__, **attributes}
    return f"nn.{known.__name__}({_without_defaults(known, twin.extra_repr())})" if known else None


def _known_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of `torch.nn` that it is of, or is derived from."""
    known = next(cls for cls in type(module).__mro__ if getattr(nn, cls.__name__, None) is cls)
    return None if known is nn.Module else known


def _without_defaults(cls: type[nn.Module], arguments: str) -> str:
    """Not every version of torch prints (and takes) the same arguments."""
    try:
        call = ast.parse(f"_({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        parameters = inspect.signature(cls).parameters
        kept = [ast.unparse(value) for value in call.args]
        for keyword in call.keywords:
            default = parameters[keyword.arg or ""].default
            if ast.literal_eval(keyword.value) != default:
                kept.append(ast.unparse(keyword))
    except (SyntaxError, ValueError, KeyError):
        return arguments  # no constructor's: `is_leaf` will see
    return ", ".join(kept)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# -- attributes that are sizes ----------------------------------------------------------------------------------------


def sizes_of_leaf(nodes: list[fx.Node], trace: Trace, new: New) -> dict[str, Any]:
    """The attributes of the layer that ran these ops."""
    found: dict[str, Any] = {}
    for node in nodes:
        attributes = _ATTRIBUTES.get(op_name(node))
        if attributes is not None:
            found |= attributes(Reader(node, trace, new))
    return found


class Reader:
    """One op's arguments, and the dims of its inputs with new sizes."""

    def __init__(self, node: fx.Node, trace: Trace, new: New) -> None:
        self.node, self.values, self.trace, self.new = node, arguments_of(node), trace, new

    def extents(self, argument: str) -> list[Extent]:
        found = self.trace.dims[self.values[argument]]
        assert isinstance(found, list)
        return found

    def size(self, argument: str, dim: int) -> int:
        return size_of(self.extents(argument)[dim], self.new)


def _linear(op: Reader) -> dict[str, Any]:
    return {"in_features": op.size("weight", 1), "out_features": op.size("weight", 0)}


def groups_of(op: Reader) -> int:
    """The groups of a convolution: those of a depthwise one are its channels."""
    groups, channels = int(op.values["groups"]), op.extents("input")[_channel_dim(op)]
    return size_of(channels, op.new) if 1 < groups == size_of(channels) else groups


def _channel_dim(op: Reader) -> int:
    return 1 - len(op.extents("weight"))


def _convolution(op: Reader) -> dict[str, Any]:
    sizes = {"in_channels": op.size("input", _channel_dim(op)), "out_channels": op.size("weight", 0)}
    return sizes | {"groups": groups_of(op)}


def _turned_convolution(op: Reader) -> dict[str, Any]:
    return _convolution(op) | {"out_channels": op.size("weight", 1) * groups_of(op)}


def _channels(attribute: str, argument: str) -> Callable[[Reader], dict[str, Any]]:
    return lambda op: {attribute: op.size(argument, 1)}


def _normalized(op: Reader) -> dict[str, Any]:
    num = len(op.values["normalized_shape"])
    return {"normalized_shape": tuple(op.size("input", dim) for dim in range(-num, 0))}


def _embedding(op: Reader) -> dict[str, Any]:
    return {"num_embeddings": op.size("weight", 0), "embedding_dim": op.size("weight", 1)}


_ATTRIBUTES: dict[str, Callable[[Reader], dict[str, Any]]] = {
    "linear": _linear,
    "batch_norm": _channels("num_features", "input"),
    "instance_norm": _channels("num_features", "input"),
    "group_norm": _channels("num_channels", "input"),
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "embedding": _embedding,
    "prelu": lambda op: {"num_parameters": op.size("weight", 0)},
}
_ATTRIBUTES |= {f"conv{rank}d": _convolution for rank in "123"}
_ATTRIBUTES |= {f"conv_transpose{rank}d": _turned_convolution for rank in "123"}
