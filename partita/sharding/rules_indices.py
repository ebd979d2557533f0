"""Rules of look-ups whose table is cut along the very dim that the indices count: vocabulary parallelism.

A worker has the entries ``a .. b`` of the table's dim. Let i be an index, i' = i - a, and call i *inside* if
0 <= i' < b - a.

* Reading (`embedding`, `gather`, `index`, `index_select`): entries that lie inside are read at i', the others are 0;
  exactly one worker reads each, so the results are summands.
* Writing (`scatter`, `index_put`, the gradient of `embedding`): the piece gets one more entry at its end, into which
  goes what is not inside, and which is dropped afterwards. The results are the pieces of the whole.

Vocabulary-parallel embeddings: Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from partita.sharding.calls import OpCall, Slot
from partita.sharding.rules import PARTIAL, REPLICATE, Cut, LocalForm, Part, Rule

aten = torch.ops.aten


def _inside(indices: torch.Tensor, part: Part, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices relative to the own piece, and which are inside; ``extent`` is that of the whole (indices from its end
    are negative)."""
    moved = torch.where(indices < 0, indices + extent, indices) - part.start
    return moved, (moved >= 0) & (moved < part.end - part.start)


def _for_reading(indices: torch.Tensor, part: Part, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices that are valid everywhere, and where the result does not count."""
    moved, inside = _inside(indices, part, extent)
    return torch.where(inside, moved, 0), ~inside


def _for_writing(indices: torch.Tensor, part: Part, extent: int) -> torch.Tensor:
    """Indices into the piece with its spare entry."""
    moved, inside = _inside(indices, part, extent)
    return torch.where(inside, moved, part.end - part.start)


def _with_spare(piece: torch.Tensor, dim: int) -> torch.Tensor:
    pads = [0, 0] * (piece.dim() - 1 - dim) + [0, 1]
    result: torch.Tensor = aten.constant_pad_nd.default(piece, pads, 0)
    return result


def _in_place_of(call: OpCall, new: dict[int, Any]) -> tuple[Any, ...]:
    """The arguments of ``call`` with tensors in its slots: ``new[index]`` for the slot of that number."""

    def fill(item: Any) -> Any:
        if isinstance(item, Slot):
            return new[item.index]
        return [fill(inner) for inner in item] if isinstance(item, (list, tuple)) else item

    return tuple(fill(item) for item in call.args)


def embedding_rules(call: OpCall) -> list[Rule]:
    """``embedding(weight, indices, ...)``: rows of the weight."""
    rows = call.inputs[0].shape[0]

    def local(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        weight, indices = tensors
        safe, outside = _for_reading(indices, part, rows)
        return (aten.embedding.default(weight, safe).masked_fill(outside.unsqueeze(-1), 0),)

    return [Rule((Cut(0), REPLICATE), (PARTIAL,), rows, local=local)]


def embedding_backward_rules(call: OpCall) -> list[Rule]:
    """``embedding_dense_backward(grad, indices, num_weights, padding_idx, scale_grad_by_freq)``: rows of the result."""
    rows, padding, scales = call.args[2:5]

    def local(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        grad, indices = tensors
        num_own = part.end - part.start
        written = _for_writing(torch.where(indices == padding, rows, indices), part, rows)
        result = aten.embedding_dense_backward.default(grad, written, num_own + 1, -1, scales)
        return (result.narrow(0, 0, num_own),)

    return [Rule((REPLICATE, REPLICATE), (Cut(0),), rows, local=local)]


def nll_loss_backward_rules(call: OpCall) -> list[Rule]:
    """``nll_loss_backward(grad, input, target, weight, reduction, ignore_index, total_weight)``: the classes.

    With w the classes' weights, the gradient is ``-w[target] grad`` (by the total weight, if the loss is a mean) at the
    target's class and 0 elsewhere.
    """
    shape = call.inputs[1].shape
    dim = 0 if len(shape) < 2 else 1
    weight_slot = call.args[3]

    def local(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        grad, source, target = tensors[:3]
        reduction, ignored = call.args[4:6]
        counts = target != ignored
        written = _for_writing(torch.where(counts, target, shape[dim]).unsqueeze(dim), part, shape[dim])
        places = aten.scatter.value(_with_spare(torch.zeros_like(source), dim), dim, written, -1.0)
        result = places.narrow(dim, 0, part.end - part.start)
        if isinstance(weight_slot, Slot):
            result = result * tensors[weight_slot.index].view([-1] + [1] * (source.dim() - 1 - dim))
        share = grad / tensors[-1] if reduction == 1 else grad
        return (result * torch.where(counts, share, 0).unsqueeze(dim),)

    weights = (Cut(0),) if isinstance(weight_slot, Slot) else ()
    return [Rule((REPLICATE, Cut(dim), REPLICATE, *weights, REPLICATE), (Cut(dim),), shape[dim], local=local)]


def reading_rules(call: OpCall, dim: int, index: int) -> list[Rule]:
    """``op(table, ..., index, ...)`` that reads along ``dim`` by input number ``index``: cut along that dim.

    The index has the result's shape (`gather`), or its one dim is dim ``dim`` of the result (`index_select`).
    """
    extent = call.inputs[0].shape[dim]

    def local(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        safe, outside = _for_reading(tensors[index], part, extent)
        result = call.target(*_in_place_of(call, {0: tensors[0], index: safe}), **call.kwargs)
        if outside.dim() != result.dim():
            outside = outside.view([-1] + [1] * (result.dim() - 1 - dim))
        return (result.masked_fill(outside, 0),)

    inputs = [Cut(dim) if place == 0 else REPLICATE for place in range(len(call.inputs))]
    return [Rule(tuple(inputs), (PARTIAL,), extent, local=local)]


def writing_rules(call: OpCall, dim: int, index: int) -> list[Rule]:
    """``op(table, ..., index, ..., source)`` that writes along ``dim`` by input number ``index``."""
    extent = call.inputs[0].shape[dim]
    inputs = [Cut(dim) if place == 0 else REPLICATE for place in range(len(call.inputs))]
    return [Rule(tuple(inputs), (Cut(dim),), extent, local=_writing(dim, index, extent))]


def _writing(dim: int, index: int, extent: int) -> LocalForm:
    def local(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        new = dict(enumerate(tensors))
        new[0], new[index] = _with_spare(tensors[0], dim), _for_writing(tensors[index], part, extent)
        result = call.target(*_in_place_of(call, new), **call.kwargs)
        return (result.narrow(dim, 0, part.end - part.start),)

    return local


def index_reading_rules(call: OpCall) -> list[Rule]:
    """``index(table, indices)``: one rule for every indexed dim of the table."""
    rules = []
    for dim, slot in enumerate(call.args[1]):
        if isinstance(slot, Slot) and call.inputs[0].shape[dim] > 1:
            inputs = [Cut(dim) if place == 0 else REPLICATE for place in range(len(call.inputs))]
            form = _index_reading(slot.index, call.inputs[0].shape[dim], *_index_place(call))
            rules.append(Rule(tuple(inputs), (PARTIAL,), call.inputs[0].shape[dim], local=form))
    return rules


def _index_place(call: OpCall) -> tuple[int, int]:
    """The first dim of the result that the broadcast indices make, and the number of dims after them."""
    given = [dim for dim, item in enumerate(call.args[1]) if isinstance(item, Slot)]
    adjacent = given == list(range(given[0], given[-1] + 1))
    start = given[0] if adjacent else 0
    return start, len(call.inputs[0].shape) - len(given) - start


def _index_reading(index: int, extent: int, start: int, num_after: int) -> LocalForm:
    def local(call: OpCall, part: Part, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        safe, outside = _for_reading(tensors[index], part, extent)
        result = call.target(*_in_place_of(call, {**dict(enumerate(tensors)), index: safe}), **call.kwargs)
        shape = list(outside.shape) + [1] * num_after  # aligned at the right, broadcast at the left
        return (result.masked_fill(outside.view(shape), 0),)

    return local


def index_writing_rules(call: OpCall) -> list[Rule]:
    """``index_put(table, indices, values, accumulate)``: one rule for every indexed dim of the table."""
    rules = []
    for dim, slot in enumerate(call.args[1]):
        if isinstance(slot, Slot) and call.inputs[0].shape[dim] > 1:
            rules += writing_rules(call, dim, slot.index)
    return rules
