"""Kernel times of described GPUs: monotone, bounded by the roofline, quantised by tiles and waves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.cluster.presets import GPU_KINDS
from partita.cost.calibration import Constants
from partita.cost.efficiency import Speed, both
from partita.cost.kernels import Kernel
from partita.errors import ClusterError

SIZES = st.integers(1, 20000)
SPEED = Speed.of(GPU_KINDS["A100-80"], Constants())


def _matmul(m: int, n: int, k: int, batch: int = 1) -> Kernel:
    return Kernel(kind="matmul", flops=2.0 * batch * m * n * k, batch=batch, m=m, n=n, k=k, dtype="float16")


@given(m=SIZES, n=SIZES, k=SIZES, kind=st.sampled_from(sorted(GPU_KINDS)))
def test_no_product_beats_the_peak(m: int, n: int, k: int, kind: str) -> None:
    speed = Speed.of(GPU_KINDS[kind], Constants())
    kernel = _matmul(m, n, k)
    assert speed.kernel_s(kernel) >= kernel.flops / speed.peak("float16")
    assert 0 < speed.use(1, m, n) <= 1


@given(m=SIZES, n=SIZES, k=SIZES)
def test_more_depth_takes_longer(m: int, n: int, k: int) -> None:
    assert SPEED.kernel_s(_matmul(m, n, 2 * k)) > SPEED.kernel_s(_matmul(m, n, k)) * 0.999


def test_one_tile_more_than_a_wave_starts_another() -> None:
    full = SPEED.use(1, 256 * 108, 128)
    assert full == pytest.approx(1.0)
    assert SPEED.use(1, 256 * 109, 128) < 0.75  # nearly twice the time for 1 % more work (small tiles soften it)


def test_count_multiplies_and_launches_add() -> None:
    one = Kernel(kind="memory", num_bytes=1e6)
    assert SPEED.kernel_s(Kernel(kind="memory", num_bytes=1e6, count=3)) == pytest.approx(3 * SPEED.kernel_s(one))
    two = Kernel(kind="memory", num_bytes=1e6, num_launches=2)
    assert SPEED.kernel_s(two) - SPEED.kernel_s(one) == pytest.approx(SPEED.constants.kernel_s)


def test_a_dtype_that_the_gpu_lacks() -> None:
    speed = Speed.of(GPU_KINDS["V100-16"], Constants())
    with pytest.raises(ClusterError, match="V100-16 must compute in one of .*bfloat16"):
        speed.kernel_s(Kernel(kind="matmul", flops=2.0, m=1, n=1, k=1, dtype="bfloat16"))


@given(first=st.floats(0, 1e3), second=st.floats(0, 1e3))
def test_both_is_between_maximum_and_sum(first: float, second: float) -> None:
    assert max(first, second) <= both(first, second) * (1 + 1e-12)
    assert both(first, second) <= (first + second) * (1 + 1e-12)
    assert both(first, second) == both(second, first)
