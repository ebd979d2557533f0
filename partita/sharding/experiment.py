"""Trying a rule: run an op whole and in pieces on random tensors, and see whether the pieces recombine to the whole.

Runs real kernels in this process, so only for rules whose pieces have consistent shapes (all written ones).
"""

from __future__ import annotations

from typing import Any

import torch

from partita.sharding.calls import OpCall, TensorSpec, fill_slots
from partita.sharding.placement import Partial, Placement, Replicate, Shard
from partita.sharding.rules import Blocks, Rule


def rule_holds(call: OpCall, rule: Rule, blocks: Blocks, *, seed: int = 0) -> bool:
    """Whether ``call`` run by ``rule`` over ``len(blocks.counts)`` workers equals the whole run, on random inputs.

    Whole numbers are drawn from {0, 1}, which are valid indices wherever extents are at least 2; floats have both
    signs. Rules that cut nothing are tried with as many workers as ``blocks`` has.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(blocks.counts)
    wholes = [_draw(spec, generator) for spec in call.inputs]
    placements = rule.input_placements(blocks)
    parts = [_take_apart(w, p, size, generator) for w, p in zip(wholes, placements, strict=True)]
    expected = _results(call.target, call.args, call.kwargs, tuple(wholes))
    outputs = rule.output_placements(blocks)
    locals_: list[tuple[Any, ...]] = []
    for worker in range(size):
        target, args, kwargs = call.target, call.args, call.kwargs
        if rule.rewrite is not None:
            pairs = zip(call.outputs, outputs, strict=True)
            shapes = tuple(None if s is None or p is None else _local(s.shape, p, worker) for s, p in pairs)
            target, args, kwargs = rule.rewrite(call, shapes)
        locals_.append(_results(target, args, kwargs, tuple(part[worker] for part in parts)))
    for index, placement in enumerate(outputs):
        if placement is None or call.outputs[index] is None:
            continue
        got = [result[index] for result in locals_]
        if not all(_equal(whole, expected[index]) for whole in _put_together(got, placement)):
            return False
    return True


def _draw(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    """A random tensor that lies in memory as ``spec`` says."""
    drawn = _draw_values(spec, generator)
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype).copy_(drawn) if _dense(spec) else drawn


def _dense(spec: TensorSpec) -> bool:
    """Whether entries have places of their own (an expanded tensor's have not)."""
    return len(spec.stride) == len(spec.shape) and 0 not in spec.stride


def _draw_values(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype is torch.bool:
        return torch.rand(spec.shape, generator=generator) > 0.5
    if not spec.dtype.is_floating_point:
        return torch.randint(0, 2, spec.shape, generator=generator).to(spec.dtype)
    return torch.randn(spec.shape, generator=generator).to(spec.dtype)


def _local(shape: tuple[int, ...], placement: Placement, worker: int) -> tuple[int, ...]:
    if not isinstance(placement, Shard):
        return shape
    return (*shape[: placement.dim], placement.sizes[worker], *shape[placement.dim + 1 :])


def _take_apart(
    whole: torch.Tensor, placement: Placement | None, size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    if isinstance(placement, Partial):
        rest = [_draw(TensorSpec.of(whole), generator) for _ in range(size - 1)]
        return [*rest, whole - torch.stack(rest).sum(0).to(whole.dtype)]
    if not isinstance(placement, Shard):
        return [whole] * size
    run = placement.run
    runs = _in_runs(whole, placement)
    pieces = torch.split(runs, list(run.sizes), run.dim)
    return [piece.reshape(_local(tuple(whole.shape), placement, i)).contiguous() for i, piece in enumerate(pieces)]


def _in_runs(whole: torch.Tensor, placement: Shard) -> torch.Tensor:
    if placement.outer == 1:
        return whole
    run_length = whole.shape[placement.dim] // placement.outer
    result: torch.Tensor = whole.unflatten(placement.dim, (placement.outer, run_length))
    return result


def _put_together(parts: list[torch.Tensor], placement: Placement) -> list[torch.Tensor]:
    """What the whole is according to ``parts`` (every worker's word where each has the whole)."""
    if isinstance(placement, Replicate):
        return parts
    if isinstance(placement, Partial):
        return [torch.stack(parts).sum(0)]
    if placement.outer == 1:
        return [torch.cat(parts, placement.dim)]
    runs = [p.unflatten(placement.dim, (placement.outer, p.shape[placement.dim] // placement.outer)) for p in parts]
    return [torch.cat(runs, placement.dim + 1).flatten(placement.dim, placement.dim + 1)]


def _results(target: Any, args: Any, kwargs: Any, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    filled_args, filled_kwargs = fill_slots((args, dict(kwargs)), tensors)
    result = target(*filled_args, **filled_kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape:
        return False
    if not right.dtype.is_floating_point:
        return bool(torch.equal(left.to(right.dtype), right))
    scale = max(1.0, float(right.nan_to_num(0, 0, 0).abs().max()) if right.numel() else 1.0)
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4 * scale, equal_nan=True)
