"""Equations of the ops that compute."""

from __future__ import annotations

from typing import Any

from partita.search.structure.movements import kept_where_same
from partita.search.structure.tracing import Call, Dims, equal, equation, sizes_of, width_of
from partita.search.structure.widths import Extent, Width, equate, factored, fix, product, size_of


@equation(
    "pointwise", "dropout", "alpha_dropout", "feature_dropout", "contiguous", "clone", "detach", "to", "_to_copy",
    "type_as", "alias", "lift_fresh_copy", "relu6", "selu", "rrelu", "float", "where", "masked_fill", "zeros_like",
    "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "tril", "triu", "bernoulli", "silu", "mish",
    "__and__", "__or__", "__xor__", "copy", "fill",
)  # fmt: skip
def pointwise(call: Call) -> Dims:
    """Dims from the right are the same, unless one is 1."""
    result = sizes_of(call.result())
    found: list[Extent | None] = [None] * len(result)
    for node in call.tensors:
        for place, extent in enumerate(reversed(call.dims_of(node)), start=1):
            if size_of(extent) != result[-place]:
                continue  # it is 1
            known = found[-place]
            if known is None:
                found[-place] = extent
            else:
                equate(known, extent)
    return [extent if extent is not None else width_of(size)
            for extent, size in zip(found, call.result().shape, strict=True)]  # fmt: skip


@equation(
    "zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"
)
def made(call: Call) -> Dims:
    """As many as what it meets has."""
    return call.fresh()


@equation("arange", "linspace", "eye", "one_hot", "multinomial")
def numbered(call: Call) -> Dims:
    return call.fresh(fixed=f"{call.name} numbers it")


@equation(
    "cross_entropy_loss", "nll_loss", "nll_loss_nd", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "diff", "unfold", "im2col", "col2im", "pixel_shuffle",
    "pixel_unshuffle", "cdist", "nonzero", "scatter", "scatter_add", "index_put", "searchsorted", "bincount", "trace",
    "grid_sampler", "inverse", "linalg_inv",
)  # fmt: skip
def fixing(call: Call) -> Dims:
    """Ops that need the sizes as they are."""
    for node in call.tensors:
        for extent in call.dims_of(node):
            fix(extent, call.why)
    return call.fresh(fixed=f"{call.name} makes it")


@equation("prelu")
def prelu(call: Call) -> Dims:
    dims, (slopes,) = call.dims("self"), call.dims("weight")
    if size_of(slopes) > 1:
        equate(slopes, dims[1])
    return dims


