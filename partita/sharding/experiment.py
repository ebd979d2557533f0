"""Trying a rule: run an op whole and in pieces on random tensors, and see whether the pieces recombine to the whole.

Runs real kernels in this process, so only for rules whose pieces have consistent shapes (all written ones); rules that
are merely guessed are tried in a process of their own (see `partita.sharding.helper`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from partita.graph.custom_ops import is_opaque, with_real_buffers
from partita.sharding.calls import OpCall, TensorSpec, fill_slots
from partita.sharding.local_forms import run_local
from partita.sharding.placement import (
    Extremum,
    Partial,
    Placement,
    Replicate,
    Shard,
    Windows,
    WindowSums,
    local_shape,
)
from partita.sharding.rules import Blocks, Ignored, Part, Rule, part_of


@dataclass(frozen=True)
class Draw:
    """How random inputs are drawn.

    ``domain`` of floats: ``"normal"`` (both signs), ``"unit"`` (between 0.05 and 0.95), ``"definite"`` (square matrices
    are symmetric positive definite, all else normal). Floats are multiplied by ``scale``. Whole numbers are drawn from
    ``range(num_whole)``: 0 and 1 are valid indices wherever extents are at least 2.
    """

    domain: str = "normal"
    scale: float = 1.0
    num_whole: int = 2


def rule_holds(call: OpCall, rule: Rule, blocks: Blocks, *, seed: int = 0, draw: Draw | None = None) -> bool:
    """Whether ``call`` run by ``rule`` over ``len(blocks.counts)`` workers equals the whole run, on random inputs.

    Rules that cut nothing are tried with as many workers as ``blocks`` has.
    """
    draw = draw or Draw()
    generator = torch.Generator().manual_seed(seed)
    wholes = _with_fitting_indices(call, [draw_tensor(spec, generator, draw) for spec in call.inputs])
    precise = all(spec.dtype.itemsize >= 8 for spec in call.inputs if spec.dtype.is_floating_point)
    return recombines(call, rule, blocks, wholes, generator=generator, draw=draw, precise=precise)


def _with_fitting_indices(call: OpCall, wholes: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of a max pooling takes the indices that its forward gave, and no others are of use."""
    forward = {
        "max_pool2d_with_indices_backward": torch.ops.aten.max_pool2d_with_indices.default,
        "max_pool3d_with_indices_backward": torch.ops.aten.max_pool3d_with_indices.default,
    }.get(call.base_name)
    if forward is None:
        return wholes
    image, indices = call.args[1].index, call.args[-1].index
    own = forward(wholes[image], *call.args[2:-1])[1]
    return [own if place == indices else whole for place, whole in enumerate(wholes)]


def recombines(
    call: OpCall,
    rule: Rule,
    blocks: Blocks,
    wholes: Sequence[torch.Tensor],
    *,
    generator: torch.Generator,
    draw: Draw | None = None,
    precise: bool = False,
) -> bool:
    """Whether ``call`` run by ``rule`` on the parts of ``wholes`` gives what it gives on ``wholes``.

    ``generator`` and ``draw`` tell how summands are drawn.
    """
    expected = run_call(call.target, call.args, call.kwargs, tuple(wholes))
    outputs = rule.output_placements(blocks)
    locals_ = run_parts(call, rule, blocks, wholes, generator, draw or Draw())
    for index, placement in enumerate(outputs):
        if placement is None or call.outputs[index] is None or is_opaque(call.target, index):
            continue
        got = [result[index] for result in locals_]
        if not all(equal(whole, expected[index], precise) for whole in put_together(got, placement)):
            return False
    return True


def run_parts(
    call: OpCall,
    rule: Rule,
    blocks: Blocks,
    wholes: Sequence[torch.Tensor],
    generator: torch.Generator,
    draw: Draw,
) -> list[tuple[Any, ...]]:
    """Every worker's results of ``call`` by ``rule``."""
    size = len(blocks.counts)
    parts = [
        take_apart(w, p, size, generator, draw) for w, p in zip(wholes, rule.input_placements(blocks), strict=True)
    ]
    return [
        run_part(call, rule, part_of(call, rule, blocks, worker), tuple(part[worker] for part in parts))
        for worker in range(size)
    ]


def run_part(call: OpCall, rule: Rule, part: Part, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """One worker's results of ``call`` by ``rule``, from its local ``tensors``."""
    if rule.local is not None:
        read = tuple(None if isinstance(s, Ignored) else t for s, t in zip(rule.inputs, tensors, strict=True))
        return run_local(call, rule, part, read)
    target, args, kwargs = call.target, call.args, call.kwargs
    if rule.rewrite is not None:
        target, args, kwargs = rule.rewrite(call, part.output_shapes)
    return run_call(target, args, kwargs, tensors)


def draw_tensor(spec: TensorSpec, generator: torch.Generator, draw: Draw) -> torch.Tensor:
    """A random tensor that lies in memory as ``spec`` says."""
    drawn = _draw_values(spec, generator, draw)
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype).copy_(drawn) if _dense(spec) else drawn


def _dense(spec: TensorSpec) -> bool:
    """Whether entries have places of their own (an expanded tensor's have not)."""
    return len(spec.stride) == len(spec.shape) and 0 not in spec.stride


