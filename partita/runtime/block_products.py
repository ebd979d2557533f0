"""How the compiler forms block-sparse layers (`partita.graph.block_ops`): in C++, without Python.

Every block is a product by oneDNN's inner kernel, which is told the strides of x and y: nothing is gathered. The kernel
wants both factors in rows; what it would find in columns is transposed before, of each output block the weight for the
forward pass and the gradient for the gradient of the weight. Rows are taken `ROWS` at a time, for the caches.
Where torch has no such kernel, and for other types than float32, compiled code calls the op, in Python.

Private parts of torch: those that `partita.runtime.products` names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from partita.cost.torch_adapter import small_product
from partita.graph.block_ops import OPS
from partita.runtime import products
from partita.units import fingerprint

SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <stdexcept>

namespace partita::blocks {

// x (B, I), y (B, O), w (n, K, h, v) with O = n h, index (n, K) of the I / v input blocks
struct Sizes { int64_t B, I, O, n, K, h, v; };
constexpr int64_t ROWS = 256;

inline void check(const int64_t* index, const Sizes& s) {
    const int64_t limit = s.I / s.v;
    if (std::any_of(index, index + s.n * s.K, [limit](int64_t i) { return i < 0 || i >= limit; }))
        throw std::out_of_range("an entry of a block-sparse layer's index names an input block that is not there");
}

inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                    float* c, int64_t ldc, bool add) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

inline void forward(const float* x, const float* w, const int64_t* index, const float* bias, float* y, const Sizes& s,
                    int threads) {
    check(index, s);
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < s.n; ++o) {
        float* turned = scratch(0, s.K * s.v * s.h);
        for (int64_t j = 0; j < s.K; ++j)
            transpose(w + (o * s.K + j) * s.h * s.v, s.v, turned + j * s.v * s.h, s.h, s.h, s.v);
        for (int64_t row = 0; row < s.B; row += ROWS) {
            const int64_t rows = std::min(ROWS, s.B - row);
            float* out = y + row * s.O + o * s.h;
            if (bias)
                for (int64_t r = 0; r < rows; ++r) std::copy_n(bias + o * s.h, s.h, out + r * s.O);
            for (int64_t j = 0; j < s.K; ++j)
                product(rows, s.h, s.v, x + row * s.I + index[o * s.K + j] * s.v, s.I, turned + j * s.v * s.h, s.h, out,
                        s.O, bias || j);
        }
    }
}

inline void input_gradient(const float* g, const float* w, const int64_t* index, float* out, const Sizes& s,
                           int threads) {
    check(index, s);
    const int64_t num_inputs = s.I / s.v, num_slots = s.n * s.K;
    std::vector<int64_t> start(num_inputs + 1), slots(num_slots);  // the slots that read each input block
    for (int64_t slot = 0; slot < num_slots; ++slot) ++start[index[slot] + 1];
    for (int64_t i = 0; i < num_inputs; ++i) start[i + 1] += start[i];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t slot = 0; slot < num_slots; ++slot) slots[next[index[slot]]++] = slot;
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < num_inputs; ++i)
        for (int64_t row = 0; row < s.B; row += ROWS) {
            const int64_t rows = std::min(ROWS, s.B - row);
            float* at = out + row * s.I + i * s.v;
            if (start[i] == start[i + 1])
                for (int64_t r = 0; r < rows; ++r) std::fill_n(at + r * s.I, s.v, 0.f);
            for (int64_t p = start[i]; p < start[i + 1]; ++p)
                product(rows, s.v, s.h, g + row * s.O + slots[p] / s.K * s.h, s.O, w + slots[p] * s.h * s.v, s.v, at,
                        s.I, p > start[i]);
        }
}

inline void weight_gradient(const float* g, const float* x, const int64_t* index, float* out, const Sizes& s,
                            int threads) {
    check(index, s);
    if (s.B == 0) std::fill_n(out, s.n * s.K * s.h * s.v, 0.f);
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < s.n; ++o)
        for (int64_t row = 0; row < s.B; row += ROWS) {
            const int64_t rows = std::min(ROWS, s.B - row);
            float* turned = scratch(0, s.h * rows);
            transpose(g + row * s.O + o * s.h, s.O, turned, rows, rows, s.h);
            for (int64_t j = 0; j < s.K; ++j)
                product(s.h, s.v, rows, turned, rows, x + row * s.I + index[o * s.K + j] * s.v, s.I,
                        out + (o * s.K + j) * s.h * s.v, s.v, row > 0);
        }
}

}  // namespace partita::blocks
"""
CODE = fingerprint([SOURCE, products.SOURCE])


