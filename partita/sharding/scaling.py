"""Small twins of op calls: the same op with small extents, on which rules are searched and by which they are kept.

Every distinct extent above 1 is replaced by a small one, equal extents by equal ones, one extent at a time. A
replacement stays only if the op's shape kernel accepts it and gives the image of the true output shapes; if need be,
whole-number arguments equal to the extent (a ``normalized_shape``, a count of samples) are replaced with it. Extents
that other arguments fix (the patches of `col2im`) so keep their true value. Calls that differ only in sizes have the
same twin, hence the same signature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from partita.sharding.calls import OpCall, Slot, TensorSpec, fill_slots

# None divides another, so that no two extents seem related; all are even, so that they can be halved.
SMALL_EXTENTS = (4, 6, 10, 14, 22, 26, 34, 38, 46, 58, 62, 74)
MAX_ELEMENTS = 1 << 20  # of all tensors of a call on which rules are searched
SMALLEST_SCALED_NUMBER = 5  # arguments below are more likely dims or flags than extents
CPU = torch.device("cpu")

Shape = tuple[int, ...]


def twin(call: OpCall) -> OpCall | None:
    """``call`` with small extents, on the CPU, tensors contiguous; None if even the true shapes are refused."""
    current = _plain(call)
    if _run_shapes(current) is None:
        return None
    mapping: dict[int, int] = {}
    extents = list(dict.fromkeys(e for spec in call.inputs for e in spec.shape if e > 1))
    for extent, small in zip(extents, SMALL_EXTENTS, strict=False):
        for with_numbers in (False, True):
            scaled = _replaced(current, call, extent, small, with_numbers)
            image = None if scaled is None else _image(scaled, call, {**mapping, extent: small})
            if image is not None:
                current, mapping[extent] = image, small
                break
    return _with_outputs(current)


def signature(call: OpCall) -> str:
    """Text that names op, arguments, types and shapes, e.g. ``aten.cumsum.default(float32[4,6], 1)``."""

    def text(item: Any) -> str:
        if isinstance(item, Slot):
            spec = call.inputs[item.index]
            return f"{str(spec.dtype).removeprefix('torch.')}[{','.join(map(str, spec.shape))}]"
        if isinstance(item, (list, tuple)):
            return f"[{', '.join(map(text, item))}]"
        return str(item).removeprefix("torch.")

    arguments = [text(item) for item in call.args]
    arguments += [f"{name}={text(item)}" for name, item in sorted(call.kwargs.items())]
    return f"{call.name}({', '.join(arguments)})"


def exact(call: OpCall) -> OpCall | None:
    """``call`` with its true shapes, on the CPU, tensors contiguous."""
    return _with_outputs(_plain(call))


def is_small(call: OpCall) -> bool:
    return sum(spec.num_elements for spec in (*call.inputs, *call.outputs) if spec is not None) <= MAX_ELEMENTS


def with_shapes(call: OpCall, shapes: list[Shape]) -> OpCall:
    """``call`` with other input shapes, contiguous, and its outputs unknown."""
    inputs = tuple(
        dataclasses.replace(spec, shape=shape, stride=contiguous(shape), device=CPU)
        for spec, shape in zip(call.inputs, shapes, strict=True)
    )
    return dataclasses.replace(call, inputs=inputs)


def contiguous(shape: Shape) -> Shape:
    return tuple(math.prod(max(extent, 1) for extent in shape[dim + 1 :]) for dim in range(len(shape)))


def _plain(call: OpCall) -> OpCall:
    args = tuple(_plain_argument(item) for item in call.args)
    kwargs = {name: _plain_argument(item) for name, item in call.kwargs.items()}
    return with_shapes(dataclasses.replace(call, args=args, kwargs=kwargs), [spec.shape for spec in call.inputs])


def _plain_argument(item: Any) -> Any:
    if isinstance(item, (list, tuple)):
        return [_plain_argument(inner) for inner in item]
    return CPU if isinstance(item, torch.device) else item


def _replaced(call: OpCall, true: OpCall, extent: int, small: int, with_numbers: bool) -> OpCall | None:
    """``call`` with ``small`` where ``true`` has ``extent``; None if ``with_numbers`` finds no such argument."""
    shapes = [
        tuple(small if whole == extent else now for now, whole in zip(spec.shape, true_spec.shape, strict=True))
        for spec, true_spec in zip(call.inputs, true.inputs, strict=True)
    ]
    scaled = with_shapes(call, shapes)
    if not with_numbers:
        return scaled
    if extent < SMALLEST_SCALED_NUMBER:
        return None
    args, kwargs = _numbers((true.args, dict(true.kwargs)), (call.args, dict(call.kwargs)), extent, small)
    if repr((args, kwargs)) == repr((call.args, dict(call.kwargs))):
        return None
    return dataclasses.replace(scaled, args=tuple(args), kwargs=kwargs)


def _numbers(true: Any, now: Any, extent: int, small: int) -> Any:
    if isinstance(true, Mapping):
        return {name: _numbers(true[name], now[name], extent, small) for name in now}
    if isinstance(true, (list, tuple)):
        return [_numbers(a, b, extent, small) for a, b in zip(true, now, strict=True)]
    return small if type(true) is int and true == extent else now


def _image(scaled: OpCall, true: OpCall, mapping: Mapping[int, int]) -> OpCall | None:
    """``scaled`` if its outputs have the image of the true shapes.

    Extents of ``mapping`` map like that, others anyhow but alike.
    """
    outputs = _run_shapes(scaled)
    if outputs is None or len(outputs) != len(true.outputs):
        return None
    images = dict(mapping)
    for spec, whole in zip(outputs, true.outputs, strict=True):
        if (spec is None) != (whole is None):
            return None
        if spec is None or whole is None:
            continue
        if spec.dtype is not whole.dtype or len(spec.shape) != len(whole.shape):
            return None
        for now, extent in zip(spec.shape, whole.shape, strict=True):
            if images.setdefault(extent, now) != now or (now == 1) != (extent == 1):
                return None
    return scaled


def _with_outputs(call: OpCall) -> OpCall | None:
    outputs = _run_shapes(call)
    return None if outputs is None else dataclasses.replace(call, outputs=outputs)


def _run_shapes(call: OpCall) -> tuple[TensorSpec | None, ...] | None:
    """The outputs that the op's shape kernel gives; None if it refuses."""
    try:
        with _quiet(), FakeTensorMode():
            tensors = tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in call.inputs)
            args, kwargs = fill_slots((call.args, dict(call.kwargs)), tensors)
            result = call.target(*args, **kwargs)
    except Exception:  # kernels refuse shapes by every kind of error
        return None
    results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    return tuple(TensorSpec.of(item) if isinstance(item, torch.Tensor) else None for item in results)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log entry for every refusal: here a refusal is an answer, not a fault."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def output_shapes(call: OpCall, shapes: list[Shape]) -> tuple[Shape | None, ...] | None:
    """Shapes of the outputs for these input shapes, by the shape kernel; None if it refuses them."""
    outputs = _run_shapes(with_shapes(call, shapes))
    return None if outputs is None else tuple(None if spec is None else spec.shape for spec in outputs)
