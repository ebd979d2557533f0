"""Written rules of ops that no model of the other tests contains: pieces recombine to the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.sharding.calls import OpCall
from partita.sharding.experiment import rule_holds
from partita.sharding.regenerate import call_of
from partita.sharding.rules import Blocks, written_rules

aten = torch.ops.aten


def real(*shape: int) -> torch.Tensor:
    return torch.empty(shape)


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


volume, image, line = real(4, 3, 6, 6, 6), real(4, 3, 6, 8), real(4, 3, 10)
cube, square = [2, 2, 2], [2, 2]

# (op, arguments, the least number of rules)
CASES: list[tuple[Any, tuple[Any, ...], int]] = [
    (aten.scatter.src, (real(4, 5), 0, whole(3, 5), real(3, 5)), 1),
    (aten.scatter.src, (real(4, 5, 6), 1, whole(4, 2, 6), real(4, 2, 6)), 2),
    (aten.scatter.value, (real(4, 5), 1, whole(4, 3), 2.5), 1),
    (aten.scatter_add.default, (real(4, 5), 0, whole(7, 5), real(7, 5)), 3),
    (aten.scatter_add.default, (real(4, 5, 6), -1, whole(4, 5, 3), real(4, 5, 3)), 4),
    (aten.gather.default, (real(4, 5, 6), 1, whole(4, 3, 6)), 4),
    (aten.index_select.default, (real(4, 5), 1, whole(7)), 3),
    (aten.index_put.default, (real(4, 5), [whole(7)], real(7, 5), True), 3),
    (aten.index_put.default, (real(4, 5), [None, whole(7)], real(4, 7)), 1),
    (aten.max_pool3d_with_indices.default, (volume, cube, cube), 1),
    (aten.max_pool3d_with_indices_backward.default,
     (real(4, 3, 3, 3, 3), volume, cube, cube, [0, 0, 0], [1, 1, 1], False, whole(4, 3, 3, 3, 3)), 1),
    (aten.avg_pool3d.default, (volume, cube, cube), 1),
    (aten.avg_pool3d_backward.default,
     (real(4, 3, 3, 3, 3), volume, cube, cube, [0, 0, 0], False, True, None), 1),
    (aten.avg_pool1d.default, (line, [2]), 1),
    (aten._adaptive_avg_pool3d.default, (volume, cube), 1),
    (aten._adaptive_avg_pool3d_backward.default, (real(4, 3, 2, 2, 2), volume), 1),
    (aten.adaptive_max_pool2d.default, (image, square), 1),
    (aten.adaptive_max_pool3d.default, (volume, cube), 1),
    (aten.upsample_nearest1d.default, (line, [15]), 3),
    (aten.upsample_nearest2d.default, (image, [12, 16]), 3),
    (aten.upsample_nearest3d.default, (volume, [9, 9, 9]), 3),
    (aten.upsample_linear1d.default, (line, [15], False), 3),
    (aten.upsample_bilinear2d.default, (image, [12, 16], False), 3),
    (aten.upsample_bicubic2d.default, (image, [12, 16], True), 3),
    (aten.upsample_trilinear3d.default, (volume, [9, 9, 9], False), 3),
    (aten._upsample_bilinear2d_aa.default, (image, [3, 4], False), 3),
    (aten._upsample_nearest_exact2d.default, (image, [12, 16]), 3),
    (aten.upsample_nearest1d_backward.default, (real(4, 3, 15), [15], [4, 3, 10]), 3),
    (aten.upsample_nearest2d_backward.default, (real(4, 3, 12, 16), [12, 16], [4, 3, 6, 8]), 3),
    (aten.upsample_bilinear2d_backward.default, (real(4, 3, 12, 16), [12, 16], [4, 3, 6, 8], False), 3),
    (aten.upsample_bicubic2d_backward.default, (real(4, 3, 12, 16), [12, 16], [4, 3, 6, 8], True), 3),
    (aten.upsample_trilinear3d_backward.default, (real(4, 3, 9, 9, 9), [9, 9, 9], [4, 3, 6, 6, 6], False), 3),
    (aten.reflection_pad1d.default, (line, [1, 2]), 1),
    (aten.reflection_pad2d.default, (image, [1, 2, 1, 2]), 1),
    (aten.replication_pad1d.default, (line, [1, 2]), 1),
    (aten.replication_pad2d.default, (image, [1, 2, 1, 2]), 1),
    (aten.reflection_pad2d_backward.default, (real(4, 3, 8, 10), image, [1, 1, 1, 1]), 1),
    (aten.replication_pad2d_backward.default, (real(4, 3, 8, 10), image, [1, 1, 1, 1]), 1),
    (aten.constant_pad_nd.default, (image, [1, 2], 0.0), 4),
    (aten.constant_pad_nd.default, (image, [1, 2], 1.0), 3),
    (aten.pixel_shuffle.default, (real(4, 12, 3, 3), 2), 1),
    (aten.pixel_unshuffle.default, (real(4, 3, 6, 6), 2), 1),
    (aten.channel_shuffle.default, (real(4, 6, 3, 3), 2), 1),
    (aten.grid_sampler_2d.default, (image, real(4, 5, 7, 2), 0, 0, False), 1),
    (aten._native_batch_norm_legit_no_training.default, (image, real(3), real(3), real(3), real(3), 0.1, 1e-5), 1),
    (aten.native_batch_norm.default, (image, real(3), real(3), real(3), real(3), False, 0.1, 1e-5), 1),
    (aten.native_batch_norm_backward.default,
     (image, image, real(3), real(3), real(3), real(3), real(3), False, 1e-5, [True, True, True]), 1),
    (aten.diagonal_copy.default, (real(4, 5, 6), 0, 1, 2), 1),
    (aten.diagonal_copy.default, (real(4, 5, 5, 7), 1, 1, 2), 2),
    (aten.view_as_real.default, (torch.empty(4, 5, dtype=torch.complex64),), 3),
    (aten.view_as_complex.default, (real(4, 5, 2),), 3),
    (aten.flip.default, (real(4, 5, 6), [1]), 2),
    (aten.roll.default, (real(4, 5, 6), [2], [-1]), 2),
    (aten.repeat.default, (real(4, 5), [2, 1]), 1),
    (aten.tril.default, (real(4, 5, 6), 1), 1),
    (aten.triu.default, (real(4, 5, 6), -1), 1),
    (aten.cumsum.default, (real(4, 5, 6), -2), 3),
    (aten.cumprod.default, (real(4, 5, 6), 1), 2),
    (aten.logcumsumexp.default, (real(4, 5, 6), 1), 2),
    (aten.cummax.default, (real(4, 5, 6), 1), 2),
    (aten.cummin.default, (real(4, 5, 6), 1), 2),
    (aten.sort.default, (real(4, 5, 6), 1), 2),
    (aten.topk.default, (real(4, 5, 6), 2, 1), 2),
    (aten.kthvalue.default, (real(4, 5, 6), 2, 1, True), 2),
    (aten.median.dim, (real(4, 5, 6), 1, True), 2),
    (aten.argmax.default, (real(4, 5, 6), 1), 2),
    (aten.prod.dim_int, (real(4, 5, 6), 1), 2),
    (aten.amax.default, (real(4, 5, 6), [0, 2]), 1),
    (aten.logsumexp.default, (real(4, 5, 6), [1]), 2),
    (aten.linalg_vector_norm.default, (real(4, 5, 6), 2, [1]), 2),
    (aten.var.correction, (real(4, 5, 6), [1]), 2),
    (aten.native_group_norm.default, (real(4, 6, 5), real(6), real(6), 4, 6, 5, 2, 1e-5), 1),
    (aten._fused_rms_norm.default, (real(4, 5, 6), [6], real(6), 1e-5), 2),
    (aten.slice_scatter.default, (real(4, 5), real(4, 2), 1, 1, 3), 2),
    (aten.select_scatter.default, (real(4, 5), real(4), 1, 2), 2),
    (aten.slice_backward.default, (real(4, 2), [4, 5], 1, 1, 3, 1), 2),
    (aten.select_backward.default, (real(4), [4, 5], 1, 2), 2),
    (aten.stack.default, ([real(4, 5), real(4, 5)], 1), 2),
    (aten.baddbmm.default, (real(4, 5, 7), real(4, 5, 6), real(4, 6, 7)), 4),
    (aten.mv.default, (real(4, 5), real(5)), 4),
    (aten.convolution.default, (line, real(3, 5, 3), real(5), [2], [0], [1], True, [0], 1), 3),
    (aten.convolution.default, (volume, real(5, 3, 3, 3, 3), None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1), 3),
    (aten.nll_loss2d_forward.default, (real(4, 3, 5, 5), whole(4, 5, 5), None, 2, -100), 1),
    (aten.nll_loss_forward.default, (real(4, 3), whole(4), real(3), 0, -100), 1),
]  # fmt: skip


def name_of(case: tuple[Any, tuple[Any, ...], int]) -> str:
    return str(case[0]).removeprefix("aten.")


def ways(extent: int) -> list[Blocks]:
    if extent == 0:
        return [Blocks((1, 1)), Blocks((1, 1, 1))]
    return [Blocks((extent - 1, 1)), Blocks((1, extent - 1)), *([Blocks((1, 1, extent - 2))] if extent > 2 else [])]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_written_rules_of_rare_ops(case: tuple[Any, tuple[Any, ...], int]) -> None:
    target, args, least = case
    call: OpCall = call_of(target, *args)
    rules = written_rules(call)
    assert rules is not None and len(rules) >= least, [rule.text() for rule in rules or ()]
    for rule in rules:
        for seed, blocks in enumerate(ways(rule.extent)):
            assert rule_holds(call, rule, blocks, seed=seed), f"{rule.text()} {blocks.counts}"