def prepare(node: fx.Node) -> None:
    """The compiler keeps what it compiled by the graph: so a node with a lowering here has the hash of its code."""
    if node.target in OPS:
        node.kwargs = {**node.kwargs, "code": CODE}


@functools.cache
def register_lowerings() -> None:
    """Has the compiler write the C++ here for block-sparse layers, where torch has the kernel."""
    from torch._inductor import lowering

    if small_product() is None:
        return
    for op, lower in zip(OPS, (_lower_forward, _lower_input_gradient, _lower_weight_gradient), strict=True):
        lowering.lowerings[op] = functools.partial(_lowered, op, lower)


def _lowered(op: Any, lower: Callable[..., Any], first: Any, *args: Any, **kwargs: Any) -> Any:
    from torch._inductor import lowering

    if first.get_dtype() is torch.float32 and first.get_device().type == "cpu":
        return lower(first, *args)
    return lowering.fallback_handler(op, add_to_fallback_set=False)(first, *args, **kwargs)


def _lower_forward(x: Any, weight: Any, index: Any, bias: Any, code: str = "") -> Any:
    (num_rows, in_features), (num_blocks, num_inputs, height, width) = _size(x), _size(weight)
    sizes = [num_rows, in_features, num_blocks * height, num_blocks, num_inputs, height, width]
    return _node("forward", [x, weight, index, bias], [num_rows, num_blocks * height], sizes)


def _lower_input_gradient(grad: Any, weight: Any, index: Any, in_features: int, code: str = "") -> Any:
    (num_rows, out_features), weight_size = _size(grad), _size(weight)
    sizes = [num_rows, in_features, out_features, *weight_size]
    return _node("input_gradient", [grad, weight, index], [num_rows, in_features], sizes)


def _lower_weight_gradient(grad: Any, x: Any, index: Any, width: int, code: str = "") -> Any:
    (num_rows, out_features), (_, in_features), (num_blocks, num_inputs) = _size(grad), _size(x), _size(index)
    shape = [num_blocks, num_inputs, out_features // num_blocks, width]
    return _node("weight_gradient", [grad, x, index], shape, [num_rows, in_features, out_features, *shape])


def _size(value: Any) -> list[int]:
    return [int(extent) for extent in value.get_size()]


def _node(function: str, tensors: Sequence[Any], shape: Sequence[int], sizes: Sequence[int]) -> Any:
    from torch._inductor import ir

    present = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t)) for t in tensors if t is not None]
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = tensors[0]
    layout = ir.FixedLayout(device=first.get_device(), dtype=first.get_dtype(), size=list(shape), stride=strides)
    arguments = (function, *sizes, len(present) < len(tensors))
    return ir.TensorBox.create(_kernel()(layout, present, arguments))


@functools.cache
def _kernel() -> type:
    """The node of compiled code that calls a function of `SOURCE`; its base class is there once the compiler is."""
    from torch._inductor import config, ir
    from torch._inductor.virtualized import V

    class BlockProduct(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            products.write_source(wrapper)
            if not getattr(wrapper, "has_partita_blocks", False):
                wrapper.has_partita_blocks = True
                V.graph.wrapper_code.header.splice(SOURCE)
            function, *sizes, lacks_bias = self.constant_args
            pointers = [products.data(self.inputs[place]) for place in range(2)]
            pointers.append(products.data(self.inputs[2], "int64_t"))
            if function == "forward":
                pointers.append("nullptr" if lacks_bias else products.data(self.inputs[3]))
            pointers.append(f"(float*)({self.get_name()}.data_ptr())")
            numbers = ", ".join(f"{size}L" for size in sizes)
            threads = max(int(config.cpp.threads), 1)
            wrapper.writeline(
                f"partita::blocks::{function}({', '.join(pointers)}, partita::blocks::Sizes{{{numbers}}}, {threads});"
            )

    return BlockProduct
