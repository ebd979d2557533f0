"""Rules of reductions, normalisations, indexing and sorting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from partita.sharding.calls import OpCall, Slot, fill_slots
from partita.sharding.rules import (
    LARGEST,
    PARTIAL,
    REPLICATE,
    SMALLEST,
    Cut,
    Ignored,
    InputSpec,
    OutputSpec,
    Part,
    Rule,
    Shape,
    register,
)
from partita.sharding.rules_indices import (
    index_reading_rules,
    index_writing_rules,
    reading_rules,
    writing_rules,
)


def _dims(given: Any, rank: int) -> set[int]:
    """The dims that an argument names; None or () names all."""
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return set(range(rank))
    items = given if isinstance(given, (list, tuple)) else [given]
    return {dim + rank if dim < 0 else dim for dim in items}


_EXTREMA = {"amax": LARGEST, "max": LARGEST, "any": LARGEST, "amin": SMALLEST, "min": SMALLEST, "all": SMALLEST}


# Reductions: where the `dim` and `keepdim` arguments are, and whether the op is linear.
_REDUCTIONS: dict[str, bool] = {
    "sum": True, "mean": True, "amax": False, "amin": False, "prod": False, "any": False, "all": False,
    "logsumexp": False, "var": False, "std": False, "var_mean": False, "std_mean": False,
    "argmax": False, "argmin": False, "linalg_vector_norm": False, "norm": False, "max": False, "min": False,
}  # fmt: skip


@register(*_REDUCTIONS)
def reduction_rules(call: OpCall) -> list[Rule]:
    """Dims that stay may be cut; a sum over a cut dim is a summand, a maximum the largest of the workers' ones.

    All else is decomposed or gathered.
    """
    if len(call.inputs) != 1:
        return []
    rank = len(call.inputs[0].shape)
    reduced, keep = _reduced_dims(call, rank)
    outputs = len(call.outputs)
    rules: list[Rule] = []
    if _REDUCTIONS[call.base_name]:
        rules.append(Rule((PARTIAL,), (PARTIAL,) * outputs))
    place = 0
    for dim, extent in enumerate(call.inputs[0].shape):
        stays = dim not in reduced
        if extent > 1 and stays:
            rules.append(Rule((Cut(dim),), (Cut(place),) * outputs, extent))
        elif extent > 1 and call.base_name == "sum" and call.inputs[0].dtype.itemsize > 0:
            rules.append(Rule((Cut(dim),), (PARTIAL,) * outputs, extent))
        elif extent > 1 and outputs == 1 and call.base_name in _EXTREMA and not call.inputs[0].dtype.is_complex:
            rules.append(Rule((Cut(dim),), (_EXTREMA[call.base_name],), extent))
        place += stays or keep
    return rules


def _reduced_dims(call: OpCall, rank: int) -> tuple[set[int], bool]:
    """Which dims are reduced, and whether they are kept with extent 1."""
    output = call.outputs[0]
    assert output is not None
    keep = len(output.shape) == rank and rank > 0
    if keep:
        given = _dim_argument(call)
        return _dims(given, rank), True
    if not output.shape:
        return set(range(rank)), False
    return _dims(_dim_argument(call), rank), False


def _dim_argument(call: OpCall) -> Any:
    if "dim" in call.kwargs:
        return call.kwargs["dim"]
    position = 2 if call.base_name in ("linalg_vector_norm", "norm") else 1
    return call.args[position] if len(call.args) > position else None


@register("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax_rules(call: OpCall) -> list[Rule]:
    rank = len(call.inputs[0].shape)
    return _same_dims(call, _dims(call.args[1], rank))


@register("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward_rules(call: OpCall) -> list[Rule]:
    """``(grad, output, dim, dtype)``; linear in the gradient."""
    rank = len(call.inputs[0].shape)
    return [*_same_dims(call, _dims(call.args[2], rank)), Rule((PARTIAL, REPLICATE), (PARTIAL,))]


def _same_dims(call: OpCall, fixed: set[int]) -> list[Rule]:
    """Inputs and outputs of one shape, of which all dims but ``fixed`` may be cut."""
    shape = call.inputs[0].shape
    if any(spec.shape != shape for spec in call.inputs):
        return []
    return [
        Rule((Cut(dim),) * len(call.inputs), (Cut(dim),) * len(call.outputs), extent)
        for dim, extent in enumerate(shape)
        if dim not in fixed and extent > 1
    ]


@register("sort", "topk", "argsort", "kthvalue", "median", "cummax", "cummin", "cumprod", "logcumsumexp")
def sort_rules(call: OpCall) -> list[Rule]:
    """All dims but the one along which entries are ordered."""
    rank = len(call.inputs[0].shape)
    if call.overload == "stable":
        fixed = call.kwargs.get("dim", -1)
    else:
        default = 2 if call.base_name in ("topk", "kthvalue") else 1  # after their `k`
        fixed = call.argument(default, "dim", -1)
    if not isinstance(fixed, int) or not rank:
        return []
    taken = fixed % rank
    if all(spec is not None and len(spec.shape) == rank for spec in call.outputs):
        drops = False
    elif all(spec is not None and len(spec.shape) == rank - 1 for spec in call.outputs):
        drops = True  # without `keepdim`
    else:
        return []
    return [
        Rule((Cut(dim),), (Cut(dim - (drops and dim > taken)),) * len(call.outputs), extent)
        for dim, extent in enumerate(call.inputs[0].shape)
        if dim != taken and extent > 1
    ]


@register("native_layer_norm")
def layer_norm_rules(call: OpCall) -> list[Rule]:
    """``(input, normalized_shape, weight, bias, eps) -> (output, mean, rstd)``: the dims before the normalised ones."""
    leading = len(call.inputs[0].shape) - len(call.args[1])
    rest = (REPLICATE,) * (len(call.inputs) - 1)
    return [
        Rule((Cut(dim), *rest), (Cut(dim),) * 3, call.inputs[0].shape[dim])
        for dim in range(leading)
        if call.inputs[0].shape[dim] > 1
    ]


@register("native_layer_norm_backward")
def layer_norm_backward_rules(call: OpCall) -> list[Rule]:
    """``(grad, input, normalized_shape, mean, rstd, weight, bias, mask)``: gradients of weight, bias are sums."""
    shape = call.inputs[0].shape
    leading = len(shape) - len(call.args[2])
    rest = (REPLICATE,) * (len(call.inputs) - 4)
    outputs = [None if spec is None else PARTIAL for spec in call.outputs]
    return [
        Rule((Cut(dim),) * 4 + rest, _with_first(outputs, Cut(dim)), shape[dim], None, (), _with_dense_statistics, True)
        for dim in range(leading)
        if shape[dim] > 1
    ]


def _with_dense_statistics(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch's kernel reads mean and rstd as if their entries lay side by side; those of a slice do not."""
    clone = torch.ops.aten.clone.default
    dense = [clone(item, memory_format=torch.contiguous_format) for item in tensors[2:4]]
    args, kwargs = fill_slots((call.args, dict(call.kwargs)), (*tensors[:2], *dense, *tensors[4:]))
    return tuple(call.target(*args, **kwargs))