def _draw_values(spec: TensorSpec, generator: torch.Generator, draw: Draw) -> torch.Tensor:
    if spec.dtype is torch.bool:
        return torch.rand(spec.shape, generator=generator) > 0.5
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return torch.randint(0, draw.num_whole, spec.shape, generator=generator).to(spec.dtype)
    # Drawn in at least single precision: narrow types have no generators of their own.
    wide = spec.dtype if spec.dtype.itemsize >= 4 else torch.float32
    if draw.domain == "unit" and not spec.dtype.is_complex:
        values = torch.rand(spec.shape, generator=generator, dtype=wide) * 0.9 + 0.05
    else:
        values = torch.randn(spec.shape, generator=generator, dtype=wide)
    if draw.domain == "definite" and values.dim() >= 2 and values.shape[-1] == values.shape[-2]:
        values = values @ values.mH + torch.eye(values.shape[-1], dtype=wide)
    return (values * draw.scale).to(spec.dtype)


def take_apart(
    whole: torch.Tensor, placement: Placement | None, size: int, generator: torch.Generator, draw: Draw
) -> list[torch.Tensor]:
    """The parts of ``whole`` that the workers have; summands have both signs whatever the domain of the whole."""
    if isinstance(placement, Partial):
        signed = Draw(scale=draw.scale, num_whole=draw.num_whole)
        rest = [draw_tensor(TensorSpec.of(whole), generator, signed) for _ in range(size - 1)]
        return [*rest, whole - torch.stack(rest).sum(0).to(whole.dtype)]
    if isinstance(placement, Windows):
        return _windows(whole, placement)
    if not isinstance(placement, Shard):
        return [whole] * size
    run = placement.run
    runs = _in_runs(whole, placement)
    pieces = torch.split(runs, list(run.sizes), run.dim)
    shape = tuple(whole.shape)
    return [piece.reshape(local_shape(shape, placement, i)).contiguous() for i, piece in enumerate(pieces)]


def _windows(whole: torch.Tensor, placement: Windows) -> list[torch.Tensor]:
    """Every worker's window, with the fill value outside of the tensor."""
    dim, extent = placement.dim, whole.shape[placement.dim]
    before = max(0, -min(placement.starts))
    after = max(0, max(placement.ends) - extent)
    pads = [0, 0] * (whole.dim() - 1 - dim) + [before, after]
    padded = torch.nn.functional.pad(whole, pads, value=placement.fill)
    pairs = zip(placement.starts, placement.ends, strict=True)
    return [padded.narrow(dim, start + before, end - start).contiguous() for start, end in pairs]


def _sum_of_windows(parts: list[torch.Tensor], placement: WindowSums) -> torch.Tensor:
    """The sum of the workers' windows; what they have outside of the tensor does not count."""
    dim, extent = placement.dim, sum(placement.sizes)
    shape = list(parts[0].shape)
    shape[dim] = extent
    total = parts[0].new_zeros(shape)
    for part, start, end in zip(parts, placement.starts, placement.ends, strict=True):
        first, last = max(start, 0), min(end, extent)
        if first < last:
            total.narrow(dim, first, last - first).add_(part.narrow(dim, first - start, last - first))
    return total


def _in_runs(whole: torch.Tensor, placement: Shard) -> torch.Tensor:
    if placement.outer == 1:
        return whole
    run_length = whole.shape[placement.dim] // placement.outer
    result: torch.Tensor = whole.unflatten(placement.dim, (placement.outer, run_length))
    return result


def put_together(parts: list[torch.Tensor], placement: Placement) -> list[torch.Tensor]:
    """What the whole is according to ``parts`` (every worker's word where each has the whole)."""
    if isinstance(placement, Replicate):
        return parts
    if isinstance(placement, Partial):
        return [torch.stack(parts).sum(0)]
    if isinstance(placement, Extremum):
        return [getattr(torch.stack(parts), f"a{placement.kind}")(0)]
    if isinstance(placement, WindowSums):
        return [_sum_of_windows(parts, placement)]
    assert isinstance(placement, Shard)
    if placement.outer == 1:
        return [torch.cat(parts, placement.dim)]
    runs = [p.unflatten(placement.dim, (placement.outer, p.shape[placement.dim] // placement.outer)) for p in parts]
    return [torch.cat(runs, placement.dim + 1).flatten(placement.dim, placement.dim + 1)]


def run_call(target: Any, args: Any, kwargs: Any, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """The results of ``target`` as a tuple, with ``tensors`` in the slots."""
    filled_args, filled_kwargs = fill_slots((args, dict(kwargs)), tensors)
    result = target(*with_real_buffers(target, tuple(filled_args)), **filled_kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def equal(left: torch.Tensor, right: torch.Tensor, precise: bool = True) -> bool:
    """Whether two results agree but for rounding; whole numbers and truth values must agree exactly.

    Results in double precision must agree in 9 digits, or in 4 if not ``precise`` (they stem from narrower numbers).
    """
    if left.shape != right.shape:
        return False
    if not (right.dtype.is_floating_point or right.dtype.is_complex):
        return bool(torch.equal(left.to(right.dtype), right))
    dtype = right.dtype
    if dtype is torch.complex32:
        left, right = left.to(torch.complex64), right.to(torch.complex64)  # hardly any kernel takes narrower ones
    scale = max(1.0, float(right.nan_to_num(0, 0, 0).abs().max()) if right.numel() else 1.0)
    eps = torch.finfo(dtype).eps
    tolerance = 1e-9 if precise and eps < 1e-10 else max(1e-4, 8 * eps)
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
