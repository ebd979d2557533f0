"""Attention whose products compiled code forms in place, where that is faster here than the library's kernel.

PyTorch's kernel for attention on the CPU (Dao et al. 2022, FlashAttention) goes through blocks of keys so that the
scores need no memory, and forms its products by MKL. Where sequences are short all scores fit a cache, and the products
of `partita.cost.inline` with the compiler's own loops between them are faster. With queries Q, keys K, values V of one
head, s the scale, O the output, L the logarithms of the softmax's sums (as the kernel gives and takes them):

    S = s Q K'        P = exp(S - L), L_i = log sum_j exp(S_ij)        O = P V
    dV = P' dO        dS = s P * (dO V' - rowsum(dO * O))              dQ = dS K        dK = dS' Q

The backward pass forms P again from L, as the kernel does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from partita.cost.choices import Choices
from partita.cost.inline import is_possible, kernel_s
from partita.cost.measure_ops import make_tensor, time_in_turns
from partita.cost.variants import is_clear
from partita.graph.custom_ops import inline_product

MOST_SCORES = 2**21  # of all heads together (8 MiB)
FORWARD_S, BACKWARD_S = 0.8e-9, 1.2e-9  # a score, for the loops between the products: measured on a Zen 5
_aten = torch.ops.aten
FORWARD = _aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_PRODUCT = inline_product._opoverload


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, E), in memory as (B, T, H, E), and logarithms of the sums (B, H, T).

    Args:
        q, k, v: (B, H, T, E), (B, H, S, E), (B, H, S, E).
        causal: query i sees the keys up to i only.
        scale: of the scores.
    """
    scores = _scores(q, k, causal, scale)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return _PRODUCT(weights / total, v, True), (top + total.log()).squeeze(-1)


def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, sums: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in memory as (B, T, H, E), from that of the output and what `attention` gave."""
    weights = (_scores(q, k, causal, scale) - sums.unsqueeze(-1)).exp()
    change = _PRODUCT(gradient, v.transpose(-1, -2)) - (gradient * output).sum(-1, keepdim=True)
    of_scores = weights * change * scale
    return (
        _PRODUCT(of_scores, k, True),
        _PRODUCT(of_scores.transpose(-1, -2), q, True),
        _PRODUCT(weights.transpose(-1, -2), gradient, True),
    )


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores: Tensor = _PRODUCT(q, k.transpose(-1, -2)) * scale
    if not causal:
        return scores
    later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf"))


# In graphs -----------------------------------------------------------------------------------------------------------


def with_attention(module: fx.GraphModule, num_threads: int) -> fx.GraphModule:
    """The module, to be compiled for `num_threads` threads, with the ops above in the place of every attention that
    they compute faster; the module itself if there is none."""
    if not is_possible(num_threads):
        return module
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and can_be_replaced(node)]
    return CHOICES.applied(module, nodes, num_threads, _replaced)


def can_be_replaced(node: fx.Node) -> bool:
    """An attention without dropout and mask, whose values lie in memory as those of the functions above."""
    if node.target not in (FORWARD, BACKWARD) or node.kwargs.get("attn_mask") is not None:
        return False
    if any(user.target is not operator.getitem for user in node.users):
        return False
    inputs, (dropout, _) = _parted(node)
    values: list[Any] = [item.meta.get("val") for item in inputs]
    if dropout or not all(isinstance(value, Tensor) and value.dtype is torch.float32 for value in values):
        return False
    q, k, v = values[:3] if node.target is FORWARD else values[1:4]
    if q.shape[1] != k.shape[1] or q.shape[-1] != v.shape[-1] or q.device.type != "cpu" or q.numel() == 0:
        return False
    results: Sequence[Tensor] = node.meta["val"][:1] if node.target is FORWARD else node.meta["val"]
    return q.shape[:3].numel() * k.shape[2] <= MOST_SCORES and all(map(_is_by_rows, results))


def _is_by_rows(value: Tensor) -> bool:
    return value.transpose(1, 2).is_contiguous()


def _parted(node: fx.Node) -> tuple[list[fx.Node], tuple[float, bool]]:
    """The tensors that an attention is called with; dropout and whether it is causal."""
    inputs = [item for item in node.args if isinstance(item, fx.Node)]
    given: list[Any] = list(node.args[len(inputs) :])
    return inputs, (float(given[0]) if given else 0.0, len(given) > 1 and bool(given[1]))


def _function(node: fx.Node) -> Callable[..., tuple[Tensor, ...]]:
    inputs, (_, causal) = _parted(node)
    query = inputs[0 if node.target is FORWARD else 1].meta["val"]
    scale = node.kwargs.get("scale")
    options = {"causal": causal, "scale": query.shape[-1] ** -0.5 if scale is None else scale}
    function: Callable[..., tuple[Tensor, ...]] = attention if node.target is FORWARD else attention_backward
    return lambda *tensors: function(*tensors, **options)


def _replaced(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The function's ops in the graph; the nodes of its results."""
    inputs, _ = _parted(node)
    examples = [torch.empty_like(item.meta["val"]) for item in inputs]  # nodes may share their values: these do not
    traced = make_fx(_function(node))(*examples)
    places: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            places[inner] = copies[next(given)]
        elif inner.op == "output":
            return [places[result] for result in inner.args[0]]
        else:
            places[inner] = graph.node_copy(inner, places.__getitem__)
    raise AssertionError("a graph must have an output")


# Measuring -----------------------------------------------------------------------------------------------------------


def in_place_s(node: fx.Node) -> float:
    """Seconds of the node's attention in place, in this thread."""
    inputs, _ = _parted(node)
    values = [item.meta["val"] for item in inputs]
    q, k = values[:2] if node.target is FORWARD else values[1:3]
    (*batch, t, e), s = q.shape, k.shape[2]
    if node.target is FORWARD:
        head_s = kernel_s(t, e, s) + kernel_s(t, s, e) + FORWARD_S * t * s
    else:
        head_s = 2 * kernel_s(t, e, s) + kernel_s(t, s, e) + 2 * kernel_s(s, t, e) + BACKWARD_S * t * s
    return float(torch.Size(batch).numel() * head_s)


def _library_s(node: fx.Node) -> float:
    inputs, _ = _parted(node)
    values, rest = [make_tensor(item.meta["val"]) for item in inputs], node.args[len(inputs) :]
    with torch.no_grad():
        (time_s,) = time_in_turns([lambda: node.target(*values, *rest, **node.kwargs)])  # type: ignore[operator]
    return time_s


CHOICES: Choices[fx.Node] = Choices("attention", lambda node: is_clear(_library_s(node), in_place_s(node)))