def _with_first(outputs: list[Any], first: OutputSpec) -> tuple[OutputSpec, ...]:
    return (None if outputs[0] is None else first, *outputs[1:])


@register("_fused_rms_norm")
def rms_norm_rules(call: OpCall) -> list[Rule]:
    """``(input, normalized_shape, weight, eps) -> (output, rstd)``."""
    shape = call.inputs[0].shape
    rest = (REPLICATE,) * (len(call.inputs) - 1)
    return [
        Rule((Cut(dim), *rest), (Cut(dim),) * 2, shape[dim])
        for dim in range(len(shape) - len(call.args[1]))
        if shape[dim] > 1
    ]


@register("native_group_norm")
def group_norm_rules(call: OpCall) -> list[Rule]:
    """``(input, weight, bias, N, C, HxW, group, eps) -> (output, mean, rstd)``: samples are independent."""
    samples = call.inputs[0].shape[0]
    rest = (REPLICATE,) * (len(call.inputs) - 1)
    return [Rule((Cut(0), *rest), (Cut(0),) * 3, samples, _samples_at(_position_of_samples(call)))]


@register("native_group_norm_backward")
def group_norm_backward_rules(call: OpCall) -> list[Rule]:
    """``(grad, input, mean, rstd, weight, N, C, HxW, group, mask)``: gradients of weight and bias are summands."""
    samples = call.inputs[0].shape[0]
    rest = (REPLICATE,) * (len(call.inputs) - 4)
    outputs = [None if spec is None else PARTIAL for spec in call.outputs]
    return [Rule((Cut(0),) * 4 + rest, _with_first(outputs, Cut(0)), samples, _samples_at(5, output=0))]