@equation("glu")
def glu(call: Call) -> Dims:
    dims, place = call.dims("self"), call.values.get("dim", -1)
    halves = factored(dims[place], [2, size_of(dims[place]) // 2])
    fix(halves[0], "it counts halves")
    dims[place] = halves[1]
    return dims


# -- sums -------------------------------------------------------------------------------------------------------------


@equation("linear")
def linear(call: Call) -> Dims:
    dims, (outputs, inputs) = call.dims("input"), call.dims("weight")
    equate(dims[-1], inputs)
    call.contracted("weight", 1)
    if call.has("bias"):
        equate(call.dims("bias")[0], outputs)
    call.trace.products.append([*dims, outputs])
    return [*dims[:-1], outputs]


def _product(call: Call, a: str, b: str) -> Dims:
    """Of matrices, batches of them, or vectors."""
    left, right = call.dims(a), call.dims(b)
    inner = -2 if len(right) > 1 else -1
    equate(left[-1], right[inner])
    if call.values[a] in call.trace.names:
        call.contracted(a, -1)
    else:
        call.contracted(b, inner)
    found = [*left[-2:-1], *(right[-1:] if len(right) > 1 else [])]
    found = [*_broadcast(left[:-2], right[:-2]), *found]
    call.trace.products.append([*found, left[-1]])
    return found


def _broadcast(a: Dims, b: Dims) -> Dims:
    if len(a) < len(b):
        a, b = b, a
    found = list(a)
    for place, extent in enumerate(b, start=len(a) - len(b)):
        if size_of(found[place]) == size_of(extent):
            equate(found[place], extent)
        elif size_of(found[place]) == 1:
            found[place] = extent
    return found


@equation("matmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call) -> Dims:
    return _product(call, "self", next(name for name in ("other", "mat2", "vec", "tensor") if name in call.values))


@equation("addmm", "baddbmm")
def addmm(call: Call) -> Dims:
    a, b = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
    found = _product(call, a, b)
    _broadcast(found, call.dims("self"))
    return found


@equation("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Dims | None:
    turned = "transpose" in call.name or bool(call.values.get("transposed"))
    dims, weight = call.dims("input"), call.dims("weight")
    rank, groups = len(weight) - 2, call.values["groups"]
    images, place = dims[:-rank], -rank - 1
    into, out = (weight[0], weight[1]) if turned else (weight[1], weight[0])
    if groups == 1:
        equate(dims[place], into)
        call.contracted("weight", 0 if turned else 1)
    else:
        out = _grouped(call, dims[place], into, out, groups, turned)
    if call.has("bias"):
        equate(call.dims("bias")[0], out)
    for extent in (*weight[2:], *dims[-rank:]):
        fix(extent, "it is a dim of an image or its kernel")
    images[-1] = out
    found = [*images, *call.fresh(fixed="it is a dim of an image")[-rank:]]
    places = dims[-rank:] if turned else found[-rank:]
    call.trace.products.append([*dims[: -rank - 1], *places, *weight])
    return found


def _grouped(call: Call, channels: Extent, into: Extent, out: Extent, groups: int, turned: bool) -> Extent:
    """Depthwise, a group is a unit. Else there are as many groups as before, and all change alike."""
    if size_of(channels) == groups:
        group: Extent = channels
    else:
        group = Width(groups, fixed="it counts groups of channels")
        each = Width(size_of(channels) // groups)
        equate(channels, product([group, each]))
        if not turned:
            equate(into, each)
            call.contracted("weight", 1)
    if turned:  # the weight has all input channels, and the outputs of one group
        equate(into, channels)
        if size_of(channels) != groups:
            call.contracted("weight", 0)
        return product([group, out])
    per_group = Width(size_of(out) // groups)
    equate(out, product([group, per_group]))
    return out


@equation("scaled_dot_product_attention")
def attention(call: Call) -> Dims:
    query, key, value = (call.dims(name) for name in ("query", "key", "value"))
    equate(query[-1], key[-1])
    call.mixed(query[-1], "attention compares queries and keys by it")
    equate(key[-2], value[-2])
    call.mixed(key[-2], "attention sums over it")
    if call.values.get("enable_gqa") and size_of(query[-3]) != size_of(key[-3]):
        times = size_of(query[-3]) // size_of(key[-3])
        equate(query[-3], product([key[-3], Width(times, fixed="it counts queries of a key")]))
        equate(key[-3], value[-3])
        outer = query[:-2]
    else:
        outer = _broadcast(_broadcast(query[:-2], key[:-2]), value[:-2])
    found = [*outer, query[-2], value[-1]]
    call.trace.products += [[*outer, query[-2], key[-2], inner] for inner in (query[-1], value[-1])]
    if call.has("attn_mask"):
        _broadcast([*outer, query[-2], key[-2]], call.dims("attn_mask"))
    return found


@equation("sum", "mean", "var", "std", "amax", "amin", "prod", "logsumexp", "norm", "any", "all", "linalg_vector_norm",
          "max", "min", "median", "argmax", "argmin", "count_nonzero", "nansum", "nanmean")  # fmt: skip
def reduced(call: Call) -> Any:
    if "other" in call.values:
        return pointwise(call)  # max(a, b)
    dims = call.dims("self")
    given = call.values.get("dim")
    places = range(len(dims)) if given in (None, []) else [given] if isinstance(given, int) else given
    gone = {place % len(dims) for place in places}
    for place in gone:
        call.mixed(dims[place], f"{call.name} runs over it")
        if call.name in ("argmax", "argmin") or (isinstance(call.result(), tuple | list)):
            fix(dims[place], f"{call.name} numbers it")
    keep = bool(call.values.get("keepdim"))
    found: Dims = [width_of(1) if place in gone else extent
                   for place, extent in enumerate(dims) if keep or place not in gone]  # fmt: skip
    return [list(found), list(found)] if isinstance(call.result(), tuple | list) else found


@equation("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "softmin")
def along(call: Call) -> Dims:
    dims = call.dims("self")
    call.mixed(dims[call.values["dim"]], f"{call.name} runs over it")
    return dims


# -- normalisation ----------------------------------------------------------------------------------------------------


@equation("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Dims:
    dims = call.dims("input")
    normalized = dims[-len(call.values["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call.has(name):
            equal(call.dims(name), normalized)
    _scales(call)
    for extent in normalized:
        call.mixed(extent, f"{call.name} runs over it")
    return dims


@equation("batch_norm", "instance_norm")
def batch_norm(call: Call) -> Dims:
    dims = call.dims("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            equate(call.dims(name)[0], dims[1])
    _scales(call)
    return dims


def _scales(call: Call) -> None:
    if call.has("weight") and call.values["weight"] in call.trace.names:
        call.trace.scales.add(call.trace.names[call.values["weight"]])


@equation("group_norm")
def group_norm(call: Call) -> Dims:
    dims, groups = call.dims("input"), call.values["num_groups"]
    inner = Width(size_of(dims[1]) // groups)
    if groups > 1:
        equate(dims[1], product([Width(groups, fixed="it counts groups of a norm"), inner]))
    else:
        equate(inner, dims[1])
    call.mixed(inner, "group_norm runs over it")
    _scales(call)
    for name in ("weight", "bias"):
        if call.has(name):
            equate(call.dims(name)[0], dims[1])
    return dims


# -- images -----------------------------------------------------------------------------------------------------------


@equation(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "lp_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_nearest_exact2d",
)  # fmt: skip
def resampled(call: Call) -> Any:
    argument = "self" if "self" in call.values else "input"
    rank = int(call.name.rstrip("d")[-1])
    for extent in call.dims(argument)[-rank:]:
        fix(extent, "it is a dim of an image")
    result = call.result()
    if isinstance(result, tuple | list):
        found = [*call.dims(argument)[:-rank], *call.fresh(0, "it is a dim of an image")[-rank:]]
        return [found, list(found)]
    return kept_where_same(call, argument, "it is a dim of an image")


# -- recurrent --------------------------------------------------------------------------------------------------------

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@equation(*_GATES)
def recurrent(call: Call) -> list[Dims] | None:
    """Weights come by layers and directions: inputs, states, then both biases; results are joined over directions."""
    if "data" in call.values or not call.has("params"):
        return None  # packed sequences
    gates, params = _GATES[call.name], list(call.values["params"])
    per_cell = 4 if call.values["has_biases"] else 2
    if len(params) != per_cell * call.values["num_layers"] * (2 if call.values["bidirectional"] else 1):
        return None  # with projections
    source, batch_first = call.dims("input"), call.values["batch_first"]
    hidden: Extent = Width(size_of(call.dims_of(params[1])[1]))
    inputs = source[-1]
    cells = [params[at : at + per_cell] for at in range(0, len(params), per_cell)]
    directions = 2 if call.values["bidirectional"] else 1
    for layer in range(0, len(cells), directions):
        for into, state, *biases in cells[layer : layer + directions]:
            for node in (into, state, *biases):
                rows = call.dims_of(node)[0]
                equate(rows, product([Width(gates, fixed="it counts gates"), hidden]))
            equate(call.dims_of(into)[1], inputs)
            equate(call.dims_of(state)[1], hidden)
            call.trace.weights += [(call.trace.names[node], 1) for node in (into, state) if node in call.trace.names]
        inputs = product([Width(directions, fixed="it counts directions"), hidden]) if directions > 1 else hidden
    states = call.values["hx"] if isinstance(call.values["hx"], list | tuple) else [call.values["hx"]]
    for node in states:
        equate(call.dims_of(node)[-1], hidden)
    count = width_of(len(cells), "it counts layers")
    rows = source[0] if batch_first or len(source) < 3 else source[1]
    last = [count, rows, hidden] if len(source) == 3 else [count, hidden]
    return [[*source[:-1], inputs], *([list(last)] * len(states))]
