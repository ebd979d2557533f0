"""How the compiler forms products of matrices: by oneDNN's library call, or by its inner kernel in place.

The compiler has a lowering of oneDNN's own op, but only for frozen weights, and rewrites what surrounds it; of the ops
here it knows what is said here. Private parts of torch in this file (`tests/runtime/test_runtime_torch_adapter.py` and
`tests/cost/test_cost_inline.py` hold them):

* `torch._inductor.lowering.lowerings`, `torch._inductor.ir`: how an op is compiled, and the nodes of compiled code.
* `torch._inductor.mkldnn_ir.LinearUnary`: oneDNN's linear layer.
* `torch._inductor.virtualized.V.graph.wrapper_code`: the C++ program that is being written.
* ``at::native::cpublas::brgemm`` and ``at::vec::transpose_mxn``, which that program calls.

In place (`partita.cost.inline` decides where): the kernel wants both factors in rows, in C terms ``a[i * lda + j]``.
With X (m, k), W (k, n) and Y = X W there are two ways, and the one that has to transpose fewer elements is taken:

* direct: Y = X W, where a factor that lies in columns is transposed before;
* turned: Y' = W' X', where a factor that lies in columns is one in rows, and the result is transposed after.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from partita.cost.inline import ways
from partita.cost.variants import ONEDNN
from partita.graph.custom_ops import inline_product
from partita.units import fingerprint

SOURCE = r"""
#include <ATen/cpu/vec/vec.h>
#include <vector>

namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const bool add, const float* a,
            const float* b, float* c, bool is_vnni);
}

namespace partita {

// b[j * ldb + i] = a[i * lda + j] for i < rows, j < columns
inline void transpose(const float* a, int64_t lda, float* b, int64_t ldb, int64_t rows, int64_t columns) {
    constexpr int64_t width = at::vec::Vectorized<float>::size();
    int64_t i = 0;
    for (; i + width <= rows; i += width) {
        int64_t j = 0;
        for (; j + width <= columns; j += width)
            at::vec::transpose_mxn<float, width, width>(a + i * lda + j, lda, b + j * ldb + i, ldb);
        for (; j < columns; ++j)
            for (int64_t x = i; x < i + width; ++x) b[j * ldb + x] = a[x * lda + j];
    }
    for (; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) b[j * ldb + i] = a[i * lda + j];
}

inline float* scratch(int place, int64_t size) {
    static thread_local std::vector<float> memory[3];
    if (static_cast<int64_t>(memory[place].size()) < size) memory[place].resize(size);
    return memory[place].data();
}

struct Rows { const float* data; int64_t step; };

// The (rows, columns) matrix with elements a[i * row + j * column] in rows; one of its strides is 1.
inline Rows in_rows(const float* a, int64_t row, int64_t column, int64_t rows, int64_t columns, int place) {
    if (column == 1) return {a, row};
    float* copy = scratch(place, rows * columns);
    transpose(a, column, copy, columns, columns, rows);
    return {copy, columns};
}

// out (m, n, in rows of that step) = left (m, k) @ right (k, n)
inline void direct(const float* left, int64_t left_m, int64_t left_k, const float* right, int64_t right_k,
                   int64_t right_n, float* out, int64_t step, int64_t m, int64_t n, int64_t k) {
    const Rows a = in_rows(left, left_m, left_k, m, k, 0), b = in_rows(right, right_k, right_n, k, n, 1);
    at::native::cpublas::brgemm(m, n, k, a.step, b.step, step, false, a.data, b.data, out, false);
}

inline void turned(const float* left, int64_t left_m, int64_t left_k, const float* right, int64_t right_k,
                   int64_t right_n, float* out, int64_t step, int64_t m, int64_t n, int64_t k) {
    float* result = scratch(2, m * n);
    direct(right, right_n, right_k, left, left_k, left_m, result, m, n, m, k);
    transpose(result, m, out, step, n, m);
}

}  // namespace partita
"""
CODE = fingerprint([SOURCE])


@torch.library.custom_op("partita::product", mutates_args=())
def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """``left @ right.T + bias`` by oneDNN, with factors of any strides."""
    result: Tensor = ONEDNN(left, right, bias, "none", [], "")
    return result


@product.register_fake
def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


def prepare(node: fx.Node) -> None:
    """Have a node of a graph that is to be compiled call the op that has a lowering here."""
    if node.target is ONEDNN:
        node.target, node.args = torch.ops.partita.product.default, node.args[:3]
    elif node.target is inline_product._opoverload:
        left, right, *by_rows = node.args  # the compiler keeps what it compiled by the graph: so with the code's hash
        node.args = (left, right, *(by_rows[:1] or [False]), CODE)


@functools.cache
def register_lowerings() -> None:
    """Has the compiler call the kernels directly, without Python and without the interpreter's lock."""
    from torch._inductor import lowering

    lowering.lowerings[torch.ops.partita.product.default] = _lower_product
    lowering.lowerings[inline_product._opoverload] = _lower_inline


