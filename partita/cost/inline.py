"""Products that compiled code forms in place, where that is faster here than a call of a library.

A library takes some microseconds to find out what it is called for, and MKL leaves vector units of some processors
unused: a product of (16 x 256) by (256 x 256) takes 25 us on a Zen 5 core by MKL as well as by oneDNN. oneDNN's inner
kernel, generated for exactly these sizes and called directly, takes 8 us. It wants both factors row by row, so a factor
that lies column by column is transposed before; and as it does not cut large factors to what fits a cache, large
products stay with the libraries. Which is faster is measured (`partita.cost.choices`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from partita.cost.choices import Choices
from partita.cost.measure_ops import make_tensor, time_in_turns
from partita.cost.torch_adapter import small_product
from partita.cost.variants import is_clear, is_plain, product_of, time_of_chosen
from partita.graph.custom_ops import inline_product

TRANSPOSE_S = 0.2e-9  # an element of a factor that fits a core's cache: measured 0.1 to 0.4 ns on a Zen 5
MOST_ELEMENTS = 2**20  # of factors and result together (4 MiB): what is far from fitting a cache, libraries cut first
_BMM = torch.ops.aten.bmm.default


def with_inline(module: fx.GraphModule, num_threads: int) -> fx.GraphModule:
    """The module, to be compiled for `num_threads` threads, with `partita::inline_product` in the place of every
    product that compiled code forms faster in place.

    The module itself if there is none. What is not known yet is measured: some milliseconds for each kind of op.
    """
    if not is_possible(num_threads):
        return module
    products = [node for node in module.graph.nodes if node.op == "call_function" and can_be_inline(node)]
    return CHOICES.applied(module, products, num_threads, _as_inline)


def is_possible(num_threads: int) -> bool:
    """Whether code for so many threads can form products in place: the kernel works in one."""
    return num_threads == 1 and small_product() is not None


def can_be_inline(node: fx.Node) -> bool:
    product = product_of(node)
    if product is None and node.target is not _BMM:
        return False
    values = [value.meta.get("val") for value in (*_factors(node), node)]
    return all(map(is_plain, values)) and sum(value.numel() for value in values if value is not None) <= MOST_ELEMENTS


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    product = product_of(node)
    if product is not None:
        return product.left, product.right
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return left, right


def _as_inline(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, Any]) -> fx.Node:
    left, right = _factors(node)
    result = graph.call_function(inline_product._opoverload, (copies[left], copies[right]))
    result.meta = dict(node.meta)
    product = product_of(node)
    if product is None or product.bias is None:
        return result
    total = graph.call_function(torch.ops.aten.add.Tensor, (result, copies[product.bias]))
    total.meta = dict(node.meta)
    return total


# Measuring -----------------------------------------------------------------------------------------------------------


def num_transposed(left: torch.Tensor, right: torch.Tensor) -> int:
    """Elements that have to be transposed for ``left @ right``, the better of two ways: all in rows, or the transposed
    product of the transposed factors, which are in rows where the factors are in columns.

    Example:
        >>> left, in_rows, in_columns = torch.empty(2, 30), torch.empty(30, 50), torch.empty(50, 30).t()
        >>> num_transposed(left, in_rows), num_transposed(left, in_columns)
        (0, 160)
    """
    (m, k), n = left.shape[-2:], right.shape[-1]
    return min(ways(m, k, n, left.stride(-1) == 1, right.stride(-1) == 1))


def ways(m: int, k: int, n: int, left_in_rows: bool, right_in_rows: bool) -> tuple[int, int]:
    """Elements that each of the two ways transposes: (all in rows, the transposed product)."""
    direct = (0 if left_in_rows else m * k) + (0 if right_in_rows else k * n)
    turned = (m * k if left_in_rows else 0) + (k * n if right_in_rows else 0) + m * n
    return direct, turned


def in_place_s(node: fx.Node) -> float:
    """Seconds of the node's product in place, in this thread."""
    left, right = (value.meta["val"] for value in _factors(node))
    (m, k), n = left.shape[-2:], right.shape[-1]
    num_products = left.shape[0] if left.dim() == 3 else 1
    return float(num_products * (kernel_s(m, k, n) + num_transposed(left, right) * TRANSPOSE_S))


@functools.cache  # wanted for the choice and for the cost of what was chosen
def kernel_s(m: int, k: int, n: int) -> float:
    """Seconds of one product of matrices in rows, without those of a call from Python."""
    kernel = small_product()
    assert kernel is not None
    a, b, c = torch.ones(m, k), torch.ones(k, n), torch.empty(m, n)
    one, result = torch.ones(1, 1), torch.empty(1, 1)
    own_s, call_s = time_in_turns([lambda: kernel(a, b, c), lambda: kernel(one, one, result)])
    return max(own_s - call_s, 0.0)


def _library_s(node: fx.Node) -> float:
    """Seconds of the node's product by the library that forms it otherwise."""
    if product_of(node) is not None:
        return time_of_chosen(node, 1)
    left, right = (make_tensor(value.meta["val"]) for value in _factors(node))
    with torch.no_grad():
        (time_s,) = time_in_turns([lambda: _BMM(left, right)])
    return time_s


CHOICES: Choices[fx.Node] = Choices("inline", lambda node: is_clear(_library_s(node), in_place_s(node)))
