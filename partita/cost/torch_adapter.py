"""The only place of the cost model that touches private parts of torch. `tests/cost/test_cost_torch_adapter.py` names
them.

* ``at::native::cpublas::brgemm``: oneDNN's kernel for products of small matrices, generated for their sizes; torch
  exports it for its own compiled code.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

# void brgemm(m, n, k, lda, ldb, ldc, add, const float* a, const float* b, float* c, bool is_vnni)
_SYMBOL = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@functools.cache
def small_product() -> Kernel | None:
    """``kernel(a, b, c)`` writes a b to c, all of them contiguous float32 matrices; None where torch does not have
    it."""
    if sys.platform != "linux":
        return None
    try:
        function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), _SYMBOL)
    except (OSError, AttributeError):
        return None
    integer, pointer, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_bool
    function.argtypes = [*[integer] * 6, flag, *[pointer] * 3, flag]
    function.restype = None

    def kernel(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
        (m, k), n = a.shape, b.shape[1]
        function(m, n, k, k, n, n, False, a.data_ptr(), b.data_ptr(), c.data_ptr(), False)

    return kernel
