"""The private parts of torch that the cost model relies on, by name: this fails first when torch changes them."""

from __future__ import annotations

import sys

import pytest
import torch

from partita.cost.torch_adapter import small_product


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's name in the library is that of Linux")
def test_the_kernel_of_small_products_is_there_and_right() -> None:
    kernel = small_product()
    assert kernel is not None
    a, b, c = torch.randn(7, 5), torch.randn(5, 9), torch.full((7, 9), float("nan"))
    kernel(a, b, c)
    torch.testing.assert_close(c, a @ b)