def _position_of_samples(call: OpCall) -> int:
    return 3


def _samples_at(position: int, output: int = 0) -> Any:
    """The argument at ``position`` counts the samples: dim 0 of the output."""

    def rewrite(call: OpCall, shapes: tuple[Shape | None, ...]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        # Not the output's shape: with a mask that drops the first gradient there is none.
        shape = shapes[output]
        if shape is None:
            raise AssertionError(f"{call.name}: the count of samples cannot be told without output {output}")
        return call.target, (*call.args[:position], shape[0], *call.args[position + 1 :]), call.kwargs

    return rewrite


@register("gather", "gather_backward")
def gather_rules(call: OpCall) -> list[Rule]:
    """``gather(input, dim, index)``: other dims of equal extent; along ``dim`` only the index may be cut."""
    if call.base_name != "gather" or not call.inputs[0].shape:
        return []
    source, index = call.inputs[0].shape, call.inputs[1].shape
    taken = next(iter(_dims(call.args[1], len(source))))
    rules = [Rule((PARTIAL, REPLICATE), (PARTIAL,))]
    for dim, extent in enumerate(index):
        if extent < 2:
            continue
        if dim == taken:
            rules.append(Rule((REPLICATE, Cut(dim)), (Cut(dim),), extent))
        elif source[dim] == extent:
            rules.append(Rule((Cut(dim), Cut(dim)), (Cut(dim),), extent))
    return rules + reading_rules(call, taken, 1)


@register("scatter", "scatter_add")
def scatter_rules(call: OpCall) -> list[Rule]:
    """``scatter(self, dim, index, src)``: other dims of equal extent; `scatter_add` is linear in (self, src)."""
    if not call.inputs[0].shape or call.overload not in ("src", "value", "default"):
        return []
    source = call.inputs[0].shape
    taken = next(iter(_dims(call.args[1], len(source))))
    adds = call.base_name == "scatter_add"
    rules: list[Rule] = []
    if adds:
        rules.append(Rule((PARTIAL, REPLICATE, PARTIAL), (PARTIAL,)))
    for dim, extent in enumerate(call.inputs[1].shape):
        if extent < 2:
            continue
        if dim != taken and all(spec.shape[dim] == extent for spec in call.inputs):
            rules.append(Rule((Cut(dim),) * len(call.inputs), (Cut(dim),), extent))
        elif dim == taken and adds and call.inputs[2].shape[dim] == extent:
            rules.append(Rule((PARTIAL, Cut(dim), Cut(dim)), (PARTIAL,), extent))
    return rules + writing_rules(call, taken, 1)


@register("index_select")
def index_select_rules(call: OpCall) -> list[Rule]:
    source = call.inputs[0].shape
    if not source or not call.inputs[1].shape:
        return []
    taken = next(iter(_dims(call.args[1], len(source))))
    rules = [Rule((PARTIAL, REPLICATE), (PARTIAL,))]
    for dim, extent in enumerate(source):
        if dim != taken and extent > 1:
            rules.append(Rule((Cut(dim), REPLICATE), (Cut(dim),), extent))
    if call.inputs[1].shape[0] > 1:
        rules.append(Rule((REPLICATE, Cut(0)), (Cut(taken),), call.inputs[1].shape[0]))
    return rules + reading_rules(call, taken, 1)


@register("index", "_unsafe_index")
def index_rules(call: OpCall) -> list[Rule]:
    """``index(input, indices)`` with whole-number indices, broadcast against one another."""
    layout = _index_layout(call)
    if layout is None:
        return []
    places, start, index_rank, _ = layout
    output = call.outputs[0]
    assert output is not None
    rules = [Rule((PARTIAL, *[REPLICATE for _ in call.inputs[1:]]), (PARTIAL,))]
    for dim, place in places.items():
        if call.inputs[0].shape[dim] > 1:
            rest = tuple(REPLICATE for _ in call.inputs[1:])
            rules.append(Rule((Cut(dim), *rest), (Cut(place),), call.inputs[0].shape[dim]))
    for place in range(start, start + index_rank):
        extent = output.shape[place]
        cuts = tuple(_index_cut(spec.shape, place - start, index_rank, extent) for spec in call.inputs[1:])
        if extent > 1:
            rules.append(Rule((REPLICATE, *cuts), (Cut(place),), extent))
    return rules + index_reading_rules(call)


@register("index_put", "_unsafe_index_put")
def index_put_rules(call: OpCall) -> list[Rule]:
    """``index_put(self, indices, values, accumulate)``: with ``accumulate``, rows of the values may be spread."""
    accumulate = bool(call.argument(3, "accumulate", False))
    layout = _index_layout(call, without_last=True)
    if layout is None:
        return []
    places, start, index_rank, rank = layout
    indices, values = call.inputs[1:-1], call.inputs[-1]
    rest = tuple(REPLICATE for _ in indices)
    rules: list[Rule] = []
    for dim, place in places.items():
        extent = call.inputs[0].shape[dim]
        own = place - (rank - len(values.shape))
        cut = own >= 0 and values.shape[own] == extent
        if extent > 1:
            rules.append(Rule((Cut(dim), *rest, Cut(own) if cut else REPLICATE), (Cut(dim),), extent))
    rules += index_writing_rules(call)
    if not accumulate:
        return rules
    rules.append(Rule((PARTIAL, *rest, PARTIAL), (PARTIAL,)))
    for place in range(start, start + index_rank):
        own = place - (rank - len(values.shape))
        if own < 0 or values.shape[own] < 2:
            continue
        extent = values.shape[own]
        cuts = tuple(_index_cut(spec.shape, place - start, index_rank, extent) for spec in indices)
        if any(isinstance(cut, Cut) for cut in cuts):
            rules.append(Rule((PARTIAL, *cuts, Cut(own)), (PARTIAL,), extent))
    return rules


def _index_layout(call: OpCall, *, without_last: bool = False) -> tuple[dict[int, int], int, int, int] | None:
    """How the result of indexing lies: ``(input dim -> place of the unindexed dims, first place of the broadcast
    indices, their rank, rank of the result)``; None with boolean masks, whose result has no fixed shape."""
    given = call.args[1]
    indices = call.inputs[1:-1] if without_last else call.inputs[1:]
    if not indices or any(spec.dtype.itemsize == 1 for spec in indices):
        return None
    rank_in = len(call.inputs[0].shape)
    indexed = [dim for dim, item in enumerate(given) if isinstance(item, Slot)]
    index_rank = max(len(spec.shape) for spec in indices)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    start = indexed[0] if adjacent else 0
    kept = [dim for dim in range(rank_in) if dim not in indexed]
    places = {}
    for count, dim in enumerate(kept):
        places[dim] = count + index_rank if count >= start else count
    return places, start, index_rank, len(kept) + index_rank


def _index_cut(shape: tuple[int, ...], place: int, index_rank: int, extent: int) -> InputSpec:
    own = place - (index_rank - len(shape))
    return Cut(own) if own >= 0 and shape[own] == extent else REPLICATE


_BATCH_NORM = ("_native_batch_norm_legit_functional", "_batch_norm_with_update_functional", "native_batch_norm")


@register(*_BATCH_NORM, "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm_no_update")
def batch_norm_rules(call: OpCall) -> list[Rule]:
    """Channels (dim 1) are independent; samples only when the statistics are given (not training)."""
    source = call.inputs[0].shape
    rules: list[Rule] = []
    if not is_training_batch_norm(call) and source[0] > 1:
        outputs = tuple(_sample_output(spec, source) for spec in call.outputs)
        rules.append(Rule((Cut(0), *[REPLICATE for _ in call.inputs[1:]]), outputs, source[0]))
    return rules


def _sample_output(spec: Any, source: Shape) -> OutputSpec:
    return None if spec is None else Cut(0) if spec.shape == source else REPLICATE


def is_training_batch_norm(call: OpCall) -> bool:
    """Whether the op computes statistics over its own samples."""
    if call.base_name == "_native_batch_norm_legit_no_training":
        return False
    for name in ("training", "train"):
        given = call.schema_argument(name)
        if given is not None:
            return bool(given)
    return "with_update" in call.base_name


def local_batch_norm_rules(call: OpCall) -> list[Rule]:
    """Batch norm in training with the statistics of each worker's own samples.

    The saved statistics differ between workers though they count as whole: only the op's own backward, which runs on
    the same samples, reads them. Running statistics are averaged over the axis, weighted by the samples.
    """
    if call.base_name not in (*_BATCH_NORM, *_BACKWARD, "_native_batch_norm_legit"):
        return []
    source = call.inputs[0].shape
    if source[0] < 2:
        return []
    if call.base_name in _BACKWARD:
        cuts = tuple(Cut(0) if spec.shape == source else REPLICATE for spec in call.inputs)
        outputs: tuple[OutputSpec, ...] = tuple(
            None if s is None else Cut(0) if s.shape == source else PARTIAL for s in call.outputs
        )
        if not is_training_batch_norm(call):
            return [Rule(cuts, outputs, source[0])]
        positions = _RUNNING[call.base_name]
        unread = {call.args[place].index for place in positions if isinstance(call.args[place], Slot)}
        specs = tuple(Ignored() if index in unread else cut for index, cut in enumerate(cuts))
        return [Rule(specs, outputs, source[0], _without_running_statistics)]
    if call.base_name in (*_BATCH_NORM, "_native_batch_norm_legit") and is_training_batch_norm(call):
        outputs = tuple(_sample_output(spec, source) for spec in call.outputs)
        averaged = {"_native_batch_norm_legit_functional": (3, 4), "_batch_norm_with_update_functional": (4, 5)}
        indices = averaged.get(call.base_name, ())
        final = tuple(PARTIAL if i in indices and o is not None else o for i, o in enumerate(outputs))
        return [Rule((Cut(0), *[REPLICATE for _ in call.inputs[1:]]), final, source[0], averaged=indices)]
    return []


_BACKWARD = ("native_batch_norm_backward", "batch_norm_backward")
# Where the running mean and variance stand; in training the backward does not read them.
_RUNNING = {"native_batch_norm_backward": (3, 4), "batch_norm_backward": (3, 4)}


def _without_running_statistics(
    call: OpCall, shapes: tuple[Shape | None, ...]
) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    return call.target, (*call.args[:3], None, None, *call.args[5:]), call.kwargs


@register(*_BACKWARD)
def batch_norm_backward_rules(call: OpCall) -> list[Rule]:
    """Without training the samples are independent, and gradients of weight and bias are summands."""
    return [] if is_training_batch_norm(call) else local_batch_norm_rules(call)


__all__ = ["Ignored", "local_batch_norm_rules"]
