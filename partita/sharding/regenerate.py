"""Find the shipped rules anew: ``python -m partita.sharding.regenerate`` rewrites ``data/rules.json``.

`examples` lists calls of common ops that have no written rules; other sizes of the same kind of call have the same
twins, so they are known as well. Takes some minutes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

from partita.sharding.calls import OpCall, TensorSpec, Value, make_call
from partita.sharding.found import RuleBook, Texts, is_searched
from partita.sharding.rules import written_rules
from partita.sharding.scaling import signature, twin

aten = torch.ops.aten
FILE = Path(__file__).with_name("data") / "rules.json"


def call_of(target: Any, *args: Any, **kwargs: Any) -> OpCall:
    """The `OpCall` of ``target(*args, **kwargs)`` on real or fake tensors, of which only the shapes and types count."""

    def value(item: Any) -> Any:
        return Value("given", TensorSpec.of(item), item) if isinstance(item, torch.Tensor) else item

    wrapped_args, wrapped_kwargs = map_aggregate((args, kwargs), value)
    with FakeTensorMode(allow_non_fake_inputs=True):
        result = target(*args, **kwargs)
    return make_call(target, wrapped_args, wrapped_kwargs, result)[0]


def _real(*shape: int) -> torch.Tensor:
    return torch.empty(shape)


def _complex(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.complex64)


def _whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def examples() -> Iterator[OpCall]:
    """Calls of common ops without written rules."""
    yield from _fourier()
    yield from _indexed()
    yield from _images()
    yield from _matrices()
    yield from _others()
    yield from _losses()


SHAPES = ((5, 7), (5, 7, 11), (5, 7, 11, 13))


def _fourier() -> Iterator[OpCall]:
    """Norms 0, 1, 2 are none, by the root, by the number of entries; a model's inverse transform scales by 2."""
    for shape in SHAPES:
        rank = len(shape)
        for dims in [[rank - 1], [rank - 2], [rank - 2, rank - 1]]:
            half = [extent // 2 + 1 if dim == dims[-1] else extent for dim, extent in enumerate(shape)]
            for norm in (0, 1, 2):
                yield call_of(aten._fft_r2c.default, _real(*shape), dims, norm, True)
                yield call_of(aten._fft_r2c.default, _real(*shape), dims, norm, False)
                yield call_of(aten._fft_c2r.default, _complex(*half), dims, norm, shape[dims[-1]])
                for forward in (True, False):
                    yield call_of(aten._fft_c2c.default, _complex(*shape), dims, norm, forward)


def _indexed() -> Iterator[OpCall]:
    for shape in SHAPES[:2]:
        for dim in range(len(shape)):
            rows = [9 if d == dim else extent for d, extent in enumerate(shape)]
            yield call_of(aten.index_add.default, _real(*shape), dim, _whole(9), _real(*rows))
            yield call_of(aten.index_copy.default, _real(*shape), dim, _whole(9), _real(*rows))
            yield call_of(aten.index_fill.int_Scalar, _real(*shape), dim, _whole(9), 0)
            for reduce in ("mean", "amax", "amin", "prod"):
                yield call_of(aten.index_reduce.default, _real(*shape), dim, _whole(9), _real(*rows), reduce)
            for reduce in ("sum", "mean", "amax", "amin", "prod"):
                for kwargs in ({}, {"include_self": False}):
                    for index in (rows, shape):
                        given = (_real(*shape), dim, _whole(*index), _real(*index), reduce)
                        yield call_of(aten.scatter_reduce.two, *given, **kwargs)


def _images() -> Iterator[OpCall]:
    image, patches = _real(5, 3, 16, 16), _real(5, 27, 196)
    yield call_of(aten.im2col.default, image, [3, 3], [1, 1], [0, 0], [1, 1])
    yield call_of(aten.im2col.default, image, [3, 3], [1, 1], [1, 1], [1, 1])
    yield call_of(aten.im2col.default, image, [4, 4], [1, 1], [0, 0], [4, 4])
    yield call_of(aten.col2im.default, patches, [16, 16], [3, 3], [1, 1], [0, 0], [1, 1])
    yield call_of(aten.reflection_pad3d.default, _real(5, 3, 8, 8, 8), [1, 1, 1, 1, 1, 1])
    yield call_of(aten.replication_pad3d.default, _real(5, 3, 8, 8, 8), [1, 1, 1, 1, 1, 1])
    for mode in (0, 1):
        for padding in (0, 1, 2):
            for corners in (False, True):
                options = (mode, padding, corners)
                yield call_of(aten.grid_sampler_3d.default, _real(5, 3, 6, 7, 8), _real(5, 4, 9, 10, 3), *options)


def _matrices() -> Iterator[OpCall]:
    for batch in ((), (5,), (5, 7)):
        square, wide = _real(*batch, 11, 11), _real(*batch, 11, 13)
        yield call_of(aten.linalg_cholesky_ex.default, square)
        yield call_of(aten.cholesky.default, square)
        yield call_of(aten.linalg_inv_ex.default, square)
        yield call_of(aten._linalg_det.default, square)
        yield call_of(aten._linalg_slogdet.default, square)
        yield call_of(aten._linalg_solve_ex.default, square, wide)
        yield call_of(aten.linalg_lu_factor_ex.default, square)
        yield call_of(aten.linalg_qr.default, wide)
        yield call_of(aten._linalg_eigh.default, square)
        yield call_of(aten._linalg_svd.default, wide)
        yield call_of(aten.linalg_matrix_exp.default, square)
        yield call_of(aten.cholesky_inverse.default, square)
        yield call_of(aten.cholesky_solve.default, wide, square)
        for upper in (False, True):
            yield call_of(aten.linalg_solve_triangular.default, square, wide, upper=upper)
            yield call_of(aten.triangular_solve.default, wide, square, upper)


def _others() -> Iterator[OpCall]:
    for shape in SHAPES[:2]:
        leading, width = shape[:-1], shape[-1]
        rows = _real(*leading, 1)
        given = (_real(*shape), _real(*shape), [width], rows, _real(width))
        yield call_of(aten._fused_rms_norm_backward.default, *given, [True, True])
    first, second = _real(5, 7, 11), _real(5, 13, 11)
    for p in (1.0, 2.0):
        yield call_of(aten._cdist_forward.default, first, second, p, None)
        yield call_of(aten._cdist_backward.default, _real(5, 7, 13), first, second, p, _real(5, 7, 13))
        yield call_of(aten._pdist_forward.default, _real(7, 11), p)
    yield call_of(aten.renorm.default, _real(5, 7), 2, 0, 1.0)


def _losses() -> Iterator[OpCall]:
    """Losses that reduce, and what their decompositions consist of."""
    prims = torch.ops.prims
    for shape in ((5,), (5, 1), *SHAPES):
        one, scalar = _real(*shape), _real()
        for reduction in (1, 2):
            for name, extra in (("mse_loss", ()), ("smooth_l1_loss", (1.0,)), ("huber_loss", (1.0,))):
                forward, backward = getattr(aten, name), getattr(aten, f"{name}_backward")
                yield call_of(forward.default, one, one, reduction, *extra)
                yield call_of(backward.default, scalar, one, one, reduction, *extra)
        for op in (prims.add, prims.sub, prims.mul, prims.div):
            yield call_of(op.default, one, one)


def regenerate(calls: Iterator[OpCall] | None = None, *, limit_s: float = 1800.0) -> dict[str, Texts]:
    """The rules of all ``calls`` (default: `examples`) by signature, searched anew."""
    found: dict[str, Texts] = {}
    book = RuleBook(shipped={}, cache_name=None, limit_s=limit_s)
    wanted = [call for call in (calls or examples()) if written_rules(call) is None and is_searched(call)]
    try:
        for call, rules in zip(wanted, book.find(wanted), strict=True):
            small = twin(call)
            if small is not None:
                found[signature(small)] = rules
    finally:
        book.close()
    return found


def main() -> None:
    rules = {name: list(texts) for name, texts in regenerate().items() if texts is not None}
    lines = [f" {json.dumps(name)}: {json.dumps(texts)}" for name, texts in sorted(rules.items())]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(rules)} calls, {sum(map(bool, rules.values()))} of them with rules: {FILE}")


if __name__ == "__main__":
    main()