def _lower_product(left: Any, right: Any, bias: Any) -> Any:
    from torch._inductor import ir, mkldnn_ir

    tensors = [ir.ExternKernel.realize_input(item) for item in (left, right, bias) if item is not None]
    constants = ([] if bias is not None else [None]) + ["none", [-1], ""]
    shape = [left.get_size()[0], right.get_size()[0]]
    layout = ir.FixedLayout(device=left.get_device(), dtype=left.get_dtype(), size=shape)
    return ir.TensorBox.create(mkldnn_ir._create_output_node(mkldnn_ir.LinearUnary(layout, tensors, constants)))


def _lower_inline(left: Any, right: Any, by_rows: bool, code: str) -> Any:
    from torch._inductor import ir

    factors = [_laid_out(left), _laid_out(right)]
    size = [int(extent) for extent in (*left.get_size()[:-1], right.get_size()[-1])]
    strides = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    if by_rows:
        heads, rows, columns = size[1:]
        strides = [rows * heads * columns, columns, heads * columns, 1]
    layout = ir.FixedLayout(device=left.get_device(), dtype=left.get_dtype(), size=size, stride=strides)
    return ir.TensorBox.create(_inline_kernel()(layout, factors))


def _laid_out(value: Any) -> Any:
    """The factor in memory, with rows or columns one after the other."""
    from torch._inductor import ir

    value = ir.ExternKernel.realize_input(value)
    value.freeze_layout()
    if _strides(value) is None:
        value = ir.ExternKernel.require_contiguous(value)
    return value


def _strides(value: Any) -> tuple[int, int] | None:
    """Strides of the last two dims, one of which is 1 and the other one no less than the extent that it spans; None if
    they are others."""
    rows, columns = (int(extent) for extent in value.get_size()[-2:])
    row, column = (int(stride) for stride in value.get_stride()[-2:])
    if (column == 1 or columns == 1) and (rows == 1 or row >= columns):  # along an extent of 1 nothing is read
        return max(row, columns), 1
    if (row == 1 or rows == 1) and (columns == 1 or column >= rows):
        return 1, max(column, rows)
    return None


@functools.cache
def _inline_kernel() -> type:
    """The node of compiled code that forms a product in place; its base class is there once the compiler is."""
    from torch._inductor import ir

    class InlineProduct(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            write_source(wrapper)
            wrapper.writeline(_call(self.inputs, self.get_name(), self.get_layout()))

    return InlineProduct


def write_source(wrapper: Any) -> None:
    """Put `SOURCE` into the program that is being written, once."""
    from torch._inductor.virtualized import V

    if not getattr(wrapper, "has_partita_products", False):
        wrapper.has_partita_products = wrapper.needs_vec_isa = True
        V.graph.wrapper_code.header.splice(SOURCE)


def _call(factors: Sequence[Any], result: str, layout: Any) -> str:
    """The C++ that writes the product of two factors to `result`, one after the other for all batch dims."""
    left, right = factors
    size, strides = [int(extent) for extent in layout.size], [int(stride) for stride in layout.stride]
    m, n, k = size[-2], size[-1], int(left.get_size()[-1])
    strides_of = [_strides(left), _strides(right)]
    assert None not in strides_of, "the factors must be laid out, but their strides have changed since"
    (left_m, left_k), (right_k, right_n) = strides_of  # type: ignore[misc]
    num_direct, num_turned = ways(m, k, n, left_k == 1, right_n == 1)
    way = "direct" if num_direct <= num_turned else "turned"
    batch = range(len(size) - 2)
    at = [
        "".join(f" + i{dim} * {int(steps[dim])}L" for dim in batch)
        for steps in (left.get_stride(), right.get_stride(), strides)
    ]
    loops = [f"for (int64_t i{dim} = 0; i{dim} < {size[dim]}L; ++i{dim})" for dim in batch]
    call = (
        f"partita::{way}({data(left)}{at[0]}, {left_m}L, {left_k}L, {data(right)}{at[1]}, {right_k}L, {right_n}L, "
        f"(float*)({result}.data_ptr()){at[2]}, {strides[-2]}L, {m}L, {n}L, {k}L);"
    )
    return " ".join([*loops, call])


def data(value: Any, c_type: str = "float") -> str:
    """The C++ expression for where a value begins in memory."""
    return f"(const {c_type}*)({value.get_name()}.data_ptr()) + {int(value.get_layout().offset)}L"
