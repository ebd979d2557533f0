"""Another library's kernel in the place of an op, where it is faster here and gives the same result.

PyTorch multiplies float32 matrices on the CPU by MKL, which on some processors leaves vector units unused that oneDNN
uses: on a Zen 5 core large products take less than half the time. oneDNN in turn takes about 10 us more for each call,
so small products stay where they are. Neither is known beforehand: both are run on the shapes at hand, in turns, and
the choice is kept on disk by what `op_key` tells and the processor.

Both sum in float32, in another order: results differ by rounding, as they do between processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from partita.cost.choices import Choices
from partita.cost.measure_ops import make_arguments, time_in_turns

ONEDNN = torch.ops.mkldnn._linear_pointwise.default  # (x [m, k], w [n, k], bias [n] or None, ...) -> x w' + bias
CLEARLY_FASTER = 0.93  # of the op's own time: what two runs differ by is no reason to leave it
_TRANSPOSED = (torch.ops.aten.t.default, torch.ops.aten.permute.default, torch.ops.aten.transpose.int)


@dataclass(frozen=True)
class Product:
    """``left @ right + bias`` of float32 matrices; `bias` has one dim, or is None."""

    left: fx.Node
    right: fx.Node
    bias: fx.Node | None


def product_of(node: fx.Node) -> Product | None:
    """The product that an op node computes, if oneDNN can compute it."""
    if not torch.backends.mkldnn.is_available() or node.kwargs:
        return None
    if node.target is torch.ops.aten.mm.default:
        left, right = _nodes(node.args)
        found = Product(left, right, None)
    elif node.target is torch.ops.aten.addmm.default:
        bias, left, right = _nodes(node.args)
        found = Product(left, right, bias)
    else:
        return None
    factors = [_tensor(found.left), _tensor(found.right)]
    if not all(is_plain(value) and value.dim() == 2 for value in factors):
        return None
    if found.bias is not None:
        bias_value = _tensor(found.bias)
        if not is_plain(bias_value) or bias_value.dim() != 1:
            return None
        if bias_value.shape[0] != factors[1].shape[1]:  # type: ignore[union-attr]
            return None  # one value for all columns
    return found


def with_variants(module: fx.GraphModule, num_threads: int) -> fx.GraphModule:
    """The module with a variant in the place of every op that has one which is faster on `num_threads` threads.

    The module itself if there is none. What is not known yet is measured: some milliseconds for each kind of op.
    """
    products = [node for node in module.graph.nodes if node.op == "call_function" and product_of(node)]
    return CHOICES.applied(module, products, num_threads, _as_onednn)


def time_of_chosen(node: fx.Node, num_threads: int) -> float:
    """Seconds of the node's product in this thread, by the library that is chosen for it: chosen now, if none was."""
    own_s, other_s = times_s(node)
    return other_s if CHOICES.settle(node, num_threads, lambda: is_clear(own_s, other_s)) else own_s


# One node ------------------------------------------------------------------------------------------------------------


def _nodes(args: tuple[Any, ...]) -> list[fx.Node]:
    return [item for item in args if isinstance(item, fx.Node)]


def _tensor(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a float32 tensor on the CPU that holds something."""
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32:
        return False
    return value.device.type == "cpu" and value.numel() > 0


def _as_onednn(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, Any]) -> fx.Node:
    product = product_of(node)
    assert product is not None
    right = product.right
    if right.target in _TRANSPOSED and right.op == "call_function":  # a weight, seen from the other side and back
        weight = copies[right.all_input_nodes[0]]
    else:
        weight = graph.call_function(torch.ops.aten.permute.default, (copies[right], [1, 0]))
        value = _tensor(right)
        weight.meta["val"] = value.t() if value is not None else None
    bias = None if product.bias is None else copies[product.bias]
    result = graph.call_function(ONEDNN, (copies[product.left], weight, bias, "none", [], ""))
    result.meta = dict(node.meta)
    return result


# Measuring -----------------------------------------------------------------------------------------------------------


def times_s(node: fx.Node) -> tuple[float, float]:
    """Seconds of the node's product by its own op and by oneDNN, in this thread."""
    assert callable(node.target)
    target: Callable[..., object] = node.target
    args, _ = make_arguments(node)
    bias, left, right = args if len(args) == 3 else (None, *args)
    with torch.no_grad():
        own_s, other_s = time_in_turns([lambda: target(*args), lambda: ONEDNN(left, right.t(), bias, "none", [], "")])
    return own_s, other_s


def is_clear(own_s: float, other_s: float) -> bool:
    """Whether the other kernel is to be taken."""
    return other_s < CLEARLY_FASTER * own_s


CHOICES: Choices[fx.Node] = Choices("onednn", lambda node: is_clear(*times_s(node)))
