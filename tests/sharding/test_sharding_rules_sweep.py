"""The frequent ops of training graphs in random shapes, types and layouts: every rule, judged without the library's own
judge (`partita.sharding.experiment`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from partita.sharding.calls import OpCall, fill_slots
from partita.sharding.placement import Extremum, Partial, Replicate, Shard
from partita.sharding.regenerate import call_of
from partita.sharding.rules import Blocks, Rule, part_of
from partita.sharding.ruleset import rules_of

aten = torch.ops.aten
Draw = Callable[[Any], Any]


def values(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """With ties, and not always contiguous."""
    x = torch.randint(-6, 7, shape).to(dtype) if dtype is not torch.bool else torch.randint(0, 2, shape).bool()
    if dtype.is_floating_point and draw(st.booleans()):
        x = x * torch.rand(shape, dtype=dtype)
    if x.dim() > 1 and draw(st.booleans()):
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def shapes(draw: Draw, least: int = 1) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 5), min_size=least, max_size=4)))


def dims(draw: Draw, rank: int) -> list[int]:
    chosen = draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=rank))
    return [dim - rank if draw(st.booleans()) else dim for dim in sorted(chosen)]


def one_dim(draw: Draw, rank: int) -> int:
    return int(draw(st.integers(-rank, rank - 1)))


NUMBERS = [torch.float64, torch.int64, torch.int32]
ANY = [*NUMBERS, torch.bool]


def binary(draw: Draw) -> tuple[Any, ...]:
    shape = shapes(draw)
    other = tuple(extent if draw(st.booleans()) else 1 for extent in shape)[draw(st.integers(0, len(shape))) :]
    operands = [values(draw, extents, draw(st.sampled_from(NUMBERS))) for extents in (shape, other)]
    if draw(st.booleans()):
        operands.reverse()
    op = draw(st.sampled_from([aten.add, aten.sub, aten.mul, aten.maximum, aten.lt, aten.eq]))
    return (getattr(op, "Tensor", None) or op.default, *operands)


def scalar(draw: Draw) -> tuple[Any, ...]:
    linear = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor]
    others = [aten.pow.Tensor_Scalar, aten.gt.Scalar, aten.rsub.Scalar, aten.clamp_min.default]
    op = draw(st.sampled_from([*linear, *others]))
    return op, values(draw, shapes(draw), draw(st.sampled_from(NUMBERS))), 2


def division(draw: Draw) -> tuple[Any, ...]:
    shape = shapes(draw)
    given_ = values(draw, shape, draw(st.sampled_from(NUMBERS))), values(draw, shape[1:]).abs() + 1
    mode = draw(st.sampled_from([None, "floor", "trunc", "plain"]))
    return (aten.div.Tensor, *given_) if mode == "plain" else (aten.div.Tensor_mode, *given_, {"rounding_mode": mode})


def rounding(draw: Draw) -> tuple[Any, ...]:
    op = draw(st.sampled_from([aten.floor, aten.round, aten.sign, aten.relu, aten.exp, aten.neg, aten.abs, aten.gelu,
                               aten.logical_not, aten.clone, aten.nan_to_num, aten.isnan]))  # fmt: skip
    return op.default, values(draw, shapes(draw))


def gradient(draw: Draw) -> tuple[Any, ...]:
    shape = shapes(draw)
    pair = values(draw, shape), values(draw, shape)
    return draw(st.sampled_from([
        (aten.threshold_backward.default, *pair, 0), (aten.gelu_backward.default, *pair),
        (aten.sigmoid_backward.default, *pair), (aten.tanh_backward.default, *pair),
        (aten.silu_backward.default, *pair), (aten.hardtanh_backward.default, *pair, -1.0, 1.0),
    ]))  # fmt: skip


def cast(draw: Draw) -> tuple[Any, ...]:
    source = values(draw, shapes(draw), draw(st.sampled_from(ANY)))
    return aten._to_copy.default, source, {"dtype": draw(st.sampled_from([*ANY, torch.float32]))}


def chosen(draw: Draw) -> tuple[Any, ...]:
    shape = shapes(draw)
    mask = values(draw, shape[draw(st.integers(0, len(shape) - 1)) :], torch.bool)
    if draw(st.booleans()):
        return aten.masked_fill.Scalar, values(draw, shape), mask, draw(st.sampled_from([0, 0.0, 1.5]))
    other = values(draw, shape) if draw(st.booleans()) else torch.zeros((), dtype=torch.float64)
    return aten.where.self, mask, values(draw, shape), other


def reduction(draw: Draw) -> tuple[Any, ...]:
    x = values(draw, shapes(draw), draw(st.sampled_from(ANY)))
    over, keep = dims(draw, x.dim()), draw(st.booleans())
    if not x.dtype.is_floating_point:
        op = draw(st.sampled_from([aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dims]))
        return op, x, over, keep
    if draw(st.booleans()):
        op = draw(st.sampled_from([aten.sum, aten.mean, aten.max, aten.min, aten.any, aten.prod]))
        return op.default, x
    lists = [aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default]
    return draw(st.sampled_from(lists)), x, over, keep


def ordering(draw: Draw) -> tuple[Any, ...]:
    x = values(draw, shapes(draw))
    dim, keep = one_dim(draw, x.dim()), draw(st.booleans())
    return draw(st.sampled_from([
        (aten.max.dim, x, dim, keep), (aten.argmax.default, x, dim, keep), (aten.argmin.default, x, dim, keep),
        (aten.sort.default, x, dim, keep), (aten.sort.stable, x, {"stable": True, "dim": dim}),
        (aten.topk.default, x, 1, dim), (aten.cumsum.default, x, dim), (aten.cumprod.default, x, dim),
        (aten.cummax.default, x, dim), (aten.median.dim, x, dim, keep), (aten._softmax.default, x, dim, False),
        (aten._log_softmax.default, x, dim, False),
    ]))  # fmt: skip


def product(draw: Draw) -> tuple[Any, ...]:
    n, m, k, batch = (draw(st.integers(1, 5)) for _ in range(4))
    bias = values(draw, draw(st.sampled_from([(m,), (n, m), (1, m), (n, 1)])))
    left, right = values(draw, (n, k)), values(draw, (k, m))
    return draw(st.sampled_from([
        (aten.mm.default, left, right), (aten.addmm.default, bias, left, right, {"beta": 0.5, "alpha": 2.0}),
        (aten.bmm.default, values(draw, (batch, n, k)), values(draw, (batch, k, m))),
        (aten.baddbmm.default, values(draw, (1, n, m)), values(draw, (batch, n, k)), values(draw, (batch, k, m))),
    ]))  # fmt: skip


def moved(draw: Draw) -> tuple[Any, ...]:
    x = values(draw, shapes(draw), draw(st.sampled_from(ANY)))
    rank, dim = x.dim(), one_dim(draw, x.dim())
    extent, shape = x.shape[dim], list(x.shape)
    start = draw(st.integers(0, extent - 1))
    end = draw(st.one_of(st.integers(start + 1, extent), st.just(2**63 - 1)))
    return draw(st.sampled_from([
        (aten.permute.default, x, draw(st.permutations(range(rank)))), (aten.unsqueeze.default, x, dim),
        (aten.squeeze.dims, x, [dim]), (aten.slice.Tensor, x, dim, start, end), (aten.select.int, x, dim, start),
        (aten.cat.default, [x, x], dim), (aten.stack.default, [x, x], dim), (aten.flip.default, x, [dim]),
        (aten.split.Tensor, x, 2, dim), (aten.expand.default, x, [3, *shape]), (aten.transpose.int, x, 0, dim),
        (aten.constant_pad_nd.default, x, [1, 0], draw(st.sampled_from([0, 1]))), (aten.roll.default, x, [1], [dim]),
        (aten.tril.default, x) if rank > 1 else (aten.clone.default, x), (aten.repeat.default, x, [2, *[1] * rank]),
        (aten.full_like.default, x, 1), (aten.new_zeros.default, x, shape),
        (aten.slice_backward.default, x, [e + (d == dim % rank) for d, e in enumerate(shape)], dim % rank, 1, 2**62, 1),
    ]))  # fmt: skip


def normalised(draw: Draw) -> tuple[Any, ...]:
    x = values(draw, (*shapes(draw), 3)) + torch.rand(3, dtype=torch.float64)
    weight, bias = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    result, mean, deviation = aten.native_layer_norm.default(x, [3], weight, bias, 1e-5)
    mask = draw(st.sampled_from([[True] * 3, [True, False, False], [False, True, True]]))
    grads = (torch.rand_like(result), x, [3], mean, deviation, weight, bias, mask)
    forward = (aten.native_layer_norm.default, x, [3], weight, bias, 1e-5)
    return draw(st.sampled_from([forward, (aten.native_layer_norm_backward.default, *grads)]))


FAMILIES = [binary, scalar, division, rounding, gradient, cast, chosen, reduction, ordering, product, moved, normalised]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_rule_recombines(family: Callable[[Draw], tuple[Any, ...]], data: st.DataObject) -> None:
    target, *args = family(data.draw)
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    call = call_of(target, *args, **kwargs)
    tensors: list[Tensor] = []
    torch.fx.node.map_aggregate((args, kwargs), lambda x: tensors.append(x) if isinstance(x, Tensor) else None)
    expected = run(target, call.args, dict(call.kwargs), tensors)
    for rule in rules_of(call):
        for blocks in ways(rule, data.draw):
            judge(call, rule, blocks, tensors, expected)


def run(target: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> list[Any]:
    filled, named = fill_slots((args, kwargs), tuple(tensors))
    result = target(*filled, **named)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def ways(rule: Rule, draw: Draw) -> Iterator[Blocks]:
    for size in (2, 4):
        if rule.extent == 0:
            yield Blocks((1,) * size)
        elif rule.extent >= size:
            cuts = sorted(draw(st.sets(st.integers(1, rule.extent - 1), min_size=size - 1, max_size=size - 1)))
            yield Blocks(tuple(b - a for a, b in zip([0, *cuts], [*cuts, rule.extent], strict=True)))


def judge(call: OpCall, rule: Rule, blocks: Blocks, tensors: list[Tensor], expected: list[Any]) -> None:
    parts = [pieces(x, p, len(blocks.counts)) for x, p in zip(tensors, rule.input_placements(blocks), strict=True)]
    results = []
    for worker in range(len(blocks.counts)):
        part, target, args, kwargs = part_of(call, rule, blocks, worker), call.target, call.args, call.kwargs
        own = [items[worker] for items in parts]
        if rule.local is not None:
            results.append(list(rule.local(call, part, tuple(own))))
            continue
        if rule.rewrite is not None:
            target, args, kwargs = rule.rewrite(call, part.output_shapes)
        results.append(run(target, args, dict(kwargs), own))
    for index, placement in enumerate(rule.output_placements(blocks)):
        if call.outputs[index] is not None:
            for whole in wholes([result[index] for result in results], placement):
                text = f"{call.name} {call.args} {[spec.shape for spec in call.inputs]} by {rule.text()} {blocks}"
                assert whole.dtype is expected[index].dtype, text
                same = torch.allclose(whole.double(), expected[index].double(), rtol=1e-9, atol=1e-9, equal_nan=True)
                assert whole.shape == expected[index].shape and same, text


def pieces(x: Tensor, placement: Any, size: int) -> list[Tensor]:
    if isinstance(placement, Shard):
        assert placement.outer == 1 or placement.run.dim == placement.dim + 1
        if placement.outer == 1:
            return list(torch.split(x, list(placement.sizes), placement.dim))
        runs = x.unflatten(placement.dim, (placement.outer, -1))
        cut = torch.split(runs, list(placement.run.sizes), placement.run.dim)
        return [piece.flatten(placement.dim, placement.dim + 1) for piece in cut]
    if isinstance(placement, Partial):
        assert x.dtype is not torch.bool
        rest = [torch.randint(-5, 6, x.shape).to(x.dtype) for _ in range(size - 1)]
        return [*rest, x - sum(rest, torch.zeros_like(x))]
    return [x] * size


def wholes(parts: list[Tensor], placement: Any) -> list[Tensor]:
    if isinstance(placement, Shard):
        runs = [part.unflatten(placement.dim, (placement.outer, -1)) for part in parts]
        return [torch.cat(runs, placement.dim + 1).flatten(placement.dim, placement.dim + 1)]
    if isinstance(placement, Partial):
        return [sum(parts[1:], parts[0])]
    if isinstance(placement, Extremum):
        stacked = torch.stack(parts)
        return [stacked.amax(0) if placement.kind == "max" else stacked.amin(0)]
    assert isinstance(placement, Replicate)
    return parts
